"""A changed cluster, planned from the plan that runs on it now: quickly, and moving no more than it must.

What survives is taken as it is, broken pipelines are repaired, and a fresh plan is made for comparison. Among
plans as good as the best (within 1 %) the one wins whose devices must load the fewest bytes of weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hexgen.cluster import Cluster
from hexgen.errors import HexgenError, InfeasibleError
from hexgen.memory import plan_dtype
from hexgen.model import ModelSpec
from hexgen.plan import EngineOptions, Plan, resolve_cluster
from hexgen.scheduler.best import best_on_nodes, finish, goal_of, solver_for
from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.moves import DeviceMove, dealt_to_keep_most, device_moves, holdings, surviving
from hexgen.scheduler.nudge import nudged
from hexgen.scheduler.planner import plan as plan_afresh
from hexgen.scheduler.repair import computing_nodes, remaining_stages, repaired, shares_stages, unbroken
from hexgen.scheduler.tables.source import CostTable
from hexgen.scheduler.task import Objective, Task, make_task, total_price
from hexgen.scheduler.weights import flow_tokens_s, routed, weighted
from hexgen.validate import check_plan
from hexgen.workload import Workload

DEFAULT_LIMIT_S = 1.2  # what is done after the search takes another tenth or two
EQUAL = 0.01  # relative: plans this near the best are as good; the model of costs is far less exact than that
_NUDGE_S = 0.2  # after the time limit no further plan is nudged
_REPAIR_SHARE = 0.5  # of the time limit; the fresh plan has the rest


@dataclass(frozen=True, slots=True)
class Considered:
    """One way to go on. ``name``: ``unbroken`` (what survives, as it is), ``rerouted`` (new routes through stages
    that survive), ``repaired``, ``fresh``, or one of these with ``, layers nudged back``."""

    name: str
    tokens_s: float
    loads_bytes: int


@dataclass(frozen=True, slots=True)
class Replanned:
    """The plan to change to, and what that means for each device. Plain data: whoever migrates acts on it."""

    plan: Plan
    moves: tuple[DeviceMove, ...]  # devices that hold weights now or will, in the cluster's order
    loads_bytes: int  # weights that devices must load because they do not hold them
    keeps_bytes: int  # weights that stay where they are and are used
    gone: tuple[str, ...]  # devices of the old plan that are no longer there
    chosen: str  # the name of what was taken
    considered: tuple[Considered, ...]
    elapsed_s: float


def replan(
    old: Plan,
    cluster: Cluster,
    model: ModelSpec,
    workload: Workload | None = None,
    objective: Objective = "throughput",
    *,
    time_limit_s: float = DEFAULT_LIMIT_S,
    seed: int = 0,
    options: EngineOptions | None = None,
    cost: CostTable | None = None,
) -> Replanned:
    """Plan for ``cluster`` starting from ``old``, which was made for another state of it.

    ``options``: without, the old plan's. ``cost``: as for ``plan``. Raises ``SpecError`` where the old plan is not
    valid on its own cluster, ``InfeasibleError`` where the new one cannot hold the model or keep the limits.
    """
    started = time.monotonic()
    task = make_task(cluster, model, workload, objective, time_limit_s, seed, "auto", options or old.engine, cost)
    cluster = task.cluster  # without nodes that no link leads to
    before = resolve_cluster(old)
    check_plan(old, before, model, where="the old plan")
    held = surviving(old, cluster, model)
    found: list[tuple[float, Considered, Plan]] = []

    def keep(name: str, draft: Plan) -> None:
        settled = finish(task, dealt_to_keep_most(held, draft, cluster, model), objective)
        value = _value(settled, task, objective)
        if value is not None and settled.predicted is not None:
            loads = sum(move.loads_bytes for move in device_moves(held, settled, cluster, model))
            found.append((value, Considered(name, settled.predicted.tokens_s, loads), settled))

    failed: HexgenError | None = None
    for name, draft in _drafts(old, task, objective, started, time_limit_s):
        if isinstance(draft, HexgenError):
            failed = draft
            continue
        keep(name, draft)
    if not found:
        raise failed or InfeasibleError("nothing of the old plan can go on", where=f"cluster {cluster.name}")
    best = max(value for value, _, _ in found)
    least = best - EQUAL * abs(best)
    for value, considered, equal in [entry for entry in found if entry[0] >= least]:
        if considered.loads_bytes > 0 and time.monotonic() < started + time_limit_s + _NUDGE_S:
            slack = (value - least) / abs(value)
            solver = solver_for(task, computing_nodes(equal, task), goal_of(objective))
            closer = nudged(equal, held, solver, slack)
            if closer != equal:
                keep(f"{considered.name}, layers nudged back", closer)
    equals = [entry for entry in found if entry[0] >= least]
    _, chosen, plan = min(equals, key=lambda entry: (entry[1].loads_bytes, -entry[0]))
    plan = _bounded(plan, old, before, task, objective)
    moves = device_moves(held, plan, cluster, model)
    return Replanned(
        plan=plan,
        moves=moves,
        loads_bytes=chosen.loads_bytes,
        keeps_bytes=sum(move.keeps_bytes for move in moves),
        gone=tuple(device for device in holdings(old, before, model) if device not in held),
        chosen=chosen.name,
        considered=tuple(considered for _, considered, _ in found),
        elapsed_s=time.monotonic() - started,
    )


def _drafts(
    old: Plan, task: Task, objective: Objective, started: float, limit_s: float
) -> Iterator[tuple[str, Plan | HexgenError]]:
    """What to choose from; each is made only after the one before was looked at, so that time is shared."""
    survivors, stages = unbroken(old, task), remaining_stages(old, task)
    if survivors is not None:
        yield "unbroken", survivors
    if survivors is not None and survivors.routes != old.routes and shares_stages(survivors):
        yield "unbroken", weighted(survivors, task, objective)
    if stages is not None and (objective == "maxflow" or shares_stages(old)):
        with contextlib.suppress(InfeasibleError):  # what is left may not cover all layers
            yield "rerouted", routed(stages, task)
    if objective not in ("cost", "maxflow"):
        mended = dataclasses.replace(task, deadline=started + _REPAIR_SHARE * limit_s)
        for draft in repaired(old, mended, goal_of(objective)):
            yield "repaired", draft
    try:
        yield "fresh", _fresh(task, objective, max(0.1, started + limit_s - time.monotonic()))
    except HexgenError as error:
        yield "fresh", error


def _fresh(task: Task, objective: Objective, limit_s: float) -> Plan:
    cluster = task.cluster
    limited = cluster.budget_usd_h is not None and total_price(cluster.nodes) > cluster.budget_usd_h
    if objective not in ("cost", "maxflow") and not limited:
        quick = dataclasses.replace(task, quick=True, deadline=time.monotonic() + limit_s)
        found = best_on_nodes(quick, cluster.nodes, goal_of(objective))
        if found is not None:
            return found.emit(task, objective)
    return plan_afresh(
        cluster,
        task.model,
        task.workload,
        objective,
        time_limit_s=limit_s,
        seed=task.seed,
        options=task.options,
        cost=task.cost_table,
    )


def _value(plan: Plan, task: Task, objective: Objective) -> float | None:
    """Larger is better; None where the plan breaks the budget, or (cost) does not carry the rate."""
    predicted = plan.predicted
    if predicted is None:
        return None
    price, budget = predicted.price_usd_h, task.cluster.budget_usd_h
    if budget is not None and price is not None and price > budget * (1 + 1e-9):
        return None
    if objective == "latency":
        return predicted.single_tokens_s
    if objective == "maxflow":
        return flow_tokens_s(plan, task)
    if objective != "cost":
        return predicted.tokens_s
    if price is None or predicted.tokens_s <= 0:
        return None
    rate = task.workload.rate
    if rate == "max":
        return -price / predicted.tokens_s
    return -price if predicted.requests_s >= float(rate) * (1 - 1e-9) else None


def _bounded(plan: Plan, old: Plan, before: Cluster, task: Task, objective: Objective) -> Plan:
    """The plan with the old one's proven bound where that still holds, and with none otherwise.

    In so short a time nothing is proven. What is left is arithmetic over all devices, which says little of a plan.
    The other objectives' bounds are not read as that, and stay.
    """
    predicted = plan.predicted
    if predicted is None or objective not in ("throughput", "slo"):
        return plan
    known, arithmetic = _old_bound(old, before, task, objective), predicted.upper_bound_tokens_s
    if known is not None and arithmetic is not None and known >= arithmetic * (1 - EQUAL):
        known = None
    bound = None if known is None else max(known, predicted.tokens_s)
    return dataclasses.replace(plan, predicted=dataclasses.replace(predicted, upper_bound_tokens_s=bound))


def _old_bound(old: Plan, before: Cluster, task: Task, objective: Objective) -> float | None:
    """What the old plan says that nothing exceeds, if that is so here: fewer devices serve no more.

    Figures, workload and options must be what they were: the old plan, evaluated with these, does what it says.
    """
    said = old.predicted
    if said is None or said.upper_bound_tokens_s is None or said.objective != objective:
        return None
    if old.engine != task.options or not _is_part_of(task.cluster, before):
        return None
    dtypes = {plan_dtype(old.engine, task.model, [n.device for n in c.nodes]) for c in (task.cluster, before)}
    if len(dtypes) > 1:
        return None
    now = evaluate(old, before, task.model, task.workload, objective, cost_table=task.cost_table)
    same = all(
        math.isclose(getattr(now, name), getattr(said, name), rel_tol=1e-6)
        for name in ("tokens_s", "ttft_s", "tpot_s", "single_tokens_s")
    )
    return said.upper_bound_tokens_s if same else None


def _is_part_of(cluster: Cluster, whole: Cluster) -> bool:
    """Whether ``cluster`` is ``whole`` less some nodes, joined as they were."""
    if cluster.default_link != whole.default_link or cluster.region_links != whole.region_links:
        return False
    theirs = {node.name: node for node in whole.nodes}
    if any(theirs.get(node.name) != node for node in cluster.nodes):
        return False
    left = {node.name for node in cluster.nodes}
    return cluster.node_links == tuple(entry for entry in whole.node_links if left.issuperset(entry.nodes))
