"""What the vocabulary's tests share: strategies that make clusters, and a small model."""

from typing import Any

from hypothesis import strategies as st

from hexgen.catalogue import DEVICE_TYPES, LINKS, default_link_name, lookup_link, scaled
from hexgen.cluster import Cluster, DeviceType, Link, Node, NodeLink, RegionLink
from hexgen.model import ModelSpec
from hexgen.workload import Lengths, Slo, Workload

MODEL = ModelSpec("tiny", "llama", 8, 64, 8, 4, 8, 176, 1000, 512, dtype="float16")

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,7}", fullmatch=True)
rates = st.floats(1e-3, 1e18, allow_nan=False)
positive = st.floats(1e-6, 1e9, allow_nan=False)
texts = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=12)
links = st.builds(Link, rates, st.floats(0, 100, allow_nan=False))
optional_time = st.none() | st.floats(1e-9, 1e4)


@st.composite
def lengths(draw: st.DrawFn) -> Lengths:
    mean = draw(st.floats(0.5, 1e5))
    if draw(st.booleans()):
        return Lengths(mean)
    p99 = draw(st.none() | st.floats(1, 1e5))
    most = draw(st.none() | st.integers(100_000, 10_000_000))
    return Lengths(mean, p99, most, draw(st.none() | texts))


workloads = st.builds(
    Workload,
    lengths(),
    lengths(),
    st.just("max") | positive,
    st.builds(Slo, optional_time, optional_time, optional_time),
)
device_types = st.builds(
    DeviceType,
    name=names,
    memory_bytes=st.integers(1, 10**15),
    bandwidth_bytes_s=rates,
    fp16_flops=st.just(0.0) | rates,
    bf16_flops=st.just(0.0) | rates,
    fp32_flops=rates,
    capability=st.sampled_from([None, "8.6", "7.5", "12.0", "gfx942"]),
    kind=st.sampled_from(["cuda", "rocm", "cpu"]),
)


@st.composite
def nodes(draw: st.DrawFn, name: str, types: dict[str, DeviceType]) -> Node:
    written = draw(st.sampled_from([*types, "A100", "T4", "cpu", "RTX3090Ti"]))
    base = types.get(written) or DEVICE_TYPES["A100-40G-SXM" if written == "A100" else written]
    memory = draw(st.none() | st.integers(1, 10**14))
    speed = draw(st.just(1.0) | positive)
    threads = draw(st.none() | st.integers(1, 64)) if base.kind == "cpu" else None
    link_name = draw(st.just(default_link_name(base)) | st.sampled_from(sorted(LINKS)) | st.none())
    return Node(
        name=name,
        device=scaled(base, memory_bytes=memory, speed=speed, threads=threads),
        count=draw(st.integers(1, 9)),
        link=draw(links) if link_name is None else lookup_link(link_name),
        base_device=written,
        link_name=link_name,
        region=draw(st.none() | st.sampled_from(["us", "no", "1e5"])),
        price_usd_h=draw(st.none() | st.just(0.0) | positive),
        address=draw(st.none() | st.sampled_from(["10.0.0.7", "host.lan", "::1", "fe80::2"])),
        threads=threads,
        speed=speed,
        memory_bytes=memory,
        labels=tuple(sorted(draw(st.dictionaries(texts, texts, max_size=2)).items())),
    )


def _pairs(draw: st.DrawFn, ends: list[str], *, same: bool) -> list[tuple[str, str]]:
    every = [(a, b) for i, a in enumerate(ends) for b in ends[i if same else i + 1 :]]
    return draw(st.lists(st.sampled_from(every), unique=True, max_size=3)) if every else []


@st.composite
def clusters(draw: st.DrawFn, **fixed: Any) -> Cluster:
    types = {d.name: d for d in draw(st.lists(device_types, max_size=2, unique_by=lambda d: d.name))}
    node_names = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    every = tuple(draw(nodes(name, types)) for name in node_names)
    regions = sorted({node.region for node in every if node.region is not None})
    values: dict[str, Any] = {
        "name": draw(texts),
        "nodes": every,
        "default_link": draw(links),
        "region_links": tuple(RegionLink(p, draw(links)) for p in _pairs(draw, regions, same=True)),
        "node_links": tuple(NodeLink(p, draw(links)) for p in _pairs(draw, node_names, same=False)),
        "device_types": tuple(types.values()),
        "model": draw(st.none() | texts),
        "workload": draw(st.none() | workloads),
        "budget_usd_h": draw(st.none() | positive),
        "cost_table": draw(st.none() | st.just("/tables/measured.yaml")),
    }
    return Cluster(**(values | fixed))
