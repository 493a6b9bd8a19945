"""Devices as classes: equal nodes of one place are one class, so that equal machines cost no symmetry.

A `GroupType` is a tensor-parallel width on a node of one class; pools (`pools`) say how many groups of each type
one pipeline could draw on.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hexgen.cluster import Link
from hexgen.scheduler.columns.knapsack import Kind, halves
from hexgen.scheduler.columns.pools import Links, Pool, area_sets, crossing, joint_crossing, least_of, needs_joint
from hexgen.scheduler.cost import CostModel, GroupShape, StageProfile
from hexgen.scheduler.groups import Topology

Floats = npt.NDArray[np.float64]

_MOST_SITES = 32  # classes kept apart by place; beyond that equal nodes of all places are one class (a relaxation)
_MANY_DEVICES = 16  # of one node: beyond that only these widths, and the whole node
_WIDTHS = ((1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 4, 8, 16), (1, 4, 16), (1,))  # the first set with few patterns
_MOST_PATTERNS = 500


@dataclass(frozen=True, slots=True)
class NodeClass:
    """Equal nodes. ``patterns``: each way to cut one of them into groups, as how many of each width."""

    count: int  # devices of one node
    places: tuple[int, ...]  # indices of the nodes in the topology
    widths: tuple[int, ...]
    patterns: tuple[tuple[int, ...], ...]  # parallel to ``widths``
    price_usd_h: float


@dataclass(frozen=True, slots=True)
class GroupType:
    """A group of ``width`` devices on a node of class ``node_class``."""

    node_class: int
    width: int
    profile: StageProfile


class Classes:
    """The cluster's node classes, group types and pools."""

    def __init__(self, topology: Topology, cost: CostModel) -> None:
        self.topology = topology
        self.cost = cost
        keys = [self._key(place, True) for place in range(len(topology.nodes))]
        if len(set(keys)) > _MOST_SITES:
            keys = [self._key(place, False) for place in range(len(topology.nodes))]
        members: dict[object, list[int]] = {}
        for place, key in enumerate(keys):
            members.setdefault(key, []).append(place)
        self.nodes: tuple[NodeClass, ...] = tuple(self._node_class(tuple(places)) for places in members.values())
        self.class_of = {place: i for i, node in enumerate(self.nodes) for place in node.places}
        self.types: tuple[GroupType, ...] = tuple(
            GroupType(i, width, cost.profile(self._shape(node.places[0], width)))
            for i, node in enumerate(self.nodes)
            for width in node.widths
        )
        self.index = {(t.node_class, t.width): i for i, t in enumerate(self.types)}
        self.links = Links(cost, [t.profile for t in self.types])
        self._beside = self._between_nodes()
        self.pools: tuple[Pool, ...] = self._pools()
        self.everything = least_of(self.pools)
        # What a group takes: devices of each class, then halves of nodes where they say more: [rooms, types].
        halved = [k for k, node in enumerate(self.nodes) if node.count > 2]
        self.member = np.zeros((len(self.nodes) + len(halved), len(self.types)))
        for i, group in enumerate(self.types):
            self.member[group.node_class, i] = group.width
            if group.node_class in halved:
                row = len(self.nodes) + halved.index(group.node_class)
                self.member[row, i] = halves(group.width, self.nodes[group.node_class].count)
        entries = [self._entry(group) for group in self.types]
        self._entry_delay_s = np.array([hop[0] for hop in entries])
        self._entry_token_s = np.array([hop[1] for hop in entries])
        # Each node that a pipeline uses is entered once at least: a group's share of it.
        counts = [self.nodes[group.node_class].count for group in self.types]
        widths = [group.width for group in self.types]
        self._entered = np.array([1.0 if 2 * w > n else w / n for w, n in zip(widths, counts, strict=True)])
        self._devices: dict[Pool, Floats] = {}

    def longer_hops(self, pool: Pool) -> tuple[Floats, Floats]:
        """By how much a hop to a group of each type takes longer than the pool's shortest: delay and s/token.

        As a share of what entering its node takes longer (`entries`): the node's other groups bear the rest.
        """
        delay_s, token_s = self.entries(pool)
        return delay_s * self._entered, token_s * self._entered

    def entries(self, pool: Pool) -> tuple[Floats, Floats]:
        """By how much a hop from another node to a group of each type takes longer, at least."""
        return (
            np.maximum(self._entry_delay_s - pool.hop_delay_s, 0.0),
            np.maximum(self._entry_token_s - pool.hop_token_s, 0.0),
        )

    def devices(self, pool: Pool) -> Floats:
        """What the pool has of each row of ``member``; at least one, so that it can be divided by: [rooms]."""
        found = self._devices.get(pool)
        if found is None:
            most = (self.member * np.array(pool.available)).max(axis=1)
            found = self._devices[pool] = np.maximum(most, 1.0)
        return found

    def kinds(self, pool: Pool) -> list[Kind]:
        """The pool as the exact knapsack sees it."""
        devices = self.devices(pool)
        return [
            Kind(
                group.node_class,
                group.width,
                available,
                int(devices[group.node_class]),
                self.nodes[group.node_class].count,
            )
            for group, available in zip(self.types, pool.available, strict=True)
        ]

    # ---- building --------------------------------------------------------------------------------------------

    def _key(self, place: int, by_area: bool) -> object:
        node = self.topology.nodes[place]
        area = self.topology.areas[place] if by_area else None
        return node.device, node.count, node.link, node.price_usd_h, area

    def _shape(self, place: int, width: int) -> GroupShape:
        node = self.topology.nodes[place]
        return GroupShape((node.device,) * width, node.link)

    def _node_class(self, places: tuple[int, ...]) -> NodeClass:
        node = self.topology.nodes[places[0]]
        widest = min(node.count, self.cost.model.heads)
        widths = tuple(range(1, widest + 1)) if node.count <= _MANY_DEVICES else _few_widths(node.count, widest)
        patterns = _patterns(node.count, widths)
        return NodeClass(node.count, places, widths, patterns, node.price_usd_h or 0.0)

    def _pools(self) -> tuple[Pool, ...]:
        """Single nodes of several devices, sets of areas, and (where those are too many) everything."""
        areas: dict[str, list[int]] = {}
        for place, area in enumerate(self.topology.areas):
            areas.setdefault(area, []).append(place)
        found = [
            self._pool(node.places[:1], (0.0, 0.0, 0.0), 0)
            for node in self.nodes
            if node.count > 1 and len(areas[self.topology.areas[node.places[0]]]) > 1
        ]
        for names in area_sets(self.topology.areas):
            firsts = [areas[name][0] for name in names]
            places = tuple(place for name in names for place in areas[name])
            found.append(self._pool(places, crossing(self.topology, self.links, firsts), len(names) - 1))
        if needs_joint(self.topology.areas):
            firsts = [places[0] for places in areas.values()]
            everywhere = tuple(range(len(self.topology.nodes)))
            found.append(self._pool(everywhere, joint_crossing(self.topology, self.links, firsts), 1))
        distinct = {dataclasses.replace(pool, places=()): pool for pool in reversed(found)}
        return tuple(reversed(distinct.values()))

    def _pool(self, places: tuple[int, ...], crossing: tuple[float, float, float], crossings: int) -> Pool:
        hops = [self.links.least(link) for link in self._hops(places)]
        delay = min((hop.delay_s for hop in hops), default=0.0)
        token = min((hop.token_s for hop in hops), default=0.0)
        cycle = crossing[0] if crossings else delay
        return Pool(places, self._available(places), crossings, cycle, crossing[1], delay, token, crossing[2])

    def _hops(self, places: Sequence[int]) -> set[Link]:
        """Links between stages of one area: inside nodes of several devices, and between its nodes."""
        inside = {node.link for node in (self.topology.nodes[place] for place in places) if node.count > 1}
        nodes = Counter(self.topology.areas[place] for place in places)
        return inside | {self._beside[area] for area, number in nodes.items() if number > 1}

    def _between_nodes(self) -> dict[str, Link]:
        """The link between nodes of each area that has several."""
        first: dict[str, int] = {}
        found: dict[str, Link] = {}
        for place, area in enumerate(self.topology.areas):
            if area in first and area not in found:
                found[area] = self.topology.link(first[area], place)
            first.setdefault(area, place)
        return found

    def _entry(self, group: GroupType) -> tuple[float, float]:
        """Least delay and seconds a token of a hop from another node of its area to such a group."""
        areas = {self.topology.areas[place] for place in self.nodes[group.node_class].places}
        if not areas <= self._beside.keys():
            return 0.0, 0.0  # alone in its area: reached by a crossing only
        hops = [self.links.least(self._beside[area]) for area in areas]
        return min(hop.delay_s for hop in hops), min(hop.token_s for hop in hops)

    def _available(self, places: Sequence[int]) -> tuple[int, ...]:
        counts = [0] * len(self.nodes)
        for place in places:
            counts[self.class_of[place]] += 1
        return tuple(counts[t.node_class] * (self.nodes[t.node_class].count // t.width) for t in self.types)


def _few_widths(count: int, widest: int) -> tuple[int, ...]:
    for widths in _WIDTHS:
        chosen = tuple(sorted({*(width for width in widths if width <= widest), widest}))
        if len(_patterns(count, chosen)) <= _MOST_PATTERNS:
            return chosen
    return _WIDTHS[-1]


@lru_cache(maxsize=256)
def _patterns(count: int, widths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The ways to cut ``count`` devices into groups of these widths that leave no room for one more group."""
    found: list[tuple[int, ...]] = []

    def cut(left: int, i: int, taken: tuple[int, ...]) -> None:
        if i == 0:
            number = left // widths[0]
            found.append((number, *taken))
            return
        for number in range(left // widths[i], -1, -1):
            cut(left - number * widths[i], i - 1, (number, *taken))

    cut(count, len(widths) - 1, ())
    return tuple(found)
