"""Which Ray node each node of the plan becomes: pure, no Ray."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.cluster import parse_cluster
from hexgen.deploy.facts import installed_version
from hexgen.deploy.ray_placement import Demand, RayNode, match_nodes
from hexgen.deploy.ray_verify import Facts, verify
from hexgen.errors import DeploymentError
from hexgen.memory import PlanMemory
from hexgen.plan import DevicePrediction


def demand(name: str, count: int = 1, **fields: object) -> Demand:
    entry = {"name": name, "device": "cpu", "count": count, **fields}
    node = parse_cluster({"name": "test", "nodes": [entry]}).nodes[0]
    return Demand(node, tuple(f"{name}/{i}" for i in range(count)))


def ray_node(id: str, address: str = "10.0.0.1", cpus: float = 4, gpus: float = 0, **labels: str) -> RayNode:
    named = {"hexgen.node": labels.pop("name")} if "name" in labels else {}
    return RayNode(id, address, f"host-{id}", cpus, gpus, named | labels)


def matched(wanted: list[Demand], offered: list[RayNode]) -> dict[str, str]:
    return {name: node.id for name, node in match_nodes(wanted, offered).items()}


def test_by_address() -> None:
    offered = [ray_node("a", "10.0.0.1"), ray_node("b", "10.0.0.2"), ray_node("c", "10.0.0.3")]
    wanted = [demand("x", address="10.0.0.3"), demand("y"), demand("z", address="10.0.0.1")]
    assert matched(wanted, offered) == {"x": "c", "y": "b", "z": "a"}


def test_by_host_name() -> None:
    assert matched([demand("x", address="host-b")], [ray_node("a"), ray_node("b")]) == {"x": "b"}


def test_by_node_label() -> None:
    offered = [ray_node("a", name="y"), ray_node("b"), ray_node("c", name="x")]
    assert matched([demand("x"), demand("y"), demand("z")], offered) == {"x": "c", "y": "a", "z": "b"}


def test_by_labels_of_the_cluster_file() -> None:
    offered = [ray_node("a", rack="1"), ray_node("b", rack="2", shelf="3")]
    assert matched([demand("x", labels={"rack": "2"})], offered) == {"x": "b"}


def test_in_order_each_a_node_of_its_own() -> None:
    offered = [ray_node("a"), ray_node("b"), ray_node("c")]
    assert matched([demand("x"), demand("y")], offered) == {"x": "a", "y": "b"}


def test_nodes_too_small_are_passed_over() -> None:
    offered = [ray_node("a", cpus=1), ray_node("b", cpus=4)]
    assert matched([demand("x", 2), demand("y")], offered) == {"x": "b", "y": "a"}


def test_one_machine_takes_all_nodes_where_there_is_no_other() -> None:
    assert matched([demand("x", 2), demand("y"), demand("z")], [ray_node("a", cpus=4)]) == dict.fromkeys(
        "xyz", "a"
    )


def test_several_ray_nodes_at_one_address() -> None:
    offered = [ray_node("a", name="y"), ray_node("b", name="x")]
    assert matched([demand("x", address="10.0.0.1"), demand("y", address="10.0.0.1")], offered) == {
        "x": "b",
        "y": "a",
    }


def test_gpu_devices_need_gpus() -> None:
    wanted = [demand("x", 2, device="T4")]
    assert matched(wanted, [ray_node("a"), ray_node("b", gpus=2)]) == {"x": "b"}
    with pytest.raises(DeploymentError, match=r"node x: the plan needs 2 GPU and 2 CPU.*10\.0\.0\.1.*0 GPU"):
        match_nodes(wanted, [ray_node("a")])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (demand("x", address="10.9.9.9"), "no Ray node has the address 10.9.9.9"),
        (demand("x", labels={"rack": "7"}), "no Ray node has the labels rack=7"),
        (demand("x", 9), "no Ray node has that left"),
        (demand("x", 9, address="10.0.0.1"), "its address 10.0.0.1 names does not have that"),
    ],
)
def test_what_is_missing_is_said(wanted: Demand, message: str) -> None:
    with pytest.raises(DeploymentError, match=message) as caught:
        match_nodes([wanted], [ray_node("a")])
    assert caught.value.where == "node x"
    assert "10.0.0.1" in str(caught.value.remedy)


def test_another_nodes_label_is_not_taken() -> None:
    with pytest.raises(DeploymentError):
        match_nodes([demand("x"), demand("y")], [ray_node("a", name="y")])


@settings(deadline=None, max_examples=100)
@given(
    wanted=st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=6),
    offered=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=6),
)
def test_never_more_than_a_node_has(wanted: list[tuple[int, bool]], offered: list[tuple[int, int]]) -> None:
    demands = [demand(f"n{i}", count, device="T4" if gpu else "cpu") for i, (count, gpu) in enumerate(wanted)]
    nodes = [ray_node(str(i), cpus=cpus, gpus=gpus) for i, (cpus, gpus) in enumerate(offered)]
    try:
        found = match_nodes(demands, nodes)
    except DeploymentError:
        return
    assert set(found) == {d.node.name for d in demands}
    for node in nodes:
        here = [d for d in demands if found[d.node.name].id == node.id]
        assert sum(d.cpus for d in here) <= node.cpus
        assert sum(d.gpus for d in here) <= node.gpus


# ---- what the actors found -----------------------------------------------------------------------------------

CLUSTER = parse_cluster(
    {"name": "c", "nodes": [{"name": "g", "device": "T4", "count": 2}, {"name": "p", "device": "cpu", "count": 2}]}
)
GB = 10**9


def facts(device: str, **fields: object) -> Facts:
    gpu = device.startswith("g")
    found = Facts(
        device=device,
        ray_node="a",
        address="10.0.0.1",
        hostname="host",
        pid=1,
        hexgen_version=installed_version(),
        torch_version="2",
        torch_device="cuda:0" if gpu else "cpu",
        device_name="Tesla T4" if gpu else "cpu",
        device_uuid=f"GPU-{device}" if gpu else None,
        memory_bytes=15 * GB,
        cores=4,
    )
    return replace(found, **fields)


def planned(**bytes_of: int) -> PlanMemory:
    names = [name.replace("_", "/") for name in bytes_of]
    devices = [DevicePrediction(name, n, 0, 0, n) for name, n in zip(names, bytes_of.values(), strict=True)]
    return PlanMemory("float32", tuple(devices), (), ())


def check(*found: Facts, **bytes_of: int) -> tuple[str, ...]:
    return verify({one.device: one for one in found}, CLUSTER, planned(**bytes_of))


def test_what_fits_is_accepted() -> None:
    assert check(facts("g/0"), facts("g/1"), facts("p/0"), g_0=14 * GB, g_1=14 * GB, p_0=GB) == ()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([facts("g/0", hexgen_version="0.0.1")], "hexgen 0.0.1 is installed there"),
        ([facts("g/0"), facts("g/1", device_uuid="GPU-g/0")], "are the same GPU"),
        ([facts("g/0", memory_bytes=8 * GB)], "the plan puts 10 GB on it"),
        ([facts("p/0", memory_bytes=15 * GB), facts("p/1")], "the plan puts 20 GB on this machine"),
    ],
)
def test_what_does_not_match_is_refused(found: list[Facts], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        check(*found, g_0=10 * GB, g_1=10 * GB, p_0=10 * GB, p_1=10 * GB)


def test_another_card_than_planned_is_remarked_on() -> None:
    (remark,) = check(facts("g/0", device_name="NVIDIA L4"), g_0=GB)
    assert "L4" in remark
    assert "T4" in remark


def test_crowded_cores_are_remarked_on() -> None:
    (remark,) = check(facts("p/0", cores=1), facts("p/1", cores=1), p_0=1, p_1=1)
    assert "1 cores for 2 threads" in remark
