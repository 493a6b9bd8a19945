"""Discovery without Ray: rounds, names, control groups, GPUs by NVML, device types, the file that comes of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, tiny_model

from hexgen.catalogue import DEVICE_TYPES
from hexgen.cluster import load_cluster, parse_cluster
from hexgen.deploy.facts import LAB_MEMORY_VARIABLE
from hexgen.discover.cgroups import cpu_quota, hidden, memory_room
from hexgen.discover.describe import cluster_text, described, link_of
from hexgen.discover.kinds import ALIKE, cpu_kinds
from hexgen.discover.machine import look, parse_smi, visible
from hexgen.discover.names import natural, node_names
from hexgen.discover.nvml import nvml_gpus
from hexgen.discover.records import AllReduce, Gpu, Machine, Measured, Speeds, Wire
from hexgen.discover.rounds import rounds
from hexgen.discover.survey import Found, Survey, Surveyor, busy_remark, one_of_each_machine, survey
from hexgen.errors import DeploymentError, EngineError
from hexgen.plan import EngineOptions
from hexgen.scheduler import plan
from hexgen.scheduler.cost import GroupShape, StageProfile

GB = 10**9


def speeds(flops: float = 75e9, bandwidth: float = 11e9, threads: int = 1) -> Speeds:
    every = {"float32": flops, "bfloat16": flops / 4, "float16": flops / 8}
    return Speeds(threads, bandwidth * 0.9, bandwidth, every, "sizes")


def reduced(ranks: int = 2) -> AllReduce:
    return AllReduce(ranks, 2048, 400e-6, 4 << 20, 8e-3, "two threads")


def found(name: str, pace: float = 1.0, boot: str = "", gpus: tuple[Gpu, ...] = (), cpus: int = 1) -> Found:
    machine = Machine(name, boot or name, cpus, 8 * GB, gpus=gpus)
    measured = Measured(speeds(75e9 * pace * cpus, 11e9 * pace, cpus), 30e-6, None if gpus else reduced())
    return Found(name, None, True, cpus, len(gpus), machine, measured)


# ---- pairs and names -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 33))
def test_every_pair_once_and_no_node_twice_in_a_round(n: int) -> None:
    schedule = rounds(range(n))
    pairs = [tuple(sorted(pair)) for pairs in schedule for pair in pairs]
    assert sorted(pairs) == list(combinations(range(n), 2))
    for together in schedule:
        met = [node for pair in together for node in pair]
        assert len(met) == len(set(met))
    assert len(schedule) == (0 if n < 2 else n - 1 + n % 2)  # no fewer can do


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.none() | st.sampled_from(["a", "b!", "a-2"]), st.sampled_from(["a", "h", "?"]))))
def test_names_are_distinct_and_labels_come_first(wanted: list[tuple[str | None, str]]) -> None:
    names = node_names(wanted)
    assert len(set(names)) == len(wanted)
    first = next((i for i, (label, _) in enumerate(wanted) if label == "a"), None)
    assert first is None or names[first] == "a"


def test_names_sort_as_people_count() -> None:
    assert sorted(["n10", "n2", "box", "n1"], key=natural) == ["box", "n1", "n2", "n10"]


def test_nodes_of_one_machine_take_turns() -> None:
    nodes = [found("a", boot="x"), found("b", boot="y"), found("c", boot="x"), found("d", boot="x")]
    waves = [[node.name for node in wave] for wave in one_of_each_machine(nodes)]
    assert waves == [["a", "b"], ["c"], ["d"]]


# ---- control groups --------------------------------------------------------------------------------------------


def test_cgroup_v1_the_tightest_of_nested_groups(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("4:memory:/outer/inner\n3:cpu,cpuacct:/outer/inner\n0::/\n")
    for controller, files in {
        "memory": {"memory.limit_in_bytes": (5000, 4000), "memory.usage_in_bytes": (4500, 100)},
        "cpu,cpuacct": {"cpu.cfs_quota_us": (-1, 2500), "cpu.cfs_period_us": (100000, 10000)},
    }.items():
        for at, folder in enumerate(("outer", "outer/inner")):
            here = tmp_path / controller / folder
            here.mkdir(parents=True)
            for name, values in files.items():
                (here / name).write_text(f"{values[at]}\n")
    (tmp_path / "memory/outer/memory.stat").write_text("cache 9\ntotal_inactive_file 1000\n")
    room = memory_room(proc, tmp_path)
    assert room is not None
    assert (room.limit_bytes, room.room_bytes) == (5000, 1500)  # 5000 - (4500 - 1000): less than 4000 - 100
    assert cpu_quota(proc, tmp_path) == 0.25
    assert not hidden("cpu", proc, tmp_path)


def test_cgroup_v2_and_no_limits(tmp_path: Path) -> None:
    proc, group = tmp_path / "cgroup", tmp_path / "a/b"
    proc.write_text("0::/a/b\n")
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("max 100000\n")
    (group / "memory.max").write_text("max\n")
    assert cpu_quota(proc, tmp_path) is None
    assert memory_room(proc, tmp_path) is None
    (group.parent / "cpu.max").write_text("150000 100000\n")
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("300\n")
    assert cpu_quota(proc, tmp_path) == 1.5
    room = memory_room(proc, tmp_path)
    assert room is not None
    assert room.room_bytes == 700


def test_a_group_whose_files_are_out_of_sight(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("1:cpu:/lab/node\n0::/\n")
    assert hidden("cpu", proc, tmp_path / "nothing")
    proc.write_text("1:cpu:/\n0::/\n")
    assert not hidden("cpu", proc, tmp_path / "nothing"), "the root group has no limits to hide"


# ---- GPUs ------------------------------------------------------------------------------------------------------


class FakeNvml:
    """Cards joined as told: ``nvlinks[i]`` are where card i's links end, a card's number or "switch"."""

    NVML_TOPOLOGY_SYSTEM = 50
    NVML_NVLINK_MAX_LINKS = 4
    NVML_NVLINK_DEVICE_TYPE_SWITCH = 2

    class NVMLError(Exception):
        pass

    def __init__(self, nvlinks: list[list[int | str]], ancestor: int = 30, capability: tuple[int, int] = (8, 0)):
        self.nvlinks, self.ancestor, self.capability = nvlinks, ancestor, capability

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlShutdown(self) -> None: ...  # noqa: N802

    def __getattr__(self, name: str) -> Any:
        calls = {
            "nvmlDeviceGetCount": lambda: len(self.nvlinks),
            "nvmlDeviceGetHandleByIndex": lambda i: i,
            "nvmlDeviceGetName": lambda h: b"NVIDIA A100-SXM4-80GB",
            "nvmlDeviceGetMemoryInfo": lambda h: SimpleNamespace(total=85 * GB),
            "nvmlDeviceGetCudaComputeCapability": lambda h: self.capability,
            "nvmlDeviceGetUUID": lambda h: f"GPU-{h}",
            "nvmlDeviceGetPciInfo": lambda h: SimpleNamespace(busId=f"0000:{h}"),
            "nvmlDeviceGetNvLinkState": self._state,
            "nvmlDeviceGetNvLinkRemoteDeviceType": lambda h, n: 2 if self.nvlinks[h][n] == "switch" else 0,
            "nvmlDeviceGetNvLinkRemotePciInfo": lambda h, n: SimpleNamespace(busId=f"0000:{self.nvlinks[h][n]}"),
            "nvmlDeviceGetTopologyCommonAncestor": lambda a, b: self.ancestor,
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda h: 4,
        }
        if name not in calls:
            raise AttributeError(name)
        return calls[name]

    def _state(self, card: int, link: int) -> bool:
        if link >= len(self.nvlinks[card]):
            raise self.NVMLError("not supported")
        return True


@pytest.mark.parametrize(
    ("fake", "link"),
    [
        (FakeNvml([[1, 2], [0, 2], [0, 1]]), "nvlink3"),
        (FakeNvml([["switch"], ["switch"]], capability=(9, 0)), "nvlink4"),
        (FakeNvml([[1], [0]], capability=(8, 6)), "nvlink-bridge"),
        (FakeNvml([[1], [0], []]), "pcie4"),  # the third card has none: the weakest pair decides
        (FakeNvml([[], []], ancestor=50), "none"),
        (FakeNvml([[]]), None),
    ],
)
def test_what_joins_the_gpus_of_a_node(fake: FakeNvml, link: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    answer = nvml_gpus()
    assert answer is not None
    gpus, joined, _ = answer
    assert joined == link
    assert len(gpus) == len(fake.nvlinks)
    assert gpus[0].memory_bytes == 85 * GB


def test_no_nvml_and_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_gpus() is None


def test_nvidia_smi_s_lines_and_visible_cards() -> None:
    gpus = parse_smi("GPU-aa, Tesla T4, 15360, 7.5\nGPU-bb, Old One, 4096, [N/A]\nbroken\n")
    assert [(gpu.name, gpu.memory_bytes, gpu.capability) for gpu in gpus] == [
        ("Tesla T4", 15360 << 20, "7.5"),
        ("Old One", 4096 << 20, None),
    ]
    assert visible(gpus, None) == gpus
    assert visible(gpus, "GPU-b") == visible(gpus, "1") == gpus[1:]
    assert visible(gpus, "") == ()


# ---- device types ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0.05, 4), st.sampled_from([1, 2])), min_size=1, max_size=8))
def test_types_hold_nodes_that_measure_alike(paces: list[tuple[float, int]]) -> None:
    nodes = [found(f"n{i}", pace, cpus=threads) for i, (pace, threads) in enumerate(paces)]
    kinds = cpu_kinds(nodes)
    assert sorted(name for kind in kinds for name in kind.nodes) == sorted(node.name for node in nodes)
    by_name = {node.name: node for node in nodes}
    for kind in kinds:
        assert kind.definition is not None
        members = [by_name[name] for name in kind.nodes]
        assert len({node.cpus for node in members}) == 1
        entry = {"name": "x", "device": kind.name, "threads": members[0].cpus}
        device = parse_cluster({"devices": {kind.name: kind.definition}, "nodes": [entry]}).nodes[0].device
        for node in members:  # what the planner reads back is what was measured, within the kind's width
            assert node.measured is not None
            assert 0.99 / ALIKE <= device.fp32_flops / node.measured.speeds.flops["float32"] <= 1.01 * ALIKE


def test_equal_nodes_of_one_machine_are_one_type_whatever_load_made_of_them() -> None:
    def node(name: str, pace: float, quota: float) -> Found:
        made = found(name, pace, boot="one")
        assert made.measured is not None
        return replace(made, measured=replace(made.measured, speeds=replace(made.measured.speeds, quota=quota)))

    kinds = cpu_kinds([node("a", 0.2, 0.2), node("b", 0.3, 0.2), node("c", 0.3, 0.4), node("d", 0.41, 0.4)])
    assert sorted(kind.nodes for kind in kinds) == [("b", "a"), ("d", "c")]


def test_a_busy_machine_is_said() -> None:
    measured = found("a").measured
    assert measured is not None
    assert busy_remark("a", measured) == ""
    assert "1.4 cores" in busy_remark("a", replace(measured, others=1.4))
    slowed = replace(measured, speeds=replace(measured.speeds, disturbance=2.0))
    assert "2.0 times as long" in busy_remark("a", slowed)


def test_a_laboratory_s_node_has_the_memory_that_the_laboratory_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAB_MEMORY_VARIABLE, "40000000")
    machine = look()
    for threads, devices in ((4, 1), (1, 4)):
        node = replace(found("a", cpus=4), machine=machine)
        made = described("c", Survey((node,)), threads=threads).cluster.nodes[0]
        assert (made.count, made.memory_bytes) == (devices, 40_000_000)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 9), st.floats(1e-4, 1e-2), st.floats(1.2, 50))
def test_the_planner_s_all_reduce_over_the_link_takes_what_was_measured(w: int, small: float, more: float) -> None:
    """The oracle is the cost model itself."""
    device, model = DEVICE_TYPES["cpu"], tiny_model()
    link = link_of(AllReduce(w, 2048, small, 64 << 20, small * w * more, ""), device)
    stage = StageProfile(0, GroupShape((device,) * w, link), replace(model, heads=w), "float32", EngineOptions())
    tokens = (64 << 20) / (4 * model.hidden_size)
    assert stage.all_reduce_s(tokens) <= small * w * more * 1.02
    if w == 2:
        assert stage.all_reduce_s(tokens) == pytest.approx(small * w * more, rel=0.02)
        assert stage.all_reduce_s(1e-9) == pytest.approx(small, rel=0.02)


# ---- the file --------------------------------------------------------------------------------------------------


def wires(*nodes: Found, broken: tuple[str, str] | None = None) -> dict[tuple[str, str], Wire | None]:
    wire = Wire(1.03e-3, 120e6, 100, 1 << 20)
    pairs = combinations([node.name for node in nodes], 2)
    return {pair: None if pair == broken else wire for pair in pairs}


def test_the_file_reads_back_says_how_and_plans(tmp_path: Path) -> None:
    nodes = (found("fast"), found("slow", 0.4), found("slow-2", 0.41))
    made = described("lab", Survey(nodes, wires(*nodes, broken=("fast", "slow-2"))))
    text = cluster_text(made, "Head\nof two lines")
    path = tmp_path / "c.yaml"
    path.write_text(text)
    cluster = load_cluster(path)
    assert cluster == made.cluster
    assert [(n.name, n.base_device) for n in cluster.nodes] == [
        ("fast", "cpu-1"),
        ("slow", "cpu-2"),
        ("slow-2", "cpu-2"),
    ]
    assert cluster.node("slow").device.fp32_flops == pytest.approx(0.405 * 75e9, rel=0.01)
    assert cluster.node("fast").memory_bytes == pytest.approx(0.8 * 8 * GB, rel=0.001)
    assert cluster.link("fast", "slow").latency_s == pytest.approx(1e-3)  # one way, less 30 us of software
    assert cluster.link("fast", "slow").bandwidth_bytes_s == 120e6
    assert cluster.link("fast", "slow-2").bandwidth_bytes_s == 0
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.lstrip().startswith(("- {", "cpu-", "default")):
            assert lines[i - 1].lstrip().startswith("#"), f"nothing says where this is from: {line}"
    made_plan = plan(cluster, tiny_model(), WORKLOAD)
    assert made_plan.predicted is not None


def test_memory_by_the_control_group_and_shared_machines() -> None:
    nodes = [found("a", boot="m"), found("b", boot="m")]
    tight = replace(nodes[1].machine, memory_limit_bytes=2 * GB, memory_room_bytes=GB)
    nodes[1] = replace(nodes[1], machine=tight)
    cluster = described("c", Survey(tuple(nodes))).cluster
    assert cluster.node("a").memory_bytes == pytest.approx(0.8 * 4 * GB, rel=0.001)
    assert cluster.node("b").memory_bytes == pytest.approx(0.8 * GB, rel=0.001)


def test_several_cpu_devices_a_node() -> None:
    cluster = described("c", Survey((found("a", cpus=4),)), threads=2).cluster
    assert (cluster.nodes[0].count, cluster.nodes[0].threads) == (2, 2)


def gpu_node(name: str, flops: float, bandwidth: float, *cards: Gpu) -> Found:
    measured = Measured(
        Speeds(1, bandwidth, bandwidth, dict.fromkeys(("float32", "bfloat16", "float16"), flops), ""), 0.0
    )
    return replace(found(name, gpus=cards), measured=measured)


def test_cards_known_slow_and_unknown() -> None:
    t4 = Gpu("Tesla T4", 15 * GB, "7.5")
    nodes = (
        gpu_node("good", 50e12, 0.29e12, t4, t4),
        gpu_node("hot", 15e12, 0.29e12, t4),
        gpu_node("new", 70e12, 0.88e12, Gpu("Riva 128 Ultra", 4 * GB, "9.0")),
    )
    made = described("c", Survey(nodes, wires(*nodes)))
    good, hot, new = made.cluster.nodes
    assert (good.device.name, good.count, good.speed, good.device.memory_bytes) == ("T4", 2, 1.0, 15 * GB)
    assert hot.speed == pytest.approx(15 / 65 / 0.7, rel=0.05)
    assert new.device.name == "Riva-128-Ultra"
    assert new.device.fp16_flops == pytest.approx(100e12)
    assert new.device.bandwidth_bytes_s == pytest.approx(1e12)
    assert "not in the catalogue" in cluster_text(made, "")


# ---- nodes that fail -------------------------------------------------------------------------------------------


class FakeAsker:
    """Answers from a table of (method, node); what is not there has failed."""

    def __init__(self, answers: Mapping[tuple[str, str], Any]) -> None:
        self.answers = answers

    def ask(self, method: str, arguments: Mapping[str, Any], timeout_s: float, failed: Any) -> dict[str, Any]:
        for node in arguments:
            if (method, node) not in self.answers:
                failed(node, "its worker process died (killed)")
        return {node: self.answers[method, node] for node in arguments if (method, node) in self.answers}


def surveyor_of(*nodes: str, failing: tuple[str, str]) -> Surveyor:
    measured = found("x").measured
    answers: dict[tuple[str, str], Any] = {("measure", name): measured for name in nodes}
    answers |= {("prepare", name): None for name in nodes}
    answers |= {("wire", name): Wire(1e-3, 1e8, 3, 1 << 20) for name in nodes}
    answers.pop(failing, None)
    asked = [replace(found(name), measured=None) for name in nodes]
    return Surveyor(FakeAsker(answers), asked, "127.0.0.1", lambda *_: None, on_ray=True)


def test_a_node_that_fails_is_left_out_with_a_line() -> None:
    answer = survey(surveyor_of("a", "b", "c", failing=("measure", "b")))
    assert [node.name for node in answer.nodes] == ["a", "c"]
    assert answer.left_out == ("b is left out: its worker process died (killed)",)
    assert set(answer.wires) == {("a", "c")}
    assert [node.name for node in described("c", answer).cluster.nodes] == ["a", "c"]


def test_a_pair_that_fails_is_no_link() -> None:
    answer = survey(surveyor_of("a", "b", "c", failing=("wire", "a")))
    assert len(answer.nodes) == 3
    assert {pair for pair, wire in answer.wires.items() if wire is None} == {
        p for p in answer.wires if p[0] == "a"
    }
    assert any("no connection between a and" in remark for remark in answer.remarks)


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DeploymentError, match="a is left out"):
        survey(surveyor_of("a", failing=("measure", "a")))


def test_this_machine_s_own_failures_are_lines_too() -> None:
    from hexgen.discover.asking import LocalAsker

    class Broken:
        def measure(self) -> None:
            raise EngineError("no such luck")

    said: list[tuple[str, str]] = []
    assert LocalAsker("me", Broken()).ask("measure", {"me": ()}, 1.0, lambda *why: said.append(why)) == {}
    assert said == [("me", "no such luck")]
