"""Placements as graphs: which stage feeds which, how much flows, and by which paths (Helix, ASPLOS'25, section 4).

A stage feeds any other that holds the next layer, also when their ranges overlap (the second then uses only its
later layers). Tokens are prompt and output tokens alike. A stage lets through what it computes with all its
layers, an edge what its link carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.flow_bound import Rates, rates_of
from hexgen.scheduler.groups import Group
from hexgen.scheduler.solver import RouteSolver
from hexgen.scheduler.times import end_index

_SCALE = 1e6  # capacities become whole numbers (micro-tokens/s): preflow-push on floats may not end
_LEAST_SHARE = 1e-3  # of the flow: thinner paths are not worth a route
_MOST_ROUTES = 1024


@dataclass(frozen=True, slots=True)
class Placed:
    """A group and the layers that it holds."""

    group: Group
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Flow:
    """``paths``: tokens/s and the indices of the stages on the way; they carry ``tokens_s`` together."""

    tokens_s: float
    paths: tuple[tuple[float, tuple[int, ...]], ...]


class FlowSpace:
    """What stages and links let through, remembered."""

    def __init__(self, solver: RouteSolver) -> None:
        self.solver = solver
        self.layers = solver.cost.model.layers
        self._rates: dict[tuple[GroupShape, int], Rates] = {}
        self._links: dict[tuple[GroupShape, GroupShape, int, int], float] = {}

    def rates(self, shape: GroupShape, end: int) -> Rates:
        """Tokens/s by layers held, from one, as far as one mean request fits beside them."""
        found = self._rates.get((shape, end))
        if found is None:
            profile, traffic = self.solver.cost.profile(shape), self.solver.traffic
            found = self._rates[shape, end] = rates_of(profile, traffic, self.layers, traffic.peak_tokens, end)
        return found

    def tokens_s(self, placed: Placed) -> float:
        rates = self.rates(placed.group.shape, end_index(placed.start == 0, placed.end == self.layers))
        held = placed.end - placed.start
        return rates[held - 1] if held <= len(rates) else 0.0

    def link_tokens_s(self, a: Group, b: Group) -> float:
        key = (a.shape, b.shape, a.place, b.place)
        found = self._links.get(key)
        if found is None:
            cost = self.solver.cost
            link = self.solver.topology.link(a.place, b.place)
            found = self._links[key] = 1 / cost.edge(cost.profile(a.shape), cost.profile(b.shape), link).token_s
        return found


def max_flow(space: FlowSpace, placed: Sequence[Placed]) -> Flow:
    """The largest flow through this placement, as paths."""
    graph = nx.DiGraph()
    starting: dict[int, list[int]] = {}  # stages that could go on at a layer
    for i, stage in enumerate(placed):
        graph.add_edge(("in", i), ("out", i), capacity=int(space.tokens_s(stage) * _SCALE))
        for layer in range(stage.start, stage.end):
            starting.setdefault(layer, []).append(i)
    for i, stage in enumerate(placed):
        if stage.start == 0:
            graph.add_edge("source", ("in", i))
        if stage.end == space.layers:
            graph.add_edge(("out", i), "sink")
        for j in starting.get(stage.end, []):
            capacity = int(space.link_tokens_s(stage.group, placed[j].group) * _SCALE)
            graph.add_edge(("out", i), ("in", j), capacity=capacity)
    if "source" not in graph or "sink" not in graph:
        return Flow(0.0, ())
    value, flow = nx.maximum_flow(graph, "source", "sink")
    paths = flow_paths(flow, float(value))
    return Flow(sum(amount for amount, _ in paths) / _SCALE, tuple((a / _SCALE, tuple(p)) for a, p in paths))


def flow_paths(flow: dict[object, dict[object, int]], value: float) -> list[tuple[float, list[int]]]:
    """The flow as paths, widest first; what is thinner than a share of it is left out."""
    left = {a: {b: amount for b, amount in targets.items() if amount > 0} for a, targets in flow.items()}
    paths: list[tuple[float, list[int]]] = []
    while len(paths) < _MOST_ROUTES:
        here: object = "source"
        walk: list[object] = ["source"]
        while here != "sink":
            targets = left.get(here, {})
            if not targets:
                break
            here = max(targets, key=lambda b: (targets[b], str(b)))
            walk.append(here)
        if here != "sink":
            break
        amount = min(left[a][b] for a, b in pairwise(walk))
        for a, b in pairwise(walk):
            left[a][b] -= amount
            if left[a][b] == 0:
                del left[a][b]
        if amount >= _LEAST_SHARE / max(1, len(paths)) * value:
            stages = [point[1] for point in walk if isinstance(point, tuple) and point[0] == "in"]
            paths.append((float(amount), stages))
    return paths
