"""The parts of a lab that need no root: names, shaping, quotas, both versions of control groups, latency."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen.cluster import Cluster, load_cluster, parse_cluster
from hexgen.errors import DeploymentError, SpecError
from hexgen.lab.groups import COMMAND, LEAST_CORES, Groups, find_groups, quota
from hexgen.lab.laboratory import cores_of
from hexgen.lab.links import latencies, segments, shaping
from hexgen.lab.names import MAX_LABS, MAX_NODES, LabName, check_cluster, number_of
from hexgen.lab.ray_nodes import cpus_of
from hexgen.lab.tools import check_machine
from hexgen.worker.latency import DelayedSocket, latency_setting, parse_setting

SPECS = sorted((Path(__file__).parent.parent / "cluster_specs").glob("lab-*.yaml"))


def three() -> Cluster:
    return parse_cluster({
        "name": "three",
        "nodes": [
            {"name": "a", "device": "cpu", "count": 2, "threads": 2, "speed": 0.25},
            {"name": "b", "device": "cpu"},
            {"name": "c", "device": "cpu"},
        ],
        "links": {
            "default": {"bandwidth": "1Gbps", "latency": "0us"},
            "nodes": [
                {"between": ["a", "b"], "bandwidth": "80Mbps", "latency": "5ms"},
                {"between": ["b", "c"], "bandwidth": "1MB/s", "latency": "20ms"},
            ],
        },
    })  # fmt: skip


# ---- names ----------------------------------------------------------------------------------------------------


@given(st.integers(0, MAX_LABS - 1), st.integers(0, MAX_LABS - 1), st.data())
def test_no_two_labs_share_a_name_or_an_address(a: int, b: int, data: st.DataObject) -> None:
    one, other = LabName(a), LabName(b)
    positions = st.integers(0, MAX_NODES - 1)
    addresses = one.address(data.draw(positions)), other.address(data.draw(positions))
    for name in (one.switch, one.namespace("x.y"), one.group):
        assert number_of(name) == a
    assert all(address.startswith(("198.18.", "198.19.")) for address in addresses)
    if a != b:
        assert addresses[0].rpartition(".")[0] != addresses[1].rpartition(".")[0]
        assert {one.switch, one.namespace("n")}.isdisjoint({other.switch, other.namespace("n")})


@pytest.mark.parametrize(
    "name", ["hexlab", "hexlab-", "hexlab-x", "hexlab-1x", "hexlab-999", "my-hexlab-1", "eth0"]
)
def test_other_peoples_names_are_no_lab_s(name: str) -> None:
    assert number_of(name) is None


def test_what_cannot_be_a_lab_is_said() -> None:
    with pytest.raises(SpecError, match=r"x\.yaml: node g: .* has A100 .*device: cpu"):
        check_cluster(parse_cluster({"nodes": [{"name": "g", "device": "A100"}]}), "x.yaml")
    with pytest.raises(SpecError, match=r"node n: .* addresses of its own.*remove `address`"):
        check_cluster(parse_cluster({"nodes": [{"name": "n", "device": "cpu", "address": "10.0.0.1"}]}), "x.yaml")
    with pytest.raises(SpecError, match="at most 250"):
        check_cluster(parse_cluster({"nodes": [{"name": "n-$i", "device": "cpu", "repeat": 251}]}), "x.yaml")
    with pytest.raises(SpecError, match=r"nodes\[0\]\.speed.*above 0"):
        parse_cluster({"nodes": [{"name": "n", "device": "cpu", "speed": 0}]})
    links = {"nodes": [{"between": ["n", "nowhere"], "bandwidth": "1Gbps", "latency": "1ms"}]}
    with pytest.raises(SpecError, match="there is no node 'nowhere'"):
        parse_cluster({"nodes": [{"name": "n", "device": "cpu"}], "links": links})


def test_without_root_or_tools_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(DeploymentError, match=r"only root may \(run it with sudo\)"):
        check_machine()
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("hexgen.lab.tools.find", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    with pytest.raises(DeploymentError, match=r"iproute2 is missing: there is no `tc` \(install iproute2\)"):
        check_machine()


# ---- links ----------------------------------------------------------------------------------------------------


def test_each_pair_has_its_own_bandwidth_in_both_directions() -> None:
    lab, cluster = LabName(7), three()
    wanted = {
        "a": {"b": 80_000_000, "c": 10**9},
        "b": {"a": 80_000_000, "c": 8_000_000},
        "c": {"a": 10**9, "b": 8_000_000},
    }
    for node, rates in wanted.items():
        lines = shaping(cluster, lab, node)
        classes = {line.split("classid ")[1].split()[0]: line for line in lines if line.startswith("class")}
        filters = {
            line.split("ip dst ")[1].split("/")[0]: line.split("flowid ")[1] for line in lines if "u32" in line
        }
        assert len(classes) == len(filters) == 2
        for other, rate in rates.items():
            flow = filters[lab.addresses(cluster)[other]]
            assert f" rate {rate}bit " in classes[flow]


def test_a_packet_is_short_against_its_link() -> None:
    cluster, lab = three(), LabName(0)
    assert segments(cluster, "b") == 1  # 10 MB/s: 100 us are less than a frame
    assert not any("tbf" in line for line in shaping(cluster, lab, "b"))
    assert segments(cluster, "a") == 8  # 125 MB/s: 12.5 KB
    (apart,) = [line for line in shaping(cluster, lab, "a") if "tbf" in line]  # too much for 10 MB/s
    assert "parent 1:2 " in apart
    assert " burst 3028 " in apart
    fast = parse_cluster({"nodes": [{"name": "a", "device": "cpu"}, {"name": "b", "device": "cpu"}],
                          "links": {"default": {"bandwidth": "10Gbps", "latency": "0us"}}})  # fmt: skip
    assert segments(fast, "a") == 44


# ---- processor and memory -------------------------------------------------------------------------------------


@given(st.floats(LEAST_CORES, 256))
def test_a_quota_is_what_was_asked_for(cores: float) -> None:
    quota_us, period_us = quota(cores)
    assert quota_us >= 1_000
    assert 1_000 <= period_us <= 1_000_000
    assert quota_us / period_us == pytest.approx(cores, rel=0.051 if cores < 0.1 else 0.0005)


def test_speed_and_threads_make_the_node_s_cores() -> None:
    a = three().node("a")
    assert cores_of(a, 1.0) == 1.0  # two devices of two threads, a quarter each
    assert cores_of(a, 0.5) == 0.5
    assert cpus_of(a) == 4
    with pytest.raises(ValueError, match="the least"):
        quota(LEAST_CORES / 2)


def fake_v1(root: Path) -> Groups:
    (root / "cpu").mkdir()
    (root / "memory/user/me").mkdir(parents=True)
    (root / "mounts").write_text(
        f"cgroup {root}/cpu cgroup rw,relatime,cpu 0 0\ncgroup {root}/memory cgroup rw,memory 0 0\n"
        f"cgroup2 {root}/unified cgroup2 rw 0 0\n"
    )
    (root / "cgroup").write_text("4:memory:/user/me\n1:cpu:/\n0::/\n")
    return find_groups(root)


def fake_v2(root: Path, controllers: str = "cpuset cpu io memory pids") -> Groups:
    (root / "unified").mkdir()
    (root / "unified/cgroup.controllers").write_text(controllers + "\n")
    (root / "mounts").write_text(f"cgroup2 {root}/unified cgroup2 rw,nosuid 0 0\n")
    (root / "cgroup").write_text("0::/user.slice\n")
    return find_groups(root)


def test_version_1_writes_period_and_quota(tmp_path: Path) -> None:
    groups, lab = fake_v1(tmp_path), LabName(3)
    assert groups.version == 1
    groups.create(lab, (COMMAND, "node.a", "node.b"))
    groups.set_cores(lab, "node.a", 0.25)
    groups.set_cores(lab, "node.b", 0.25)
    groups.set_cores(lab, "node.b", None)
    assert (tmp_path / "cpu/hexlab-3/node.b/cpu.cfs_quota_us").read_text() == "-1"
    groups.set_memory(lab, "node.a", 10**9)
    groups.set_weights(lab, {COMMAND: 1, "node.a": 4})
    assert (tmp_path / "cpu/hexlab-3/cpu.shares").read_text() == "5120"
    assert (tmp_path / "cpu/hexlab-3/node.a/cpu.shares").read_text() == "4096"
    inside, memory = tmp_path / "cpu/hexlab-3/node.a", tmp_path / "memory/user/me/hexlab-3/node.a"
    assert (inside / "cpu.cfs_period_us").read_text() == "10000"
    assert (inside / "cpu.cfs_quota_us").read_text() == "2500"
    assert (memory / "memory.limit_in_bytes").read_text() == "1000000000"
    assert groups.doors(lab, "node.a") == (inside / "cgroup.procs", memory / "cgroup.procs")
    (inside / "cgroup.procs").write_text("12\n34\n")
    (memory / "cgroup.procs").write_text("34\n")
    assert groups.processes(3) == {12, 34}
    assert groups.processes(30) == set()
    assert groups.labs() == {3}


def test_version_2_delegates_and_writes_one_line(tmp_path: Path) -> None:
    groups, lab = fake_v2(tmp_path), LabName(3)
    assert groups.version == 2
    groups.create(lab, (COMMAND, "node.a", "node.b"))
    groups.set_cores(lab, "node.a", 1.5)
    groups.set_cores(lab, "node.b", None)
    assert (tmp_path / "unified/hexlab-3/node.b/cpu.max").read_text() == "max 10000"
    groups.set_memory(lab, "node.a", 10**9)
    groups.set_weights(lab, {COMMAND: 1, "node.a": 4})
    assert (tmp_path / "unified/hexlab-3/cpu.weight").read_text() == "500"
    assert (tmp_path / "unified/hexlab-3/node.a/cpu.weight").read_text() == "400"
    inside = tmp_path / "unified/hexlab-3/node.a"
    assert (inside / "cpu.max").read_text() == "15000 10000"
    assert (inside / "memory.max").read_text() == "1000000000"
    for folder in (tmp_path / "unified", tmp_path / "unified/hexlab-3"):
        assert (folder / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert groups.doors(lab, "node.a") == (inside / "cgroup.procs",)
    assert groups.labs() == {3}


def test_a_machine_without_the_controller_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no control group for the processor"):
        fake_v2(tmp_path, "io pids")


def test_a_group_that_cannot_be_made_says_which(tmp_path: Path) -> None:
    groups = fake_v2(tmp_path)
    (tmp_path / "unified/hexlab-3").mkdir()
    with pytest.raises(DeploymentError, match=r"control group .*hexlab-3"):
        groups.create(LabName(3), ("node.a",))


# ---- latency --------------------------------------------------------------------------------------------------


def test_latency_is_by_address_and_only_where_there_is_some() -> None:
    lab, cluster = LabName(1), three()
    assert parse_setting(latencies(cluster, lab, "a")) == {lab.address(1): 0.005}
    assert parse_setting(latencies(cluster, lab, "b")) == {lab.address(0): 0.005, lab.address(2): 0.02}
    assert latency_setting({"10.0.0.1": 0.0}) == ""
    for wrong in ("10.0.0.1", "10.0.0.1=x", "=1", "10.0.0.1=-1"):
        with pytest.raises(ValueError, match=r".+"):
            parse_setting(wrong)


def test_a_delayed_socket_sends_late_in_order_and_completely() -> None:
    near, far = socket.socketpair()
    latency_s = 0.1
    delayed = DelayedSocket(near, latency_s)
    began = time.monotonic()
    data = bytes(range(256)) * 4000  # more than a socket buffer holds
    assert delayed.sendmsg([b"ab", memoryview(b"cd")]) == 4
    delayed.sendall(data)
    assert time.monotonic() - began < latency_s  # the sender goes on
    assert far.recv(4, socket.MSG_WAITALL) == b"abcd"
    assert time.monotonic() - began >= latency_s
    received = bytearray()
    while len(received) < len(data):
        received += far.recv(1 << 20)
    assert bytes(received) == data
    delayed.sendall(b"bye")
    delayed.close()  # lets it arrive first
    assert far.recv(10) == b"bye"
    assert far.recv(10) == b""


def test_a_delayed_socket_says_that_its_peer_has_gone() -> None:
    near, far = socket.socketpair()
    delayed = DelayedSocket(near, 0.001)
    far.close()
    with pytest.raises(OSError, match=r".+"):  # noqa: PT012 - the first sends may still be under way
        for _ in range(1000):
            delayed.sendall(b"x")
            time.sleep(0.002)
    delayed.close()


# ---- the clusters that come with it ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_bundled_labs_can_be_built_and_planned(spec: Path) -> None:
    from hexgen.model import load_model
    from hexgen.scheduler import plan
    from hexgen.validate import check_plan

    cluster = load_cluster(spec)
    check_cluster(cluster, str(spec))
    for node in cluster.nodes:
        quota(cores_of(node, 1.0))
    model = load_model(str(cluster.model))
    check_plan(plan(cluster, model), cluster, model)
