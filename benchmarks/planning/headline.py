"""HexGen's headline: against 16 A100s at the same price, its pool of 58 unlike GPUs kept deadlines 2.3 times
lower, or carried 4 times the rate (ICML 2024, abstract and section 5.2; LLaMA-2-70B).

Judged twice. HexGen ran one request at a time on a pipeline, without batching: `max_sequences: 1` is that. This
engine batches continuously, and so would whoever rents the A100s today.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from hexgen.errors import InfeasibleError
from hexgen.plan import EngineOptions, Plan
from hexgen.scheduler import plan
from hexgen.scheduler.baselines.genetic_search import hexgen_genetic
from hexgen.scheduler.task import Objective, default_options, make_task
from planning.cases import published, with_workload
from planning.deadlines import TARGET, Curve, Reference, chat, curve, mean_s, rates_from, reference
from planning.ours import same
from planning.plots import Line, Panel, draw
from planning.report import Grid, Report, number, over, ratio
from planning.settings import Settings

CLAIMED_DEADLINE, CLAIMED_RATE = 2.3, 4.0
BASE = "16 A100, ours"
SCALES = (4.0, 8.0, 16.0, 32.0, 64.0)
PLANNED_FOR = (4.0, 16.0)
_STOP = 2 * max(SCALES)  # times the A100s' latency: a pool that needs more is overloaded, and so at higher rates
MODES = {"one request at a time on a pipeline": 1, "continuous batching": None}


@dataclass(frozen=True, slots=True)
class Pool:
    """One cluster and who plans it. ``curves``: of each distinct plan; the operator takes the one that suits."""

    name: str
    curves: tuple[Curve, ...]

    def scale_at(self, rate: float) -> float:
        """The smallest deadline scale that ``TARGET`` of the requests keep at this rate."""
        found = [c.scale_at(c.rates.index(rate)) for c in self.curves if rate in c.rates]
        return min(found, default=math.inf)

    def peak_rate(self, scale: float) -> float:
        return max((c.peak_rate(scale) for c in self.curves), default=0.0)

    def attainment(self, rate: float, scale: float) -> float:
        found = [c.attainment(c.rates.index(rate), scale) for c in self.curves if rate in c.rates]
        return max(found, default=0.0)


def plans(name: str, alone: Reference, options: EngineOptions, settings: Settings, genetic: bool) -> list[Plan]:
    """Distinct plans of a pool: for several limits, for throughput, and for one request's latency."""
    asked = published(name)
    limits = [scale * mean_s(alone) for scale in (PLANNED_FOR[:1] if settings.quick else PLANNED_FOR)]
    goals: list[tuple[Objective, float | None]] = [("throughput", None), ("latency", None)]
    goals += [("slo", limit) for limit in limits]
    found: list[Plan] = []
    for objective, limit in goals:
        case = with_workload(asked, chat(limit))
        try:
            if genetic:
                task = make_task(case.cluster, case.model, case.workload, objective, None, 0, "auto", options)
                made = hexgen_genetic(task, objective, settings.baseline_seconds / 2).plan
            else:
                made = plan(
                    case.cluster, case.model, case.workload, objective,
                    time_limit_s=settings.seconds / 12, options=options,
                )  # fmt: skip
        except InfeasibleError:
            continue
        if made is not None and not any(same(made, other) for other in found):
            found.append(made)
    return found


def pools(limit: int | None, alone: Reference, settings: Settings) -> list[Pool]:
    asked = [(BASE, "hexgen-homogeneous16", False), ("58 unlike, ours", "hexgen-full58", False)]
    if not settings.quick:
        asked += [
            ("58 unlike, HexGen's search", "hexgen-full58", True),
            ("30 unlike at half the price, ours", "hexgen-half30", False),
        ]
    rates = rates_from(0.5, 4.0, 1) if settings.quick else rates_from(0.25, 64.0, 2)
    least, most, span_s = (200, 400, 10.0) if settings.quick else (400, 1000, 30.0)
    found = []
    for title, name, genetic in asked:
        case = published(name)
        options = default_options(case.cluster)
        options = options if limit is None else dataclasses.replace(options, max_sequences=limit)
        made = plans(name, alone, options, settings, genetic)
        found.append(Pool(title, tuple(curve(p, case, alone, rates, least, most, span_s, _STOP) for p in made)))
        print(f"{title}, {limit or 'any number'} at a time: {len(made)} plans", file=sys.stderr, flush=True)
    return found


def run(settings: Settings, plots: Path | None = None) -> Report:
    alone = reference()
    grids: list[Grid] = []
    findings: list[str] = []
    panels: list[Panel] = []
    figures: dict[str, object] = {"reference_s": mean_s(alone)}
    for mode, limit in MODES.items():
        judged = pools(limit, alone, settings)
        rates = sorted({rate for pool in judged for c in pool.curves for rate in c.rates})
        grids += [_deadlines(mode, judged, rates), _rates(mode, judged)]
        findings += _claims(mode, judged, rates)
        panels += _panels(mode, judged, rates)
        figures[mode] = {
            pool.name: {
                "scale_at": {f"{rate:g}": pool.scale_at(rate) for rate in rates},
                "peak_rate": {f"{scale:g}": pool.peak_rate(scale) for scale in SCALES},
            }
            for pool in judged
        }
    drawn = (draw(plots / "planner-headline.svg", panels),) if plots else ()
    return Report("headline", tuple(grids), tuple(findings), figures, drawn)


def _deadlines(mode: str, judged: list[Pool], rates: list[float]) -> Grid:
    rows = []
    for rate in rates:
        scales = [pool.scale_at(rate) for pool in judged]
        if any(math.isfinite(scale) for scale in scales):
            rows.append((f"{rate:.3g}", *(number(scale, 1) for scale in scales)))
    title = f"{mode}: the smallest deadline, in A100 latencies, that {TARGET:.0%} keep, by requests/s"
    return Grid(title, ("requests/s", *(pool.name for pool in judged)), tuple(rows))


def _rates(mode: str, judged: list[Pool]) -> Grid:
    title = f"{mode}: the largest rate (requests/s) at which {TARGET:.0%} keep the deadline, by its scale"
    rows = tuple((f"{scale:g}", *(number(pool.peak_rate(scale), 2) for pool in judged)) for scale in SCALES)
    return Grid(title, ("deadline, A100 latencies", *(pool.name for pool in judged)), rows)


def _claims(mode: str, judged: list[Pool], rates: list[float]) -> list[str]:
    base = next(pool for pool in judged if pool.name == BASE)
    told = []
    for pool in judged:
        if pool is base:
            continue
        lower = [(over(base.scale_at(rate), pool.scale_at(rate)) or 0.0, rate) for rate in rates
                 if math.isfinite(base.scale_at(rate)) and math.isfinite(pool.scale_at(rate))]  # fmt: skip
        more = [(over(pool.peak_rate(s), base.peak_rate(s)) or 0.0, s) for s in SCALES if base.peak_rate(s) > 0]
        deadline, at_rate = max(lower, default=(0.0, 0.0))
        rate, at_scale = max(more, default=(0.0, 0.0))
        told.append(
            f"{mode}, {pool.name} against {base.name}: a deadline up to {ratio(deadline)} times lower (at "
            f"{at_rate:.3g} requests/s; HexGen's claim: {CLAIMED_DEADLINE:g}), a rate up to {ratio(rate)} times "
            f"higher (at scale {at_scale:g}; HexGen's claim: {CLAIMED_RATE:g})."
        )
    return told


def _panels(mode: str, judged: list[Pool], rates: list[float]) -> list[Panel]:
    fixed = rates[len(rates) // 2]
    grid = [2 ** (i / 2) for i in range(14)]
    by_scale = [Line(pool.name, grid, [pool.attainment(fixed, s) for s in grid]) for pool in judged]
    by_rate = [Line(pool.name, rates, [pool.attainment(rate, SCALES[2]) for rate in rates]) for pool in judged]
    return [
        Panel(f"{mode}: {fixed:.3g} requests/s", "deadline, A100 latencies", "share in time", by_scale,
              log_x=True, level=TARGET),
        Panel(f"{mode}: deadline {SCALES[2]:g} x A100", "requests/s", "share in time", by_rate,
              log_x=True, level=TARGET),
    ]  # fmt: skip
