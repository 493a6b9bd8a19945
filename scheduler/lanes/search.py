"""The search over shapes: even ones by dynamic programming over rates and KV rooms, then others step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hexgen.plan import Plan
from hexgen.scheduler.best import finish
from hexgen.scheduler.lanes.kinds import Shape, orders
from hexgen.scheduler.lanes.model import Pace, served
from hexgen.scheduler.lanes.moves import neighbours
from hexgen.scheduler.lanes.program import Costs, Program
from hexgen.scheduler.lanes.ways import Space, concurrency, most_deals, passable, plan_of, ways_of
from hexgen.scheduler.task import Task

_BELOW = 4  # such rates, two steps apart, where the front is asked for
_ORDERS = 4
_STEPS, _STEP = 64, 1.15  # of the rate, downwards from the largest that any range lets through
_BETWEEN = 8  # rates within the last step: those that ranges let through, or even ones
_CLIMBS, _CLIMBED = 3, 1200  # starts that are improved step by step, and shapes priced for it in all
_MORE = 1e-6


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

    def __init__(self, task: Task, space: Space, limited: bool, wide: bool) -> None:
        self.task, self.space, self.limited, self.wide = task, space, limited, wide
        self.program = Program(space)
        self.known: dict[Shape, Point | None] = {}
        self.costs: dict[float, list[Costs]] = {}
        self.best = 0.0

    def points(self) -> list[Point]:
        top = float(max(self.program.limit, default=0.0))
        if top <= 0:
            return []
        for order in orders(self.space.kinds, self.space.solver.topology, _ORDERS):
            self._regular(order, top)
        self._climb()
        return [point for point in self.known.values() if point is not None]

    def _over(self) -> bool:
        return self.best > 0 and self.task.deadline is not None and time.monotonic() > self.task.deadline

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
        if requests_s not in self.costs:
            self.costs[requests_s] = self.program.costs(requests_s)
        reached = 0.0
        for shape in self.program.shapes(order, self.costs[requests_s]):
            point = self._point(shape)
            if point is not None:
                reached = max(reached, point.pace.requests_s)
        return reached

    def _climb(self) -> None:
        """From the best shapes, each step to the best neighbour, until none is better."""
        points = sorted((p for p in self.known.values() if p is not None), key=_worth, reverse=True)
        end = len(self.known) + _CLIMBED
        for start in points[:_CLIMBS]:
            here = start
            while not self._over() and len(self.known) < end:
                around = [
                    point
                    for shape in neighbours(
                        here.shape, self.space.kinds, self.program.layers, self.program.limit_of
                    )
                    if (point := self._point(shape)) is not None
                ]
                next_best = max(around, key=_worth, default=here)
                if _worth(next_best) <= _worth(here):
                    break
                here = next_best

    def _point(self, shape: Shape) -> Point | None:
        if shape not in self.known:
            self.known[shape] = found = self._price(shape)
            self.best = max(self.best, found.pace.requests_s if found is not None else 0.0)
        return self.known[shape]

    def _price(self, shape: Shape) -> Point | None:
        """With its requests dealt out as often as may be, or always alike where that serves more."""
        points = [self._dealt(shape, deals) for deals in dict.fromkeys((most_deals(self.space, shape), 1))]
        return max((p for p in points if p is not None), key=_worth, default=None)

    def _dealt(self, shape: Shape, deals: int) -> Point | None:
        if not passable(self.space, shape, deals):
            return None
        most = concurrency(self.space, shape, deals)
        if most < 1:
            return None
        pace = served(ways_of(self.space, shape, deals), self.space.solver.traffic, most, self.limited)
        return Point(shape, self.space, pace, most, deals) if pace.requests_s > 0 else None


def _worth(point: Point) -> tuple[float, float]:
    """More is better, and of as much the quicker."""
    return round(point.pace.requests_s, 9), -point.pace.trip_s
