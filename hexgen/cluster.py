"""What is there: device types, nodes, links between them."""

from __future__ import annotations

from dataclasses import dataclass

from hexgen.workload import Workload


@dataclass(frozen=True, slots=True)
class DeviceType:
    """One kind of accelerator. Dense FLOP/s (no sparsity); 0.0 where the device lacks the format."""

    name: str
    memory_bytes: int
    bandwidth_bytes_s: float
    fp16_flops: float
    bf16_flops: float
    fp32_flops: float
    capability: str | None = None  # CUDA compute capability, "gfx942", or None for a CPU
    kind: str = "cuda"  # "cuda", "rocm" or "cpu"

    def flops(self, dtype: str) -> float:
        return {"float16": self.fp16_flops, "bfloat16": self.bf16_flops, "float32": self.fp32_flops}[dtype]


@dataclass(frozen=True, slots=True)
class Link:
    bandwidth_bytes_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Node:
    """One machine: ``count`` equal devices and the link among them.

    ``device`` already has the node's own ``memory`` and ``speed`` applied (``base_device`` names the type).
    """

    name: str
    device: DeviceType
    count: int
    link: Link
    base_device: str
    link_name: str | None = None  # the catalogue's name of the link, if it was given by name
    region: str | None = None
    price_usd_h: float | None = None
    address: str | None = None
    threads: int | None = None  # CPU devices: threads of each
    speed: float = 1.0
    memory_bytes: int | None = None  # the node's own figure, where it differs from the type's


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator of a node; its id is ``node/index``."""

    node: str
    index: int
    type: DeviceType

    @property
    def id(self) -> str:
        return f"{self.node}/{self.index}"


@dataclass(frozen=True, slots=True)
class RegionLink:
    """Between two regions, or within one (both names equal)."""

    regions: tuple[str, str]
    link: Link


@dataclass(frozen=True, slots=True)
class NodeLink:
    nodes: tuple[str, str]
    link: Link


@dataclass(frozen=True, slots=True)
class Cluster:
    name: str
    nodes: tuple[Node, ...]
    default_link: Link
    region_links: tuple[RegionLink, ...] = ()
    node_links: tuple[NodeLink, ...] = ()
    device_types: tuple[DeviceType, ...] = ()  # defined in the file, beyond the catalogue
    model: str | None = None
    workload: Workload | None = None
    budget_usd_h: float | None = None

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def devices(self) -> tuple[Device, ...]:
        return tuple(Device(node.name, i, node.device) for node in self.nodes for i in range(node.count))

    def link(self, a: str, b: str) -> Link:
        """The link between two nodes, the node's own within one; the most specific entry wins."""
        if a == b:
            return self.node(a).link
        for entry in self.node_links:
            if set(entry.nodes) == {a, b}:
                return entry.link
        regions = (self.node(a).region, self.node(b).region)
        for region_entry in self.region_links:
            if None not in regions and sorted(region_entry.regions) == sorted(str(r) for r in regions):
                return region_entry.link
        return self.default_link
