"""Our plan for a case, what is proven about it, and what it serves in the simulator."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

from hexgen.errors import HexgenError, InfeasibleError
from hexgen.plan import Plan, Prediction
from hexgen.scheduler import plan
from hexgen.scheduler.simulation import served
from hexgen.scheduler.tables.source import CostTable
from hexgen.scheduler.task import Engine, Objective
from planning.cases import Case
from planning.settings import Settings


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with the time it took."""

    plan: Plan
    wall_s: float
    cpu_s: float

    @property
    def predicted(self) -> Prediction:
        return prediction(self.plan)

    @property
    def gap(self) -> float | None:
        """How far from the bound, as a share of it."""
        bound = self.predicted.upper_bound_tokens_s
        return None if not bound else max(0.0, 1 - self.predicted.tokens_s / bound)


def prediction(made: Plan) -> Prediction:
    """The planner gives every plan one. Raises ``HexgenError`` where a plan has none."""
    if made.predicted is None:
        raise HexgenError("the plan has no prediction")
    return made.predicted


def plan_case(
    asked: Case,
    objective: Objective = "throughput",
    seconds: float | None = None,
    seed: int = 0,
    cost: CostTable | None = None,
    engine: Engine = "auto",
) -> Planned:
    """``seconds`` None: the planner's own choice. Raises ``InfeasibleError``."""
    wall, cpu = time.monotonic(), time.process_time()
    made = plan(
        asked.cluster, asked.model, asked.workload, objective,
        time_limit_s=seconds, seed=seed, engine=engine, cost=cost,
    )  # fmt: skip
    return Planned(made, time.monotonic() - wall, time.process_time() - cpu)


def same(a: Plan, b: Plan) -> bool:
    """Whether they do the same, whoever made them."""
    return (a.stages, a.routes, a.engine) == (b.stages, b.routes, b.engine)


@dataclass(frozen=True, slots=True)
class Served:
    """Output tokens/s of a saturated simulation: mean over seeds, and how far apart they were."""

    tokens_s: float
    spread: float  # (largest - smallest) / mean
    tpot_p50_s: float = math.nan


def serve(made: Plan, asked: Case, settings: Settings, cost: CostTable | None = None) -> Served:
    """As `hexgen.scheduler.simulation.served`, over the settings' seeds. NaN where the plan does not fit."""
    rates, tpots = [], []
    for seed in range(settings.seeds):
        try:
            found = served(
                made,
                asked.cluster,
                asked.model,
                asked.workload,
                seed=seed,
                cost_table=cost,
                lives=settings.lives,
            )
        except InfeasibleError:
            return Served(math.nan, math.nan)
        rates.append(found.tokens_s)
        tpots.append(found.percentile("tpot", 50))
    mean = statistics.fmean(rates)
    return Served(mean, (max(rates) - min(rates)) / mean if mean else 0.0, statistics.fmean(tpots))


def usd_per_million(price_usd_h: float | None, tokens_s: float) -> float | None:
    """Of output tokens, with the nodes that the plan uses busy all the time."""
    return None if price_usd_h is None or not tokens_s > 0 else price_usd_h / 3600 / tokens_s * 1e6
