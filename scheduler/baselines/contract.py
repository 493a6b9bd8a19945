"""What every baseline gives: a plan with its prediction, or why there is none."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hexgen.cluster import DeviceType, Node
from hexgen.errors import HexgenError
from hexgen.plan import Plan
from hexgen.scheduler.best import emit_plan, finish
from hexgen.scheduler.groups import Group
from hexgen.scheduler.layers import measure
from hexgen.scheduler.solver import RouteSolver, Solution
from hexgen.scheduler.task import Task

MOST_ROUTES = 64  # of a placement whose routes share stages: judging takes the square of them


@dataclass(frozen=True, slots=True)
class Baseline:
    """One way to do it: the plan it gives, or why it gives none."""

    name: str
    plan: Plan | None
    reason: str = ""  # why there is no plan
    shortfall: str = ""  # what keeps the plan from serving more, computed from its prediction
    note: str = ""  # what else to know of how it was found: a search cut short, a gap left open


def best_of(
    task: Task, objective: str, name: str, reason: str, candidates: Iterable[Sequence[Solution]], note: str = ""
) -> Baseline:
    """The best of several sets of routes, as a checked plan; ``reason`` where there is none."""
    drafts = (emit_plan(routes, task) for routes in candidates if routes)
    return best_plan(task, objective, name, reason, drafts, note)


def best_plan(
    task: Task, objective: str, name: str, reason: str, drafts: Iterable[Plan], note: str = ""
) -> Baseline:
    """The best of several drafts under the planner's own evaluator; one that does not hold is passed over."""
    best: Plan | None = None
    budget = task.cluster.budget_usd_h
    for draft in drafts:
        try:
            found = finish(task, draft, objective)
        except HexgenError as error:
            reason = error.message
            continue
        price = found.predicted.price_usd_h if found.predicted else None
        if budget is not None and price is not None and price > budget * (1 + 1e-9):
            reason = f"costs {price:.2f} USD/h, and the budget is {budget:.2f}"
        elif best is None or score(found, objective) > score(best, objective):
            best = found
    return Baseline(name, best, "" if best else reason, note=note)


def best_in_time(
    task: Task, objective: str, name: str, reason: str, drafts: Iterator[Plan], seconds: float | None
) -> Baseline:
    """`best_plan` of as many drafts as can be made and judged in ``seconds``, the first in any case.

    For placements whose routes share stages: the note says where their number was limited.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    best = Baseline(name, None, reason)
    cut = False
    for draft in drafts:
        found = best_plan(task, objective, name, reason, [draft])
        if best.plan is None or (
            found.plan is not None and score(found.plan, objective) > score(best.plan, objective)
        ):
            best = found
        if cut := best.plan is not None and time.monotonic() >= deadline:
            break
    notes = [f"cut after {seconds:.0f} s"] if cut else []
    if best.plan is not None and len(best.plan.routes) >= MOST_ROUTES:
        notes.append(f"limited to {MOST_ROUTES} routes, it could serve more")
    return dataclasses.replace(best, note="; ".join(notes))


def score(plan: Plan, objective: str) -> float:
    """Larger is better; comparable within one objective."""
    predicted = plan.predicted
    if predicted is None:
        return 0.0
    return predicted.single_tokens_s if objective == "latency" else predicted.tokens_s


def evenly(solver: RouteSolver, pipelines: Sequence[Sequence[Group]]) -> list[Solution]:
    """The pipelines with layers as equal as they go; nothing where one of them does not fit."""
    routes: list[Solution] = []
    layers = solver.cost.model.layers
    for groups in pipelines:
        depth = len(groups)
        if depth > layers:
            return []
        division = [layers // depth + (i < layers % depth) for i in range(depth)]
        found = measure(solver.chain(groups), division, solver.traffic)
        if found is None:
            return []
        routes.append(Solution(tuple(groups), found, found.steady.tokens_s))
    return routes


def by_type(nodes: Sequence[Node]) -> list[tuple[Node, ...]]:
    """The nodes of each type of device (with its memory and speed), in the order of the cluster."""
    kinds: dict[DeviceType, list[Node]] = {}
    for node in nodes:
        kinds.setdefault(node.device, []).append(node)
    return [tuple(members) for members in kinds.values()]
