"""Cluster files: the published format to the letter, exact round trips, and errors that name the place."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from vocabulary_strategies import clusters

from hexgen.catalogue import DEVICE_TYPES
from hexgen.cluster import Cluster, Link, cluster_to_dict, dump_cluster, load_cluster, parse_cluster
from hexgen.errors import SpecError
from hexgen.workload import Lengths, Slo, Workload
from hexgen.yamlfile import parse_yaml, write_yaml

SPECS = sorted((Path(__file__).parent.parent / "cluster_specs").glob("*.yaml"))

LAB = """
name: lab
devices:
  my-card: {memory: 24GB, bandwidth: 936GB/s, fp16: 142TFLOPS, capability: "8.6"}
nodes:
  - {name: ice-1, region: iceland, device: RTX3090Ti, count: 8, link: pcie4, price: 2.0}
  - {name: ice-2, region: iceland, device: A6000, count: 4,
     link: {bandwidth: 56GB/s, latency: 5us}, address: 10.0.0.7}
  - {name: box,   region: home,    device: cpu, count: 2, threads: 1, memory: 4GB, speed: 0.25}
  - {name: t4-$i, repeat: 12, region: us, device: T4, count: 1}
  - {name: own, device: my-card}
links:
  default: {bandwidth: 10Gbps, latency: 1ms}
  regions: [{between: [iceland, us], bandwidth: 1Gbps, latency: 70ms},
            {within: iceland, bandwidth: 25Gbps, latency: 50us}]
  nodes:   [{between: [ice-1, ice-2], bandwidth: 100Gbps, latency: 20us}]
model: llama-2-70b
workload:
  prompt_tokens: 763
  output_tokens: 232
  rate: 2.5
  slo: {ttft: 2s, tpot: 100ms}
budget: 65
"""


def lab(**changes: Any) -> dict[str, Any]:
    return parse_yaml(LAB, "lab.yaml") | changes


def test_the_published_format() -> None:
    cluster = parse_cluster(lab(), "lab.yaml")
    assert len(cluster.nodes) == 16
    assert len(cluster.devices()) == 8 + 4 + 2 + 12 + 1
    assert [node.name for node in cluster.nodes[3:15]] == [f"t4-{i}" for i in range(1, 13)]
    ice = cluster.node("ice-1")
    assert ice.device == DEVICE_TYPES["RTX3090Ti"]
    assert (ice.link_name, ice.price_usd_h, ice.region) == ("pcie4", 2.0, "iceland")
    assert cluster.node("ice-2").link == Link(56e9, 5e-6)
    assert cluster.node("ice-2").address == "10.0.0.7"
    box = cluster.node("box").device
    assert box.memory_bytes == 4 * 10**9
    assert box.fp32_flops == DEVICE_TYPES["cpu"].fp32_flops / 4
    assert box.bandwidth_bytes_s == DEVICE_TYPES["cpu"].bandwidth_bytes_s / 4
    own = cluster.node("own")
    assert own.count == 1
    assert own.device.bf16_flops == 142e12
    assert cluster.device("ice-2/3").type.memory_bytes == 48 * 10**9
    with pytest.raises(KeyError):
        cluster.device("ice-2/4")
    assert (cluster.model, cluster.budget_usd_h) == ("llama-2-70b", 65.0)
    assert cluster.workload == Workload(Lengths(763.0), Lengths(232.0), 2.5, Slo(2.0, 0.1))


def test_the_most_specific_link_wins() -> None:
    cluster = parse_cluster(lab(), "lab.yaml")
    assert cluster.link("ice-1", "ice-1") == cluster.node("ice-1").link
    assert cluster.link("ice-2", "ice-1") == Link(12.5e9, 20e-6)
    assert cluster.link("t4-5", "ice-2") == Link(125e6, 0.07)
    assert cluster.link("t4-5", "t4-6") == Link(1.25e9, 1e-3)
    assert cluster.link("own", "box") == Link(1.25e9, 1e-3)
    within = parse_cluster(lab(links={"regions": lab()["links"]["regions"]}), "x")
    assert within.link("ice-1", "ice-2") == Link(3.125e9, 50e-6)
    assert within.default_link == Link(1.25e9, 1e-3)


@settings(deadline=None, max_examples=60)
@given(clusters())
def test_round_trips_are_exact(cluster: Cluster) -> None:
    assert parse_cluster(cluster_to_dict(cluster), "x") == cluster
    assert parse_cluster(parse_yaml(write_yaml(cluster_to_dict(cluster)), "x"), "x") == cluster


def test_files_and_copies(tmp_path: Path) -> None:
    cluster = parse_cluster(lab(), "lab.yaml")
    cluster.link("ice-1", "ice-2")  # the look-up tables are filled; they are no part of the value
    dump_cluster(cluster, tmp_path / "out.yaml", "written by a test")
    assert load_cluster(tmp_path / "out.yaml") == cluster
    assert pickle.loads(pickle.dumps(cluster)) == cluster  # noqa: S301 - our own bytes
    assert hash(copy.deepcopy(cluster)) == hash(cluster)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_shipped_clusters(path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.name == path.stem
    assert parse_cluster(cluster_to_dict(cluster), "x") == cluster
    expected = {"hexgen-full58": 58, "hexgen-half30": 30, "hexgen-homogeneous16": 16, "helix-single24": 24}
    expected |= {"helix-hetero42": 64, "helix-distributed24": 24, "demo": 4}
    assert len(cluster.devices()) == expected.get(path.stem, len(cluster.devices()))
    prices = {"hexgen-full58": 65.04, "hexgen-half30": 29.6, "hexgen-homogeneous16": 65.54}
    if path.stem in prices:
        assert sum(node.price_usd_h or 0 for node in cluster.nodes) == pytest.approx(prices[path.stem])


def node(**fields: Any) -> dict[str, Any]:
    return {"nodes": [{"name": "a", "device": "T4"} | fields]}


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({}, "c.yaml: 'nodes' is missing"),
    ({"nodes": []}, "c.yaml: nodes: must be a list of 1 to"),
    ({"nodes": {"a": 1}}, "c.yaml: nodes: must be a list"),
    ({"nodes": ["a"]}, "c.yaml: nodes[0]: must be a mapping"),
    (lab(nodez=1), "unknown key 'nodez' (did you mean 'nodes'?)"),
    (node(device="T44"), "c.yaml: nodes[0].device: unknown device type 'T44' (did you mean T4"),
    (node(device=4), "c.yaml: nodes[0].device: must be text"),
    (
        node() | {"devices": {"T4": {"fp16": "0TFLOPS", "bf16": "0TFLOPS", "fp32": "0TFLOPS"}}},
        "c.yaml: devices.T4: a device of no FLOP/s in any dtype computes nothing",
    ),
    (node(name="a b"), "c.yaml: nodes[0].name: must be a name"),
    (node(name="a/b"), "nodes[0].name"),
    (node(cuont=2), "c.yaml: nodes[0]: unknown key 'cuont' (did you mean 'count'?)"),
    (node(count=0), "c.yaml: nodes[0].count: must be a whole number between 1 and"),
    (node(count="4"), "nodes[0].count"),
    (node(count=10**9), "nodes[0].count"),
    (node(memory="24"), "c.yaml: nodes[0].memory: '24' is not a size (write a size with its unit"),
    (node(memory=24), "nodes[0].memory: 24 is not a size"),
    (node(memory="0GB"), "nodes[0].memory: must be more than nothing"),
    (node(memory="24Gbps"), "nodes[0].memory: '24Gbps' has no unit of a size"),
    (node(speed=0), "nodes[0].speed: must be a number above 0"),
    (node(speed=float("nan")), "nodes[0].speed: must be a number"),
    (node(price=-1), "nodes[0].price"),
    (node(threads=2), "nodes[0].threads: threads are for cpu devices only"),
    (node(link="nvlnk3"), "nodes[0].link: unknown link 'nvlnk3' (did you mean nvlink3?"),
    (
        node(link={"bandwidth": "10GB", "latency": "1us"}),
        "nodes[0].link.bandwidth: '10GB' has no unit of a bandwidth",
    ),
    (node(link={"bandwidth": "10GB/s"}), "nodes[0].link: 'latency' is missing"),
    (node(address="10.0.0.7; rm"), "nodes[0].address: must be an IP address"),
    (node(region="a,b"), "nodes[0].region"),
    (node(repeat=3), "nodes[0].name: 3 nodes cannot all be named 'a' (put the number into the name, like a-$i"),
    (node(name="a-$i"), "nodes[0].name: must be a name"),
    (node(name="a-$i", repeat=10**6), "nodes[0].repeat"),
    (node(name="a-$i", repeat=60_000, count=60_000), "more than 65536 devices"),
    ({"nodes": [{"name": "a", "device": "T4"}] * 2}, "c.yaml: nodes[1].name: the node name 'a' stands twice"),
    (node() | {"devices": {"x": {"memory": "1GB"}}}, "devices.x: 'fp16' is missing"),
    (node() | {"devices": {"x": {"fp16": "1TB"}}}, "devices.x.fp16: '1TB' has no unit of a speed"),
    (node() | {"devices": {"T4": {"capability": "sm75"}}}, "devices.T4.capability: must be a compute capability"),
    (node() | {"devices": {"T4": {"kind": "tpu"}}}, "devices.T4.kind: must be one of"),
    (node() | {"links": {"default": {"bandwidth": "1Gbps"}}}, "links.default: 'latency' is missing"),
    (
        node() | {"links": {"nodes": [{"between": ["a", "b"], "bandwidth": "1Gbps", "latency": "0s"}]}},
        "no node 'b'",
    ),
    (
        node() | {"links": {"nodes": [{"between": ["a", "a"], "bandwidth": "1Gbps", "latency": "0s"}]}},
        "both are 'a'",
    ),
    (
        node() | {"links": {"nodes": [{"between": ["a"], "bandwidth": "1Gbps", "latency": "0s"}]}},
        "a list of 2 entries",
    ),
    (
        node() | {"links": {"regions": [{"within": "x", "bandwidth": "1Gbps", "latency": "0s"}]}},
        "no node is in the region",
    ),
    (node() | {"links": {"regions": [{"bandwidth": "1Gbps", "latency": "0s"}]}}, "links.regions[0]: needs either"),
    (node() | {"budget": "65"}, "c.yaml: budget: must be a number"),
    (node() | {"model": 7}, "c.yaml: model: must be text"),
    (node() | {"workload": {"rate": "fast"}}, "c.yaml: workload.rate: must be requests per second, or max"),
    (node() | {"workload": {"rate": 0}}, "workload.rate: must be a number above 0"),
    (node() | {"workload": {"slo": {"ttft": 2}}}, "workload.slo.ttft: 2 is not a time"),
    (node() | {"workload": {"prompt_tokens": {"p99": 3}}}, "workload.prompt_tokens: 'mean' is missing"),
    (
        node() | {"workload": {"prompt_tokens": {"trace": "none.csv"}}},
        "workload.prompt_tokens.trace: the trace none.csv",
    ),
]


@pytest.mark.parametrize(("value", "message"), BROKEN, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_what_is_wrong_is_named_with_its_place(value: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_cluster(value, "c.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_stated_twice() -> None:
    entry = {"between": ["ice-1", "ice-2"], "bandwidth": "1Gbps", "latency": "1ms"}
    reverse = entry | {"between": ["ice-2", "ice-1"]}
    with pytest.raises(SpecError, match=r"links\.nodes\[1\]: the link between .* stands twice"):
        parse_cluster(lab(links={"nodes": [entry, reverse]}), "c.yaml")


def test_corrections_keep_what_they_do_not_name() -> None:
    cluster = parse_cluster({"devices": {"T4": {"memory": "15GB"}}, "nodes": [{"name": "a", "device": "T4"}]}, "x")
    device = cluster.device("a/0").type
    assert device.memory_bytes == 15 * 10**9
    assert (device.fp16_flops, device.bf16_flops, device.capability) == (65e12, 0.0, "7.5")


def test_repeated_addresses_and_labels() -> None:
    group = {"name": "n$i", "repeat": 2, "device": "cpu", "address": "10.0.0.$i", "labels": {"rack": "r1"}}
    cluster = parse_cluster({"nodes": [group]}, "x")
    assert [n.address for n in cluster.nodes] == ["10.0.0.1", "10.0.0.2"]
    assert cluster.nodes[0].labels == (("rack", "r1"),)
