"""What a plan serves when it is asked for more than it can: the figure that predictions are judged by."""

from __future__ import annotations

import math
from dataclasses import replace

from hexgen.cluster import Cluster
from hexgen.model import ModelSpec
from hexgen.plan import Plan
from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.simulation.arrivals import requests_of
from hexgen.scheduler.simulation.result import SimulationResult
from hexgen.scheduler.simulation.run import simulate
from hexgen.scheduler.tables.source import CostTable
from hexgen.workload import Workload

# In predicted lives of a request. All start at once and leave by their lengths: after three, ages are well mixed.
_WARM_LIVES = 3
_LIVES = 8
_SPARE = 1.3  # more requests than are predicted to be served, so that the queue never ends before the clock


def served(
    plan: Plan,
    cluster: Cluster,
    model: ModelSpec,
    workload: Workload,
    *,
    seed: int = 0,
    cost_table: CostTable | None = None,
    lives: float = _LIVES,
) -> SimulationResult:
    """The plan under as many requests as it takes, with the workload's lengths; ``tokens_s`` is what it serves.

    Rates are counted once the start is forgotten: over five predicted latencies after three (``lives`` scales
    both). Raises ``InfeasibleError`` where the plan does not fit into memory.
    """
    saturating = replace(workload, rate="max")
    predicted = evaluate(plan, cluster, model, saturating, cost_table=cost_table)
    until_s = lives * predicted.latency_s
    # What is running and filling the routes at the start comes on top of what leaves.
    count = math.ceil(_SPARE * predicted.requests_s * (until_s + predicted.latency_s)) + 64 * len(plan.routes)
    return simulate(
        plan,
        cluster,
        model,
        requests_of(saturating, count, seed),
        cost_table=cost_table,
        slo=workload.slo,
        warmup_s=until_s * _WARM_LIVES / _LIVES,
        until_s=until_s,
    )
