"""The best plan with shared stages, and the front between what is served and how quickly it is answered."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from hexgen.errors import HexgenError
from hexgen.plan import Plan
from hexgen.scheduler.best import computing_alike, finish, solver_for
from hexgen.scheduler.lanes.kinds import Shape, kinds_of, orders
from hexgen.scheduler.lanes.model import Pace, served
from hexgen.scheduler.lanes.program import Program
from hexgen.scheduler.lanes.ways import Space, concurrency, passable, plan_of, ways_of
from hexgen.scheduler.task import Task
from hexgen.workload import Slo

_ORDERS = 6
_RATES = 7  # of the halving of the rate's interval
_FINISHED = 8  # shapes whose plans are made and predicted
_MOST_MACHINES = 256
# Predictions nearer to each other than this do not say which plan serves more; then the quicker one is taken.
_NEAR = 0.92


@dataclass(frozen=True, slots=True)
class Point:
    """One shape: what it serves when asked for all it can, and how quickly."""

    shape: Shape
    space: Space
    pace: Pace
    most: float  # requests at once

    @property
    def tokens_s(self) -> float:
        return self.pace.requests_s * self.space.solver.traffic.output

    def plan(self, task: Task, objective: str = "throughput") -> Plan:
        """Checked, with the evaluator's prediction. Raises ``InfeasibleError`` where it does not start."""
        return finish(task, plan_of(self.space, self.shape, task), objective)


def best_lanes(task: Task, objective: str = "throughput") -> Plan | None:
    """The plan of shared stages that is predicted to serve most, or the quickest of about as much.

    With the objective ``slo``, what keeps the workload's limits counts. One series of ranges over all machines,
    for clusters of up to some hundred: larger ones are better cut into several. None where nothing fits.
    """
    limited = objective in ("slo", "cost") and task.workload.slo != Slo()
    points = sorted(_points(task, limited), key=lambda point: -point.pace.requests_s)
    near = [point for point in points if point.pace.requests_s >= _NEAR * points[0].pace.requests_s]
    tried = dict.fromkeys([*points[:_FINISHED], *sorted(near, key=lambda point: point.pace.trip_s)[:_FINISHED]])
    made: list[tuple[float, float, Plan]] = []
    for point in tried:
        try:
            plan = point.plan(task, objective)
        except HexgenError:
            continue  # an engine's buffers, or a page more, do not fit: the next shape
        if plan.predicted is not None:
            made.append((plan.predicted.tokens_s, point.pace.trip_s, plan))
    most = max((tokens_s for tokens_s, _, _ in made), default=0.0)
    quick = min((m for m in made if m[0] >= _NEAR * most), key=lambda m: (m[1], -m[0]), default=None)
    return None if quick is None else quick[2]


def front(task: Task) -> tuple[Point, ...]:
    """Shapes that no other beats in both tokens/s and mean time of a decode, most tokens/s first."""
    found: list[Point] = []
    for point in sorted(_points(task, False), key=lambda p: (-p.pace.requests_s, p.pace.trip_s)):
        if not found or point.pace.trip_s < found[-1].pace.trip_s * (1 - 1e-9):
            found.append(point)
    return tuple(found)


def _points(task: Task, limited: bool) -> list[Point]:
    """Every shape that the search came by, priced."""
    found: list[Point] = []
    for nodes in computing_alike(task.cluster.nodes, task.options):
        solver = solver_for(task, nodes, "throughput")
        kinds = kinds_of(solver)
        if not kinds or sum(len(kind.groups) for kind in kinds) > _MOST_MACHINES:
            continue
        found += _Search(task, Space(solver, tuple(kinds)), limited).points()
    return found


class _Search:
    def __init__(self, task: Task, space: Space, limited: bool) -> None:
        self.task, self.space, self.limited = task, space, limited
        self.program = Program(space)
        self.known: dict[Shape, Point | None] = {}
        self.best = 0.0

    def points(self) -> list[Point]:
        topology = self.space.solver.topology
        for order in orders(self.space.kinds, topology, _ORDERS):
            low, high = self.best * 1.001, float(max(self.program.limit, default=0.0))
            for _ in range(_RATES):
                if self.task.deadline is not None and time.monotonic() > self.task.deadline and self.best > 0:
                    break
                middle = math.sqrt(low * high) if low > 0 else high / 4
                reached = self._try(order, middle)
                # Beyond the rate that any shape reaches, shapes for it are no better: look lower.
                if reached >= middle * (1 - 1e-6):
                    low = max(low, reached)
                else:
                    high = middle
                    low = min(low, max(reached, self.best)) if self.best else low
        return [point for point in self.known.values() if point is not None]

    def _try(self, order: tuple[int, ...], requests_s: float) -> float:
        reached = 0.0
        for shape in self.program.shapes(order, requests_s):
            if shape not in self.known:
                self.known[shape] = self._price(shape)
            point = self.known[shape]
            if point is not None:
                reached = max(reached, point.pace.requests_s)
        self.best = max(self.best, reached)
        return reached

    def _price(self, shape: Shape) -> Point | None:
        if not passable(self.space, shape):
            return None
        most = concurrency(self.space, shape)
        if most < 1:
            return None
        pace = served(ways_of(self.space, shape), self.space.solver.traffic, most, self.limited)
        return Point(shape, self.space, pace, most) if pace.requests_s > 0 else None
