"""The best route through a given set of groups: their order, and the layers of each. All is remembered.

Two sets of groups that differ only in which of several equal nodes they use are the same problem, solved once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from hexgen.cluster import Link
from hexgen.scheduler.cost import CostModel, EdgeCost, StageProfile
from hexgen.scheduler.groups import Group, Topology
from hexgen.scheduler.layers import (
    EXHAUSTIVE,
    NORMAL,
    QUICK,
    Chain,
    Division,
    divide_for_latency,
    divide_for_throughput,
    divide_within_limits,
)
from hexgen.scheduler.traffic import Traffic

Goal = Literal["throughput", "latency", "slo"]
Order = tuple[int, ...]
Rank = tuple[str, int, tuple[float, ...], int]

_ALL_ORDERS = 4  # groups: up to this many, every order is tried
_DECIDED_ORDERS = 2  # of more, the best after a quick look are worked out
_TIE = 1e-12  # relative: an order that is better by less is not better
_ENDS = 2  # profiles tried at each end of a longer route
_STARTS = 4  # areas tried as the first on a longer route


@dataclass(frozen=True, slots=True)
class Solution:
    """The best route found through a set of groups."""

    groups: tuple[Group, ...]  # path order
    division: Division
    value: float  # larger is better; comparable within one goal

    @property
    def width(self) -> int:
        return sum(group.width for group in self.groups)


class RouteSolver:
    """Solves routes for one goal over one topology, cost model and traffic."""

    def __init__(
        self, topology: Topology, cost: CostModel, traffic: Traffic, goal: Goal, *, exhaustive: bool = False
    ) -> None:
        self.topology, self.cost, self.traffic, self.goal = topology, cost, traffic, goal
        self.exhaustive = exhaustive
        self.solved = 0  # routes worked out, not remembered: what a search's budget counts
        self.found: list[Solution] = []  # routes worked out, in that order: what a packing may choose from
        self._memory: dict[object, tuple[Order, Division, float] | None] = {}
        self._links: dict[tuple[int, int, Link, bool], EdgeCost] = {}
        self._ranks: dict[int, Rank] = {}

    def best(self, groups: Sequence[Group]) -> Solution | None:
        """The best route that uses every one of ``groups``; None where the model does not fit in them so."""
        if not groups or len(groups) > self.cost.model.layers:
            return None
        profiles = [self.cost.profile(group.shape) for group in groups]
        ranks = [self._rank(profile) for profile in profiles]
        ordered = sorted(range(len(groups)), key=lambda i: (ranks[i], groups[i].place, groups[i].devices))
        groups = [groups[i] for i in ordered]
        profiles = [profiles[i] for i in ordered]
        key = self._key(groups, profiles)
        if key not in self._memory:
            self.solved += 1
            self._memory[key] = self._solve(groups, profiles)
            if (new := self._solution(groups, self._memory[key])) is not None:
                self.found.append(new)
        return self._solution(groups, self._memory[key])

    def _rank(self, profile: StageProfile) -> Rank:
        """Profiles are numbered as they are met; ranks put them in an order that no history changes."""
        found = self._ranks.get(profile.id)
        if found is None:
            shape = profile.shape
            found = shape.devices[0].name, shape.width, shape.shares or (), profile.id
            self._ranks[profile.id] = found
        return found

    def thorough(self, known: Solution) -> Solution:
        """The same groups in the best of all orders that `best` looks at, for routes that a plan is made of.

        `best` works out only those that seem best at one concurrency, where many seem alike if memory binds.
        """
        groups = known.groups
        profiles = [self.cost.profile(group.shape) for group in groups]
        best = known
        for order in self._orders(groups, profiles):
            found = self._try(groups, order, NORMAL)
            if found is not None and found[2] > best.value + _TIE * abs(best.value):
                best = Solution(tuple(groups[i] for i in order), found[1], found[2])
        return best

    def _solution(self, groups: Sequence[Group], found: tuple[Order, Division, float] | None) -> Solution | None:
        if found is None:
            return None
        order, division, value = found
        return Solution(tuple(groups[i] for i in order), division, value)

    def chain(self, groups: Sequence[Group]) -> Chain:
        """The groups in path order, with what joins them."""
        profiles = [self.cost.profile(group.shape) for group in groups]
        places = [group.place for group in groups]
        edges = tuple(
            self._edge(profiles[i], profiles[i + 1], self.topology.link(places[i], places[i + 1]), False)
            for i in range(len(groups) - 1)
        )
        back = None
        if len(groups) > 1:
            back = self._edge(profiles[-1], profiles[0], self.topology.link(places[-1], places[0]), True)
        return Chain(tuple(profiles), edges, back)

    def divide(self, chain: Chain, effort: int) -> Division | None:
        layers, traffic = self.cost.model.layers, self.traffic
        if self.goal == "latency":
            return divide_for_latency(chain, layers, traffic, effort)
        if self.goal == "slo":
            return divide_within_limits(chain, layers, traffic, effort)
        return divide_for_throughput(chain, layers, traffic, effort)

    def value(self, division: Division) -> float:
        return -division.alone.latency_s if self.goal == "latency" else division.steady.tokens_s

    def _edge(self, a: StageProfile, b: StageProfile, link: Link, back: bool) -> EdgeCost:
        key = (a.id, b.id, link, back)
        found = self._links.get(key)
        if found is None:
            found = self.cost.token_edge(a, b, link) if back else self.cost.edge(a, b, link)
            self._links[key] = found
        return found

    def _key(self, groups: Sequence[Group], profiles: Sequence[StageProfile]) -> object:
        """What decides the answer: the profiles, who shares a node with whom, and the links between areas."""
        nodes: dict[int, int] = {}
        areas: dict[str, int] = {}
        first: list[int] = []
        described: list[tuple[int, int, int]] = []
        for group, profile in zip(groups, profiles, strict=True):
            area = self.topology.areas[group.place]
            if area not in areas:
                areas[area] = len(areas)
                first.append(group.place)
            described.append((profile.id, nodes.setdefault(group.place, len(nodes)), areas[area]))
        between = tuple(self.topology.link(a, b) for i, a in enumerate(first) for b in first[i + 1 :])
        # Within an area: the link of two different nodes, if there are two.
        second: dict[int, Link] = {}
        for place in nodes:
            area_index = areas[self.topology.areas[place]]
            if place != first[area_index] and area_index not in second:
                second[area_index] = self.topology.link(first[area_index], place)
        return tuple(described), between, tuple(sorted(second.items()))

    def _solve(
        self, groups: Sequence[Group], profiles: Sequence[StageProfile]
    ) -> tuple[Order, Division, float] | None:
        orders = list(self._orders(groups, profiles))
        effort = EXHAUSTIVE if self.exhaustive else NORMAL
        if not self.exhaustive and len(orders) > _DECIDED_ORDERS:
            ranked = sorted(
                (-found[2], i) for i, order in enumerate(orders) if (found := self._try(groups, order, QUICK))
            )
            orders = [orders[i] for _, i in ranked[:_DECIDED_ORDERS]]
        best: tuple[Order, Division, float] | None = None
        for order in orders:
            found = self._try(groups, order, effort)
            if found is not None and (best is None or found[2] > best[2] + _TIE * abs(best[2])):
                best = found
        return best

    def _try(self, groups: Sequence[Group], order: Order, effort: int) -> tuple[Order, Division, float] | None:
        if not self.topology.passable([groups[i].place for i in order]):
            return None
        division = self.divide(self.chain([groups[i] for i in order]), effort)
        return None if division is None else (order, division, self.value(division))

    def _orders(self, groups: Sequence[Group], profiles: Sequence[StageProfile]) -> Iterator[Order]:
        n = len(groups)
        if n <= _ALL_ORDERS or self.exhaustive:
            seen: set[tuple[tuple[int, int], ...]] = set()
            for order in permutations(range(n)):
                signature = tuple((profiles[i].id, groups[i].place) for i in order)
                if signature not in seen:
                    seen.add(signature)
                    yield order
            return
        yield from self._area_orders(groups, profiles)

    def _area_orders(self, groups: Sequence[Group], profiles: Sequence[StageProfile]) -> Iterator[Order]:
        """Area by area, each next one the nearest; within an area node by node. Then other ends."""
        by_area: dict[str, list[int]] = {}
        for i, group in enumerate(groups):
            by_area.setdefault(self.topology.areas[group.place], []).append(i)
        for members in by_area.values():
            lead = {groups[i].place: self._rank(profiles[i]) for i in members}
            members.sort(key=lambda i: (lead[groups[i].place], groups[i].place, groups[i].devices))
        names = list(by_area)
        seen: set[Order] = set()
        for start in names[:_STARTS]:
            path = self._nearest(start, {name: groups[by_area[name][0]].place for name in names})
            base = [i for name in path for i in by_area[name]]
            for order in _with_ends(base, by_area[path[0]], by_area[path[-1]], groups, profiles):
                if order not in seen:
                    seen.add(order)
                    yield order

    def _nearest(self, start: str, places: dict[str, int]) -> list[str]:
        path, left = [start], [name for name in places if name != start]
        while left:
            here = places[path[-1]]
            nearest = min(left, key=lambda name: _slowness(self.topology.link(here, places[name])))
            path.append(nearest)
            left.remove(nearest)
        return path


def _slowness(link: Link) -> float:
    return link.latency_s + 1e6 / link.bandwidth_bytes_s  # seconds of a message of one megabyte


def _with_ends(
    base: list[int],
    first_area: Sequence[int],
    last_area: Sequence[int],
    groups: Sequence[Group],
    profiles: Sequence[StageProfile],
) -> Iterator[Order]:
    """The order itself, then with other first and last stages: one of each profile of the areas at the ends.

    A stage that becomes an end takes its node along: alone it would cost two more ways between nodes.
    """
    firsts = [base[0], *_one_each(first_area, profiles)][: _ENDS + 1]
    lasts = [base[-1], *_one_each(tuple(reversed(last_area)), profiles)][: _ENDS + 1]
    for first in firsts:
        for last in lasts:
            if first == last:
                if len(base) == 1:
                    yield (first,)
                continue
            start, end = groups[first].place, groups[last].place
            # With both ends in one node, the rest of it stays with the first.
            inner = [i for i in base if i not in (first, last)]
            front = [i for i in inner if groups[i].place == start]
            back = [i for i in inner if groups[i].place == end != start]
            middle = [i for i in inner if groups[i].place not in (start, end)]
            yield (first, *front, *middle, *back, last)


def _one_each(members: Sequence[int], profiles: Sequence[StageProfile]) -> list[int]:
    return list({profiles[i].id: i for i in reversed(members)}.values())
