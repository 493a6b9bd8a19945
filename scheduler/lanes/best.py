"""The best plan with shared stages, and the front between what is served and how quickly it is answered."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hexgen.errors import HexgenError
from hexgen.plan import Plan
from hexgen.scheduler.best import computing_alike, finish, solver_for
from hexgen.scheduler.lanes.kinds import Shape, kinds_of, orders
from hexgen.scheduler.lanes.model import Pace, served
from hexgen.scheduler.lanes.program import Costs, Program
from hexgen.scheduler.lanes.ways import Space, concurrency, passable, plan_of, ways_of
from hexgen.scheduler.task import Task
from hexgen.workload import Slo

_BELOW = 4  # such rates, two steps apart, where the front is asked for
_ORDERS = 4
_STEPS, _STEP = 64, 1.15  # of the rate, downwards from the largest that any range lets through
_FINISHED = 8  # shapes whose plans are made and predicted
_MOST_MACHINES = 256
# Beside Helix's simulator, on a dozen shapes for its 24 machines, trips are right on average, with a standard
# deviation of 9 %. Nearer to each other, predictions do not say which serves more, and the quicker is taken.
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
    for point in sorted(_points(task, False, wide=True), key=lambda p: (-p.pace.requests_s, p.pace.trip_s)):
        if not found or point.pace.trip_s < found[-1].pace.trip_s * (1 - 1e-9):
            found.append(point)
    return tuple(found)


def _points(task: Task, limited: bool, wide: bool = False) -> list[Point]:
    """Every shape that the search came by, priced."""
    found: list[Point] = []
    for nodes in computing_alike(task.cluster.nodes, task.options):
        solver = solver_for(task, nodes, "throughput")
        kinds = kinds_of(solver)
        if not kinds or sum(len(kind.groups) for kind in kinds) > _MOST_MACHINES:
            continue
        found += _Search(task, Space(solver, tuple(kinds)), limited, wide).points()
    return found


class _Search:
    def __init__(self, task: Task, space: Space, limited: bool, wide: bool) -> None:
        self.task, self.space, self.limited, self.wide = task, space, limited, wide
        self.program = Program(space)
        self.known: dict[Shape, Point | None] = {}
        self.costs: dict[int, list[Costs]] = {}
        self.best = 0.0

    def points(self) -> list[Point]:
        top = float(max(self.program.limit, default=0.0))
        if top <= 0:
            return []
        for order in orders(self.space.kinds, self.space.solver.topology, _ORDERS):
            # Steps of the rate: at the first ones some shape reaches it, from some step on none does.
            low, high = 0, _STEPS
            while high - low > 1:
                if self.best > 0 and self.task.deadline is not None and time.monotonic() > self.task.deadline:
                    break
                middle = (low + high) // 2
                rate = top * _STEP ** (middle - _STEPS)
                if self._try(order, middle, rate) >= rate / _STEP:
                    low = middle
                else:
                    high = middle
            if self.wide:
                for below in range(1, _BELOW):
                    step = low - 2 * below
                    self._try(order, step, top * _STEP ** (step - _STEPS))
        return [point for point in self.known.values() if point is not None]

    def _try(self, order: tuple[int, ...], step: int, requests_s: float) -> float:
        """The largest rate that a shape made for ``requests_s`` serves."""
        reached = 0.0
        if step not in self.costs:
            self.costs[step] = self.program.costs(requests_s)
        for shape in self.program.shapes(order, self.costs[step]):
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
