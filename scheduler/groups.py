"""Where devices are, and which of them may form a tensor-parallel group.

Groups stay inside a node, at any width. Nodes joined by a link as fast as one inside a node form an island, whose
devices may also be grouped across its nodes; the shares of such a group follow the devices' speeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hexgen.catalogue import LINKS
from hexgen.cluster import Cluster, DeviceType, Link, Node
from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.figures import figures_of
from hexgen.split import deal

# The slowest link that people run tensor parallelism over, for each kind of device.
_ISLAND_LINKS = {"cuda": LINKS["pcie3"], "rocm": LINKS["pcie3"], "cpu": LINKS["shm"]}
_MAX_ISLAND_DEVICES = 16
_LOOPBACK = LINKS["shm"]
# Stands for a link without bandwidth, which is none, so that arithmetic goes on. No route may use it (`passable`).
_NO_LINK_BYTES_S = 1.0


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that may become a stage. ``place`` is the index of the node whose device leads it."""

    devices: tuple[str, ...]  # ids, rank order
    shape: GroupShape
    place: int

    @property
    def width(self) -> int:
        return len(self.devices)


class Topology:
    """A cluster with its links indexed: `link` is a dictionary look-up."""

    def __init__(self, cluster: Cluster, nodes: Sequence[Node] | None = None) -> None:
        self.cluster = cluster
        self.nodes: tuple[Node, ...] = tuple(cluster.nodes if nodes is None else nodes)
        self.index = {node.name: i for i, node in enumerate(self.nodes)}
        self._pairs: dict[frozenset[str], Link] = {}
        for entry in cluster.node_links:
            self._pairs.setdefault(frozenset(entry.nodes), _counted(entry.link))
        self._regions: dict[tuple[str, str], Link] = {}
        for region_entry in cluster.region_links:
            a, b = sorted(region_entry.regions)
            self._regions.setdefault((a, b), _counted(region_entry.link))
        self._default = _counted(cluster.default_link)
        links = (*self._pairs.values(), *self._regions.values(), self._default)
        self._whole = all(link.bandwidth_bytes_s > _NO_LINK_BYTES_S for link in links)
        self.fastest_bytes_s = max(link.bandwidth_bytes_s for link in links)  # of the links between nodes
        linked = {name for entry in cluster.node_links for name in entry.nodes}
        # Nodes of one area see every other node alike.
        self.areas: tuple[str, ...] = tuple(
            f"node {node.name}" if node.name in linked else f"region {node.region}" for node in self.nodes
        )

    def link(self, a: int, b: int) -> Link:
        """Between two nodes, by index; a node's own within it."""
        first, second = self.nodes[a], self.nodes[b]
        if a == b:
            # A node of one device has no link of its own to speak of, and stages of one machine still talk.
            return first.link
        found = self._pairs.get(frozenset((first.name, second.name)))
        if found is not None:
            return found
        if first.region is not None and second.region is not None:
            x, y = sorted((first.region, second.region))
            found = self._regions.get((x, y))
            if found is not None:
                return found
        return self._default

    def passable(self, places: Sequence[int]) -> bool:
        """Whether links join the nodes of a route, in this order and from the last back to the first."""
        if self._whole or len(places) < 2:
            return True
        pairs = zip(places, (*places[1:], places[0]), strict=True)
        return all(a == b or self.link(a, b).bandwidth_bytes_s > _NO_LINK_BYTES_S for a, b in pairs)


def _counted(link: Link) -> Link:
    return link if link.bandwidth_bytes_s > 0 else Link(_NO_LINK_BYTES_S, link.latency_s)


def node_groups(topology: Topology, place: int, widths: Sequence[int]) -> list[Group]:
    """The node's devices cut into groups of these widths, in order."""
    node = topology.nodes[place]
    groups: list[Group] = []
    start = 0
    for width in widths:
        devices = tuple(f"{node.name}/{i}" for i in range(start, start + width))
        groups.append(Group(devices, GroupShape((node.device,) * width, node.link), place))
        start += width
    return groups


def even_widths(count: int, width: int) -> list[int]:
    """``count`` devices in groups of ``width``; what is left over makes a smaller one."""
    widths = [width] * (count // width)
    return [*widths, count % width] if count % width else widths


def islands(topology: Topology) -> list[tuple[int, ...]]:
    """Sets of at least two nodes, all joined by links as fast as those inside a node, with few enough devices."""
    needed = [_ISLAND_LINKS.get(node.device.kind, _LOOPBACK).bandwidth_bytes_s for node in topology.nodes]
    if topology.fastest_bytes_s < min(needed, default=0.0):
        return []  # as usual: no need to look at every pair of a thousand nodes
    found: list[tuple[int, ...]] = []
    for place, node in enumerate(topology.nodes):
        for i, island in enumerate(found):
            devices = node.count + sum(topology.nodes[other].count for other in island)
            if devices <= _MAX_ISLAND_DEVICES and all(_joined(topology, place, other) for other in island):
                found[i] = (*island, place)
                break
        else:
            found.append((place,))
    return [island for island in found if len(island) > 1]


def _joined(topology: Topology, a: int, b: int) -> bool:
    first, second = topology.nodes[a].device, topology.nodes[b].device
    if first.kind != second.kind:
        return False
    link, least = topology.link(a, b), _ISLAND_LINKS.get(first.kind, _LOOPBACK)
    return link.bandwidth_bytes_s >= least.bandwidth_bytes_s and link.latency_s <= 2 * least.latency_s


def spanning_groups(topology: Topology, members: Iterable[tuple[int, int]], heads: int) -> list[Group]:
    """One group of these devices (node index, device index) of several nodes: shares by speed, and by memory."""
    ordered = sorted(members)
    if len(ordered) > heads:
        return []
    devices = tuple(topology.nodes[place].device for place, _ in ordered)
    ids = tuple(f"{topology.nodes[place].name}/{i}" for place, i in ordered)
    places = sorted({place for place, _ in ordered})
    pairs = [topology.link(a, b) for i, a in enumerate(places) for b in places[i:]]
    link = Link(min(p.bandwidth_bytes_s for p in pairs), max(p.latency_s for p in pairs))
    shapes: dict[GroupShape, None] = {}
    for figures in (_speeds(devices), [float(device.memory_bytes) for device in devices]):
        sizes = [float(b - a) for a, b in deal(heads, figures, at_least=1)]
        shapes[GroupShape(devices, link, None if len(set(sizes)) == 1 else tuple(sizes))] = None
    shapes[GroupShape(devices, link, None)] = None
    return [Group(ids, shape, ordered[0][0]) for shape in shapes]


def _speeds(devices: Sequence[DeviceType]) -> list[float]:
    """Decode is bound by reading weights, so a device's share follows its memory's bandwidth."""
    return [device.bandwidth_bytes_s * figures_of(device).bandwidth_share for device in devices]
