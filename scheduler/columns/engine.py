"""Column generation: from a few pipelines to the best packing, with a bound that no packing exceeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hexgen.scheduler.columns.classes import Classes
from hexgen.scheduler.columns.master import Column, Relaxed, SolverError, choose, relax
from hexgen.scheduler.columns.place import place, typical
from hexgen.scheduler.columns.pricing import Priced, Pricer
from hexgen.scheduler.deadline import part_until, passed, seconds_left
from hexgen.scheduler.groups import Group, islands
from hexgen.scheduler.improve import Partition, make_partition
from hexgen.scheduler.solver import RouteSolver, Solution

# Pipelines worth more than this times their price are looked for, then those worth more than the next: a search
# that need not tell small ratios apart is quick, and what it leaves out is in the bound.
_FLOORS = (1.03, 1.01, 1.002)
_A_ROUND = 8  # pipelines that a round adds
_FOR_FINDING, _FOR_PROVING = 0.6, 0.9  # of the time, when they end; the rest is for the choice in whole numbers
_LEAST_S = 0.5  # that the choice is given, where any time is left
_MOST_COLUMNS = 1500  # in the whole-numbered program: the best for their price

Note = Callable[[float], None]  # told the bound so far


@dataclass(frozen=True, slots=True)
class Packed:
    """The best packing found, and tokens/s that no packing of disjoint pipelines exceeds (``inf``: not known)."""

    partition: Partition | None
    bound: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Effort:
    """``rounds`` of pricing at most, each looking into ``looks`` boxes at most, all together working out ``work``
    numbers at most, until ``deadline``. ``columns``: that the choice in whole numbers is made from at most."""

    rounds: int
    looks: int
    work: float
    deadline: float | None = None  # of time.monotonic()
    columns: int = _MOST_COLUMNS


class _Columns:
    """Distinct columns, in the order in which they were found."""

    def __init__(self, classes: Classes, solver: RouteSolver) -> None:
        self.classes, self.solver = classes, solver
        self.all: list[Column] = []
        self._seen: dict[tuple[tuple[int, int], ...], int] = {}
        self._tried: set[tuple[tuple[int, int], ...]] = set()

    def add(self, solution: Solution) -> None:
        """Keep it if it is new, or better than the one known with the same groups."""
        kinds = self._kinds(solution.groups)
        if kinds is None or solution.value <= 0:
            return
        uses = tuple(sorted(Counter(kinds).items()))
        self._tried.add(uses)
        at = self._seen.get(uses)
        if at is None:
            self._seen[uses] = len(self.all)
            self.all.append(Column(uses, solution.value))
        elif solution.value > self.all[at].value:
            self.all[at] = Column(uses, solution.value)

    def known(self, types: Sequence[int]) -> bool:
        return tuple(sorted(Counter(types).items())) in self._tried

    def priced(self, found: Priced) -> None:
        self._tried.add(tuple(sorted(Counter(found.types).items())))
        groups = typical(self.classes, found.types, found.pool)
        solution = self.solver.best(groups) if groups else None
        if solution is not None:
            self.add(solution)  # also when it was known under other groups' names

    def _kinds(self, groups: Iterable[Group]) -> list[int] | None:
        """The groups' types; None where one spans nodes, or has a width that the classes leave out."""
        kinds: list[int] = []
        for group in groups:
            if len({device.rsplit("/", 1)[0] for device in group.devices}) > 1:
                return None
            kind = self.classes.index.get((self.classes.class_of[group.place], group.width))
            if kind is None:
                return None
            kinds.append(kind)
        return kinds


def pack(solver: RouteSolver, effort: Effort, note: Note | None = None, *, whole: bool = True) -> Packed:
    """The best packing of all pipelines that ``solver`` has worked out, and of those that pricing adds.

    For throughput, or within the limits (the solver's goal ``slo``). ``whole``: False for the bound alone.
    Raises `SolverError`.
    """
    classes = Classes(solver.topology, solver.cost)
    columns = _Columns(classes, solver)
    nodes = [len(node.places) for node in classes.nodes]
    bound, done = math.inf, 0
    layers, limited = solver.cost.model.layers, solver.goal == "slo"
    pricer = Pricer(
        classes,
        solver.traffic,
        layers,
        limited=limited,
        looks=effort.looks,
        work=effort.work,
    )
    finding, proving = (part_until(effort.deadline, share) for share in (_FOR_FINDING, _FOR_PROVING))
    seen, floor = 0, 0
    while True:
        for solution in solver.found[seen:]:
            columns.add(solution)
        seen = len(solver.found)
        if done >= effort.rounds or passed(finding) or not columns.all or pricer.work <= pricer.reserve:
            break
        done += 1
        relaxed = relax(classes, columns.all, nodes)
        factor, found = pricer.best(relaxed.prices, _FLOORS[floor], columns.known, _A_ROUND, finding)
        bound = min(bound, factor * _worth(relaxed, nodes))
        if note is not None:
            note(bound)
        if not found:
            floor += 1
            if floor == len(_FLOORS):
                break
        for pipeline in found:
            columns.priced(pipeline)
    if effort.rounds and floor < len(_FLOORS) and columns.all and not passed(proving):
        relaxed = relax(classes, columns.all, nodes)
        factor, found = pricer.prove(relaxed.prices, _FLOORS[floor], columns.known, proving)
        bound = min(bound, factor * _worth(relaxed, nodes))
        for pipeline in found:
            columns.priced(pipeline)
    proven = bound if _complete(classes, solver) else math.inf
    try:
        packing = _packing(classes, columns.all, solver, nodes, effort) if whole else None
    except SolverError:  # no choice in the time that was left takes nothing from what was proven
        packing = None
    return Packed(packing, proven, done)


def _worth(relaxed: Relaxed, nodes: Sequence[int]) -> float:
    """All nodes at their prices: the relaxation's value, by duality."""
    return sum(price * number for price, number in zip(relaxed.node_prices, nodes, strict=True))


def _complete(classes: Classes, solver: RouteSolver) -> bool:
    """Whether the columns' space is the whole space: no groups across nodes, no widths left out."""
    every = all(len(node.widths) == min(node.count, solver.cost.model.heads) for node in classes.nodes)
    return every and not islands(solver.topology)


def _packing(
    classes: Classes, columns: Sequence[Column], solver: RouteSolver, nodes: Sequence[int], effort: Effort
) -> Partition | None:
    seconds = seconds_left(effort.deadline)
    if not columns or seconds == 0:
        return None
    if len(columns) > effort.columns:
        prices = relax(classes, columns, nodes).prices
        worth = {column: column.value / sum(prices[t] * n for t, n in column.uses) for column in columns}
        columns = sorted(columns, key=lambda column: -worth[column])[: effort.columns]
    pipelines, spare = place(
        classes, columns, choose(classes, columns, nodes, None if seconds is None else max(_LEAST_S, seconds))
    )
    routes: list[Solution] = []
    for groups in pipelines:
        solution = solver.best(groups)
        if solution is None:
            spare.extend(groups)
        else:
            routes.append(solution)
    return make_partition(solver, routes, spare) if routes else None
