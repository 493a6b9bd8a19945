"""A plan as the simulator walks it: routes over numbered stages and links, and the seconds of each step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, cast

from hexgen.batching.limits import BatchLimits
from hexgen.cluster import Cluster
from hexgen.memory import plan_memory
from hexgen.model import ModelSpec
from hexgen.plan import Plan, Route
from hexgen.scheduler.cost import CostModel, EdgeCost, StageProfile
from hexgen.scheduler.evaluate import group_shape
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.residency import tabled_kv_tokens
from hexgen.scheduler.simulation.step import CountedStep, Windows
from hexgen.scheduler.tables.source import CostTable
from hexgen.scheduler.traffic import StepLoad

# Seconds of a decode step are taken linear in the positions it attends to, within cells of this many a sequence.
# Rooflines are linear but for a few kinks; a cell with a kink in it is off by less than a step's change over it.
CELL_TOKENS = 256

PartKey = tuple[StageProfile, int, bool, bool]  # profile, layers, embeds, samples


class StepClock:
    """Seconds of a route's steps on each of its stages."""

    def __init__(self, parts: tuple[PartKey, ...]) -> None:
        self.distinct = tuple(dict.fromkeys(parts))
        self.place = tuple(self.distinct.index(part) for part in parts)  # of each stage's
        self._cells: dict[tuple[int, int], tuple[tuple[float, float], ...]] = {}
        self._nothing = [0.0] * len(parts)

    def seconds(self, step: CountedStep) -> list[float]:
        """For each stage of the route, in its order. A step without segments passes through: no model runs."""
        if step.sequences == 0:
            return self._nothing
        if not step.plain:
            return self.of_load(cast(StepLoad, step))
        size, seen = step.sequences, step.attended
        return [base + slope * seen for base, slope in self.cell(size, int(seen / (size * CELL_TOKENS)))]

    def cell(self, size: int, number: int) -> tuple[tuple[float, float], ...]:
        """For each stage: seconds of ``size`` decodes at no position seen, and for each; in that cell."""
        found = self._cells.get((size, number))
        if found is None:
            found = self._cells[size, number] = self._line(size, number)
        return found

    def line(self, size: int, seen: float) -> tuple[tuple[float, float], float]:
        """Of decodes on the route's first stage: seconds at no position seen and for each; and the number of
        positions below which these hold.
        """
        number = int(seen / (size * CELL_TOKENS))
        return self.cell(size, number)[0], (number + 1) * size * CELL_TOKENS

    def _line(self, size: int, number: int) -> tuple[tuple[float, float], ...]:
        low, high = number * size * CELL_TOKENS, (number + 1) * size * CELL_TOKENS
        first, last = (self.of_load(_decodes(size, seen)) for seen in (low, high))
        slopes = [(b - a) / (high - low) for a, b in zip(first, last, strict=True)]
        return tuple((a - slope * low, slope) for a, slope in zip(first, slopes, strict=True))

    def of_load(self, load: StepLoad) -> list[float]:
        """As the cost model has it."""
        found = [p.step_s(layers, load, embeds, samples) for p, layers, embeds, samples in self.distinct]
        return [found[i] for i in self.place]


def _decodes(size: int, seen: float) -> StepLoad:
    return StepLoad(float(size), float(seen), float(seen), float(size), float(size))


class Leg(NamedTuple):
    """A stage, and the link to the next (-1: it is the last). ``waits``: the next serves other routes too."""

    hop: int
    stage: int
    link: int
    token_s: float
    delay_s: float
    waits: bool


@dataclass(frozen=True, slots=True)
class RoutePath:
    """One route: its stages and links by number, and what moves on them."""

    weight: float
    limits: BatchLimits
    stages: tuple[int, ...]
    links: tuple[int, ...]  # one fewer
    edges: tuple[EdgeCost, ...]
    back: EdgeCost
    clock: StepClock
    waits: tuple[bool, ...]  # the stage also serves other routes: who comes first is known only then

    legs: tuple[Leg, ...] = field(init=False)

    def __post_init__(self) -> None:
        last = len(self.stages) - 1
        legs = [
            Leg(i, stage, self.links[i], self.edges[i].token_s, self.edges[i].delay_s, self.waits[i + 1])
            if i < last
            else Leg(i, stage, -1, 0.0, 0.0, False)
            for i, stage in enumerate(self.stages)
        ]
        object.__setattr__(self, "legs", tuple(legs))

    @property
    def lone(self) -> bool:
        """One stage, which nobody else uses."""
        return self.waits == (False,)


@dataclass(frozen=True, slots=True)
class Layout:
    stages: tuple[str, ...]  # names, in the order of the plan
    links: int
    routes: tuple[RoutePath, ...]
    windows: Windows


def layout_of(plan: Plan, cluster: Cluster, model: ModelSpec, cost_table: CostTable | None = None) -> Layout:
    """The plan with the evaluator's own figures. Raises ``InfeasibleError`` where it does not fit into memory."""
    memory = plan_memory(plan, cluster, model)
    cost = CostModel(model, memory.dtype, plan.engine, cost_table)
    topology = Topology(cluster)
    devices = {device.id: device for device in cluster.devices()}
    profiles = {stage.name: cost.profile(group_shape(stage, topology, devices)) for stage in plan.stages}
    places = {stage.name: topology.index[devices[stage.devices[0]].node] for stage in plan.stages}
    kv_tokens = memory.kv_tokens
    if cost_table is not None and cost_table.holds_kv:
        kv_tokens = tabled_kv_tokens(plan, profiles, model)
    numbers = {stage.name: i for i, stage in enumerate(plan.stages)}
    links: dict[tuple[str, str], int] = {}
    uses = Counter(hop.stage for route in plan.routes for hop in route.path)
    windows = Counter(model.sliding_windows)

    def path_of(route: Route, kv: int) -> RoutePath:
        names = [hop.stage for hop in route.path]
        last = len(names) - 1
        pairs = list(pairwise(names))
        for pair in pairs:
            links.setdefault(pair, len(links))
        parts = tuple(
            (profiles[hop.stage], hop.layers[1] - hop.layers[0], i == 0, i == last)
            for i, hop in enumerate(route.path)
        )
        first, end = names[0], names[-1]
        return RoutePath(
            weight=route.weight,
            limits=_limits(plan, model, kv, len(names)),
            stages=tuple(numbers[name] for name in names),
            links=tuple(links[pair] for pair in pairs),
            edges=tuple(
                cost.edge(profiles[a], profiles[b], topology.link(places[a], places[b])) for a, b in pairs
            ),
            back=cost.token_edge(profiles[end], profiles[first], topology.link(places[end], places[first]))
            if last
            else EdgeCost(0.0, 0.0),
            clock=StepClock(parts),
            waits=tuple(uses[name] > 1 for name in names),
        )

    routes = tuple(path_of(route, kv) for route, kv in zip(plan.routes, kv_tokens, strict=True))
    moving = any(window is not None for window in windows)
    return Layout(tuple(numbers), len(links), routes, tuple(windows.items()) if moving else ())


def _limits(plan: Plan, model: ModelSpec, kv_tokens: int, depth: int) -> BatchLimits:
    """As a worker gives them to its batcher. The prefix cache is off: simulated prompts have nothing in common."""
    engine = plan.engine
    return BatchLimits(
        pages=kv_tokens // engine.page_size,
        page_size=engine.page_size,
        token_budget=engine.token_budget,
        max_sequences=engine.max_sequences,
        max_context=engine.max_context or model.max_context,
        depth=depth,
        prefix_cache=False,
    )
