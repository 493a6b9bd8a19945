"""Where one pipeline may run: sets of areas, with the least that travelling between its stages costs there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations

from hexgen.cluster import Link
from hexgen.scheduler.cost import CostModel, EdgeCost, StageProfile
from hexgen.scheduler.groups import Topology

_EVERY_SUBSET = 3  # areas: up to this many, every set of them is a pool
_EVERY_PAIR = 8


@dataclass(frozen=True, slots=True)
class Pool:
    """Nodes that one pipeline uses, at least one of each of its areas.

    ``crossings``: areas - 1. ``cycle_delay_s``: of the crossings and the tokens' way home. ``crossing_token_s``:
    seconds that one token's hidden states spend on the crossings. ``hop_delay_s``, ``hop_token_s``: of any other
    hop between stages. ``bottleneck_token_s``: of the slowest crossing. All are least values.
    """

    places: tuple[int, ...]
    available: tuple[int, ...]  # groups of each type, if nothing else used the nodes
    crossings: int
    cycle_delay_s: float
    crossing_token_s: float
    hop_delay_s: float
    hop_token_s: float
    bottleneck_token_s: float

    def link_s(self, depth: int, tokens: float) -> float:
        """Seconds that a step of ``tokens`` keeps the busiest link at least."""
        inside = self.hop_token_s if depth - 1 > self.crossings else 0.0
        return tokens * max(self.bottleneck_token_s, inside)

    def travel_s(self, depth: int, tokens: float) -> float:
        """Seconds that a step of ``tokens`` travels at least, once round a pipeline of ``depth`` stages."""
        hops = max(0, depth - 1 - self.crossings)
        return (
            self.cycle_delay_s
            + tokens * self.crossing_token_s
            + hops * (self.hop_delay_s + tokens * self.hop_token_s)
        )


class Links:
    """The least cost of a link between any two profiles of the cluster; remembered."""

    def __init__(self, cost: CostModel, profiles: Sequence[StageProfile]) -> None:
        self._cost = cost
        self._profiles = list({profile.figures: profile for profile in profiles}.values())
        self._known: dict[Link, EdgeCost] = {}

    def least(self, link: Link) -> EdgeCost:
        found = self._known.get(link)
        if found is None:
            costs = [self._cost.edge(a, b, link) for a in self._profiles for b in self._profiles]
            found = EdgeCost(min(c.delay_s for c in costs), min(c.token_s for c in costs))
            self._known[link] = found
        return found


def area_sets(areas: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Sets of areas that are looked at one by one; where there are many, one stands for all larger sets."""
    names = list(dict.fromkeys(areas))
    most = len(names) if len(names) <= _EVERY_SUBSET else 2 if len(names) <= _EVERY_PAIR else 1
    for size in range(1, most + 1):
        yield from combinations(names, size)


def needs_joint(areas: Sequence[str]) -> bool:
    """Whether `area_sets` leaves larger sets out, which one optimistic pool of everything must stand for."""
    return len(set(areas)) > _EVERY_SUBSET


def crossing(topology: Topology, links: Links, firsts: Sequence[int]) -> tuple[float, float, float]:
    """(delay of the shortest cycle, least seconds a token, bottleneck) through these areas, one node of each."""
    if len(firsts) == 1:
        return 0.0, 0.0, 0.0
    start, rest = firsts[0], firsts[1:]
    cost = {(a, b): links.least(topology.link(a, b)) for i, a in enumerate(firsts) for b in firsts[i + 1 :]}
    cost |= {(b, a): edge for (a, b), edge in cost.items()}
    delay = token = bottleneck = float("inf")
    for order in permutations(rest):
        cycle = [cost[a, b] for a, b in pairwise((start, *order, start))]
        delay = min(delay, sum(edge.delay_s for edge in cycle))
        # The way home carries no hidden states: the costliest edge of the cycle may be that.
        seconds = sorted(edge.token_s for edge in cycle)[:-1]
        token, bottleneck = min(token, sum(seconds)), min(bottleneck, seconds[-1])
    return delay, token, bottleneck


def joint_crossing(topology: Topology, links: Links, firsts: Sequence[int]) -> tuple[float, float, float]:
    """A lower bound on `crossing` for every set of at least two of these areas."""
    edges = {topology.link(a, b) for i, a in enumerate(firsts) for b in firsts[i + 1 :]}
    costs = [links.least(link) for link in edges]
    token = min(edge.token_s for edge in costs)
    return 2 * min(edge.delay_s for edge in costs), token, token


def least_of(pools: Sequence[Pool]) -> Pool:
    """One pool that no pipeline does worse in: the most devices and the least of every figure."""
    available = tuple(max(p.available[t] for p in pools) for t in range(len(pools[0].available)))
    hop = min(pool.hop_delay_s for pool in pools), min(pool.hop_token_s for pool in pools)
    return Pool((), available, 0, min(pool.cycle_delay_s for pool in pools), 0.0, *hop, 0.0)
