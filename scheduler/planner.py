"""``plan``: from what is there and what is asked, to who holds which layers."""

from __future__ import annotations

import dataclasses

from hexgen.cluster import Cluster
from hexgen.model import ModelSpec
from hexgen.plan import EngineOptions, Plan
from hexgen.scheduler.best import best_on_nodes, goal_of, why_nothing
from hexgen.scheduler.flow import plan_for_flow
from hexgen.scheduler.lanes.best import best_lanes
from hexgen.scheduler.options import chosen
from hexgen.scheduler.progress import OnProgress
from hexgen.scheduler.slo import (
    best_for_slo,
    cheapest_within_limits,
    for_search,
    other_candidates,
    regular_candidate,
)
from hexgen.scheduler.subsets import plan_within_price
from hexgen.scheduler.tables.source import CostTable
from hexgen.scheduler.task import Engine, Objective, Task, make_task, total_price
from hexgen.workload import Slo, Workload

_FINISHING_S = 2e-3  # a device: 0.4 ms measured, on a machine that may do other work for most of the time


def plan(
    cluster: Cluster,
    model: ModelSpec,
    workload: Workload | None = None,
    objective: Objective = "throughput",
    *,
    time_limit_s: float | None = None,
    seed: int = 0,
    engine: Engine = "auto",
    options: EngineOptions | None = None,
    cost: CostTable | None = None,
    progress: OnProgress | None = None,
) -> Plan:
    """The best plan found for serving ``model`` on ``cluster``, with its prediction and the cluster inline.

    ``workload``: given, else the cluster's own, else the built-in chat default. ``options``: how the engine will
    run it; without, chosen for the cluster. ``cost``: figures instead of the catalogue's, by
    `hexgen.scheduler.tables.load_table`. ``progress``: told how far the search is. The same input and seed give
    the same plan unless ``time_limit_s`` cuts the search short. Raises ``SpecError`` for impossible requests,
    ``InfeasibleError`` where nothing fits.
    """
    task = make_task(cluster, model, workload, objective, time_limit_s, seed, engine, options, cost, progress)
    task = _leaving_time_to_finish(task)
    if options is None:
        task = chosen(task, objective)
    cluster = task.cluster  # without nodes that no link leads to
    if objective == "maxflow":
        return plan_for_flow(task)
    simulated = _is_simulated(task)
    if objective == "cost" and simulated and task.workload.rate != "max":
        return cheapest_within_limits(task)
    if objective == "cost" or (
        cluster.budget_usd_h is not None and total_price(cluster.nodes) > cluster.budget_usd_h
    ):
        made = plan_within_price(task, objective)
        return best_for_slo(task, [made]) if objective == "slo" and simulated else made
    judged = objective == "slo" and simulated
    found = best_on_nodes(for_search(task) if judged else task, cluster.nodes, goal_of(objective))
    shared = best_lanes(task, objective) if _may_share(task, objective) else None
    if found is None:
        if shared is None:
            raise why_nothing(task, objective)
        return shared
    made = found.emit(task, objective)
    if judged:
        candidates = [made, *([] if shared is None else [shared])]
        if task.engine != "auto":
            return best_for_slo(task, candidates)
        return best_for_slo(task, candidates, other_candidates(task, made), regular_candidate(task))
    return made if shared is None or _served(shared) <= _served(made) else shared


def _leaving_time_to_finish(task: Task) -> Task:
    """A limit is on the whole command: what was found must still be checked and evaluated."""
    if task.deadline is None:
        return task
    devices = sum(node.count for node in task.cluster.nodes)
    return dataclasses.replace(task, deadline=task.deadline - _FINISHING_S * devices)


def _is_simulated(task: Task) -> bool:
    """Whether limits are judged by simulation. A published table's machines merge what waits at them, from all
    routes; the simulated engine does not.
    """
    return task.workload.slo != Slo() and (task.cost_table is None or not task.cost_table.holds_kv)


def _may_share(task: Task, objective: Objective) -> bool:
    """Stages that several routes share are looked for on others' figures, which count a stage's work as one batch.

    Our own engine runs each route's steps by themselves, so on the catalogue's figures sharing does not pay.
    """
    return task.cost_table is not None and objective in ("throughput", "slo") and task.engine in ("auto", "exact")


def _served(made: Plan) -> float:
    return made.predicted.tokens_s if made.predicted is not None else 0.0
