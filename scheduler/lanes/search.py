"""The search over shapes: even ones by dynamic programming over rates and KV rooms, then others step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.plan import Plan
from hexgen.scheduler.best import finish
from hexgen.scheduler.deadline import passed
from hexgen.scheduler.lanes.kinds import Shape, orders
from hexgen.scheduler.lanes.model import Pace, Stop, StopTimes, load_of, pace, served
from hexgen.scheduler.lanes.moves import neighbours
from hexgen.scheduler.lanes.program import Program
from hexgen.scheduler.lanes.ways import Space, concurrency, most_deals, passable, plan_of, ways_of
from hexgen.scheduler.task import Task

_BELOW = 4  # such rates, two steps apart, where the front is asked for
_ORDERS = 4
_STEPS, _STEP = 64, 1.15  # of the rate, downwards from the largest that any range lets through
_BETWEEN = 8  # rates within the last step: those that ranges let through, or even ones
_CLIMBS, _CLIMBED = 3, 2000  # starts that are improved step by step, and shapes asked for it in all
_FLOORS = 8  # rates of the front, each a little below the one before
_SAME = 1e-6
# Beside Helix's simulator, on a dozen shapes for its 24 machines, trips are right on average, with a standard
# deviation of 9 %. Nearer to each other, predictions do not say which serves more, and the quicker is taken.
NEAR = 0.92


@dataclass(frozen=True, slots=True)
class Point:
    """One shape: what it serves when asked for all it can, and how quickly."""

    shape: Shape
    space: Space
    pace: Pace
    most: float  # requests at once
    deals: int  # how often its requests are dealt out independently

    @property
    def tokens_s(self) -> float:
        return self.pace.requests_s * self.space.solver.traffic.output

    def plan(self, task: Task, objective: str = "throughput") -> Plan:
        """Checked, with the evaluator's prediction. Raises ``InfeasibleError`` where it does not start."""
        return finish(task, plan_of(self.space, self.shape, task, self.deals), objective)


class Search:
    """``limited``: what is served within the workload's limits counts. ``wide``: for the front."""

    def __init__(self, task: Task, program: Program, limited: bool, wide: bool) -> None:
        self.task, self.program, self.limited, self.wide = task, program, limited, wide
        self.space = program.space
        self.known: dict[Shape, Point | None] = {}
        self.stops: dict[float, dict[Stop, StopTimes]] = {}  # by rate
        self.best = 0.0
        self.left = 0  # shapes that the climb may still ask

    def points(self, starts: Sequence[Shape] = ()) -> list[Point]:
        """All that were priced. ``starts``: shapes to look at beside those that it finds."""
        for shape in starts:
            self._point(shape)
        top = float(max(self.program.limit, default=0.0))
        if top <= 0:
            return []
        for order in orders(self.space.kinds, self.space.solver.topology, _ORDERS):
            self._regular(order, top)
        self._climbs()
        return self._points()

    def _over(self) -> bool:
        return self.best > 0 and passed(self.task.deadline)

    def _regular(self, order: tuple[int, ...], top: float) -> None:
        """Steps of the rate: at the first ones some shape reaches it, from some step on none does."""
        low, high = 0, _STEPS
        while high - low > 1 and not self._over():
            middle = (low + high) // 2
            rate = top * _STEP ** (middle - _STEPS)
            if self._try(order, rate) >= rate / _STEP:
                low = middle
            else:
                high = middle
        least, most = (top * _STEP ** (step - _STEPS) for step in (low - 1, low + 1))
        for rate in self._rates(least, most):
            if not self._over():
                self._try(order, rate)
        if self.wide:
            for below in range(1, _BELOW):
                if not self._over():
                    self._try(order, top * _STEP ** (low - 2 * below - _STEPS))

    def _rates(self, least: float, most: float) -> list[float]:
        """At the very rate that a range lets through it is still of use, and above it no more."""
        limits = sorted({float(limit) for limit in self.program.limit if least < limit < most})
        if len(limits) > _BETWEEN:
            limits = [limits[i * len(limits) // _BETWEEN] for i in range(_BETWEEN)]
        return limits or [least + (most - least) * i / _BETWEEN for i in range(1, _BETWEEN)]

    def _try(self, order: tuple[int, ...], requests_s: float) -> float:
        """The largest rate that a shape made for ``requests_s`` serves."""
        reached = 0.0
        for shape in self.program.shapes(order, self.program.costs(requests_s)):
            point = self._point(shape)
            if point is not None:
                reached = max(reached, point.pace.requests_s)
        return reached

    def _climbs(self) -> None:
        """From the best shapes to more; from the quickest of those that serve about as much to quicker ones.

        For the front, the latter at lower rates too.
        """
        self.left = _CLIMBED
        for start in sorted(self._points(), key=_worth, reverse=True)[:_CLIMBS]:
            self._climb(start, None)
        most = max((point.pace.requests_s for point in self._points()), default=0.0)
        for step in range(1, _FLOORS + 1 if self.wide else 2) if most > 0 else ():
            floor = NEAR**step * most
            enough = [point for point in self._points() if point.pace.requests_s >= floor]
            self.left = max(self.left, _CLIMBED // 4)
            self._climb(min(enough, key=lambda point: point.pace.trip_s), floor)

    def _climb(self, start: Point, floor: float | None) -> None:
        """Each step to the best neighbour, until none is better: to more, or with a floor of rate to quicker."""

        def worth(point: Point) -> tuple[float, float]:
            if floor is None:
                return _worth(point)
            return (-point.pace.trip_s, 0.0) if point.pace.requests_s >= floor else (-math.inf, 0.0)

        here = best = start
        while True:
            for shape in neighbours(here.shape, self.space.kinds, self.program.layers, self.program.limit_of):
                if self._over() or self.left <= 0:
                    return
                if shape not in self.known and self._promising(shape, here, floor):
                    self._point(shape)
                point = self.known.get(shape)
                if point is not None and worth(point) > worth(best):
                    best = point
            if best is here:
                return
            here = best

    def _promising(self, shape: Shape, here: Point, floor: float | None) -> bool:
        """Whether it carries what ``here`` serves (or the floor), and is more or quicker: one rate is asked."""
        rate = here.pace.requests_s if floor is None else floor
        limit = min(self.program.limit_of(part) for part in shape)
        deals = most_deals(self.space, shape)
        if limit < rate * (1 - _SAME) or not passable(self.space, shape, deals):
            return False
        self.left -= 1
        known = self.stops.setdefault(rate, {})
        state = pace(ways_of(self.space, shape, deals), self.space.solver.traffic, rate, known)
        most = concurrency(self.space, shape, deals)
        if load_of(state, self.space.solver.traffic, most, self.limited) > 1:
            return False
        return (floor is None and limit > rate * (1 + _SAME)) or state.trip_s < here.pace.trip_s

    def _points(self) -> list[Point]:
        return [point for point in self.known.values() if point is not None]

    def _point(self, shape: Shape) -> Point | None:
        if shape not in self.known:
            self.known[shape] = found = self._price(shape)
            self.best = max(self.best, found.pace.requests_s if found is not None else 0.0)
        return self.known[shape]

    def _price(self, shape: Shape) -> Point | None:
        """With its requests dealt out as often as may be, or always alike where more then fit and are served."""
        deals = most_deals(self.space, shape)
        found = self._dealt(shape, deals)
        if deals == 1 or (found is not None and concurrency(self.space, shape) <= found.most):
            return found
        other = self._dealt(shape, 1)
        return max((p for p in (found, other) if p is not None), key=_worth, default=None)

    def _dealt(self, shape: Shape, deals: int) -> Point | None:
        if not passable(self.space, shape, deals):
            return None
        most = concurrency(self.space, shape, deals)
        if most < 1:
            return None
        most_served = served(ways_of(self.space, shape, deals), self.space.solver.traffic, most, self.limited)
        return Point(shape, self.space, most_served, most, deals) if most_served.requests_s > 0 else None


def _worth(point: Point) -> tuple[float, float]:
    """More is better, and of as much the quicker."""
    return round(point.pace.requests_s, 9), -point.pace.trip_s
