"""What is there: device types, nodes, links between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from hexgen.workload_spec import Workload


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

    ``device`` already has the node's own ``memory``, ``speed`` and ``threads`` applied; ``base_device`` is the
    type's name as the file has it (it may be an alias: ``device.name`` is the catalogue's own).
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
    labels: tuple[tuple[str, str], ...] = ()  # of the Ray node that this is, sorted by key


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


@dataclass(frozen=True)  # no slots: the look-up tables below are cached on the instance
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
    cost_table: str | None = None  # a file of measured times; from a file, its absolute path

    @cached_property
    def _nodes(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _devices(self) -> dict[str, Device]:
        every = (Device(node.name, i, node.device) for node in self.nodes for i in range(node.count))
        return {device.id: device for device in every}

    @cached_property
    def _node_pairs(self) -> dict[tuple[str, str], Link]:
        return _both_ways((entry.nodes, entry.link) for entry in self.node_links)

    @cached_property
    def _region_pairs(self) -> dict[tuple[str, str], Link]:
        return _both_ways((entry.regions, entry.link) for entry in self.region_links)

    def node(self, name: str) -> Node:
        """The node of that name; ``KeyError`` where there is none."""
        return self._nodes[name]

    def devices(self) -> tuple[Device, ...]:
        return tuple(self._devices.values())

    def device(self, device_id: str) -> Device:
        """The device of that id (``node/index``); ``KeyError`` where there is none."""
        return self._devices[device_id]

    def link(self, a: str, b: str) -> Link:
        """The link between two nodes, the node's own within one; the most specific entry wins."""
        if a == b:
            return self._nodes[a].link
        found = self._node_pairs.get((a, b))
        if found is not None:
            return found
        region_a, region_b = self._nodes[a].region, self._nodes[b].region
        if region_a is not None and region_b is not None:
            found = self._region_pairs.get((region_a, region_b))
        return self.default_link if found is None else found


def _both_ways(entries: Iterable[tuple[tuple[str, str], Link]]) -> dict[tuple[str, str], Link]:
    table: dict[tuple[str, str], Link] = {}
    for (a, b), link in entries:  # the first of two equal entries wins
        table.setdefault((a, b), link)
        table.setdefault((b, a), link)
    return table
