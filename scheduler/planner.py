"""``plan``: from what is there and what is asked, to who holds which layers."""

from __future__ import annotations

from hexgen.cluster import Cluster
from hexgen.model import ModelSpec
from hexgen.plan import EngineOptions, Plan
from hexgen.scheduler.best import best_on_nodes, goal_of, why_nothing
from hexgen.scheduler.flow import plan_for_flow
from hexgen.scheduler.subsets import plan_within_price
from hexgen.scheduler.tables.source import CostTable
from hexgen.scheduler.task import Engine, Objective, make_task, total_price
from hexgen.workload import Workload


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
) -> Plan:
    """The best plan found for serving ``model`` on ``cluster``, with its prediction and the cluster inline.

    ``workload``: given, else the cluster's own, else the built-in chat default. ``options``: how the engine will
    run it; without, chosen for the cluster. ``cost``: figures instead of the catalogue's, by
    `hexgen.scheduler.tables.load_table`. The same input and seed give the same plan unless ``time_limit_s`` cuts
    the search short. Raises ``SpecError`` for impossible requests, ``InfeasibleError`` where nothing fits.
    """
    task = make_task(cluster, model, workload, objective, time_limit_s, seed, engine, options, cost)
    cluster = task.cluster  # without nodes that no link leads to
    if objective == "maxflow":
        return plan_for_flow(task)
    if objective == "cost" or (
        cluster.budget_usd_h is not None and total_price(cluster.nodes) > cluster.budget_usd_h
    ):
        return plan_within_price(task, objective)
    found = best_on_nodes(task, cluster.nodes, goal_of(objective))
    if found is None:
        raise why_nothing(task, objective)
    return found.emit(task, objective)
