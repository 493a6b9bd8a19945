"""The front between throughput and latency: plans of which none serves more and answers more quickly than another.

Under a published table they are the shapes of shared stages at full load (`hexgen.scheduler.lanes`). Else they are
what the heuristic finds for the throughput, for one request's latency, and within limits on TPOT between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from hexgen.errors import HexgenError
from hexgen.plan import Plan, Prediction
from hexgen.scheduler.best import best_on_nodes
from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.lanes.best import front as lanes_front
from hexgen.scheduler.task import Task
from hexgen.workload import Slo

_LIMITS = 5  # on TPOT, between one request's and that of the plan for throughput


@dataclasses.dataclass(frozen=True, slots=True)
class FrontPoint:
    """``predicted``: all that the plan serves within ``tpot_limit_s``, whatever rate the workload asks for."""

    plan: Plan
    predicted: Prediction
    tpot_limit_s: float | None
    picked: bool  # the plan that was made for the objective


def front(task: Task, picked: Plan) -> tuple[FrontPoint, ...]:
    """Most tokens/s first. ``picked`` is among them, also where another beats it."""
    task = dataclasses.replace(
        task, workload=dataclasses.replace(task.workload, slo=Slo(), rate="max"), deadline=None, progress=None
    )
    own = evaluate(picked, task.cluster, task.model, task.workload, "throughput", cost_table=task.cost_table)
    published = task.cost_table is not None and task.cost_table.holds_kv
    found = list(_of_lanes(task) if published else _of_limits(task))
    mine = FrontPoint(picked, own, None, True)
    others = [point for point in found if not _same(point.plan, picked)]
    return _undominated([mine, *others])


def _of_lanes(task: Task) -> Iterator[FrontPoint]:
    for point in lanes_front(task):
        try:
            plan = point.plan(task)
        except HexgenError:
            continue  # an engine's buffers do not fit
        if plan.predicted is not None:
            yield FrontPoint(plan, plan.predicted, None, False)


def _of_limits(task: Task) -> Iterator[FrontPoint]:
    task = dataclasses.replace(task, engine="heuristic")
    ends: list[float] = []
    for goal in ("throughput", "latency"):
        point = _searched(task, goal, None)
        if point is not None:
            yield point
            ends.append(point.predicted.tpot_s if goal == "throughput" else 1 / point.predicted.single_tokens_s)
    if len(ends) == 2 and ends[1] < ends[0]:
        for limit_s in np.geomspace(ends[1], ends[0], _LIMITS + 2)[1:-1]:
            point = _searched(task, "slo", float(limit_s))
            if point is not None:
                yield point


def _searched(task: Task, goal: str, limit_s: float | None) -> FrontPoint | None:
    limited = dataclasses.replace(task, workload=dataclasses.replace(task.workload, slo=Slo(tpot_s=limit_s)))
    if goal == "slo":
        found = best_on_nodes(limited, task.cluster.nodes, "slo")
    else:
        found = best_on_nodes(task, task.cluster.nodes, "latency" if goal == "latency" else "throughput")
    if found is None:
        return None
    plan = found.emit(limited, "slo" if goal == "slo" else "throughput")
    return None if plan.predicted is None else FrontPoint(plan, plan.predicted, limit_s, False)


def _same(one: Plan, other: Plan) -> bool:
    return one.stages == other.stages and one.routes == other.routes


def _undominated(points: Sequence[FrontPoint]) -> tuple[FrontPoint, ...]:
    found: list[FrontPoint] = []
    quickest = float("inf")
    for point in sorted(points, key=lambda p: (-p.predicted.tokens_s, p.predicted.tpot_s, not p.picked)):
        if point.predicted.tpot_s < quickest * (1 - 1e-9):
            quickest = point.predicted.tpot_s
            found.append(point)
        elif point.picked:
            found.append(point)
    return tuple(found)
