"""Small clusters and models for the planner's tests: drawn by hypothesis, or built by hand."""

from __future__ import annotations

from hypothesis import strategies as st

from hexgen.cluster import Cluster, DeviceType, Link, Node, RegionLink
from hexgen.model import ModelSpec
from hexgen.workload import Lengths, Workload

MB = 10**6
GPU_RESERVE = 600 * MB
NETWORK = Link(1e9, 1e-4)
BUS = Link(2e9, 1e-4)
WORKLOAD = Workload(prompt_tokens=Lengths(mean=40), output_tokens=Lengths(mean=24))


def tiny_model(layers: int = 4, heads: int = 4, kv_heads: int = 2, tie: bool = False) -> ModelSpec:
    """About 0.8 MB a layer in float32, 1 MB of embedding."""
    return ModelSpec(
        name="tiny",
        family="llama",
        layers=layers,
        hidden_size=128,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=32,
        intermediate_size=352,
        vocab_size=2048,
        max_context=512,
        tie_embeddings=tie,
        dtype="float16",
    )


def device_type(kind: str, memory_mb: float, speed: float, name: str = "") -> DeviceType:
    reserve = 0 if kind == "cpu" else GPU_RESERVE
    return DeviceType(
        name=name or f"{kind}-{memory_mb:g}-{speed:g}",
        memory_bytes=int(memory_mb * MB) + reserve,
        bandwidth_bytes_s=10e9 * speed,
        fp16_flops=1e12 * speed,
        bf16_flops=1e12 * speed,
        fp32_flops=1e11 * speed,
        kind=kind,
    )


def cluster_of(
    *nodes: tuple[DeviceType, int],
    link: Link = NETWORK,
    inside: Link = BUS,
    regions: tuple[str, ...] | None = None,
    region_links: tuple[RegionLink, ...] = (),
    prices: tuple[float | None, ...] | None = None,
    budget: float | None = None,
) -> Cluster:
    return Cluster(
        "test",
        tuple(
            Node(
                f"n{i}",
                device,
                count,
                inside,
                device.name,
                region=regions[i] if regions else None,
                price_usd_h=prices[i] if prices else None,
            )
            for i, (device, count) in enumerate(nodes)
        ),
        link,
        region_links=region_links,
        device_types=tuple({device.name: device for device, _ in nodes}.values()),
        budget_usd_h=budget,
    )


@st.composite
def clusters(draw: st.DrawFn, most_devices: int = 4, least_mb: float = 1.2) -> Cluster:
    """One to ``most_devices`` devices on a few nodes, of one kind, in one or two regions."""
    kind = draw(st.sampled_from(["cpu", "cuda"]))
    left = draw(st.integers(1, most_devices))
    nodes: list[tuple[DeviceType, int]] = []
    while left > 0:
        count = draw(st.integers(1, left))
        memory = draw(st.floats(least_mb, 6.0).map(lambda x: round(x, 1)))
        nodes.append((device_type(kind, memory, draw(st.sampled_from([0.05, 0.1, 0.3]))), count))
        left -= count
    regions = tuple(draw(st.sampled_from(["east", "west"])) for _ in nodes)
    far = draw(st.sampled_from([Link(1e9, 1e-4), Link(1e7, 2e-3), Link(1e6, 2e-2)]))
    near = Link(1e9, 1e-4)
    return cluster_of(
        *nodes,
        link=far,
        inside=draw(st.sampled_from([BUS, Link(300e9, 1e-6)])),
        regions=regions,
        region_links=(RegionLink(("east", "east"), near), RegionLink(("west", "west"), near)),
    )
