"""What our plan and every baseline serve on every published cluster: one cost model, one simulator."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

from hexgen.errors import InfeasibleError
from hexgen.scheduler.compare import baselines
from hexgen.scheduler.task import make_task
from planning.cases import Case, all_published
from planning.ours import plan_case, prediction, same, serve, usd_per_million
from planning.report import Grid, Report, number, over, ratio, share
from planning.settings import Settings

NEAR_BOUND = 0.95  # of the bound: a baseline that serves so much cannot be beaten by much
GOALS: Mapping[str, float] = {"HexGen": 1.3, "Helix": 1.15}
GAP_GOAL = 0.05
_EQUAL = 0.005  # relative: what is predicted to serve within this is not below
OURS = "ours"


@dataclass(frozen=True, slots=True)
class Way:
    """One planner's plan. NaN where there is none, and ``note`` says why."""

    name: str
    predicted_tokens_s: float
    simulated_tokens_s: float
    spread: float
    usd_per_million: float | None
    note: str


@dataclass(frozen=True, slots=True)
class CaseResult:
    """``infeasible``: why the model cannot be served there at all; the rest is empty then."""

    name: str
    devices: int
    ours: Way | None
    others: tuple[Way, ...]
    bound_tokens_s: float | None
    plan_s: float
    infeasible: str = ""

    @property
    def gap(self) -> float | None:
        if self.ours is None or not self.bound_tokens_s:
            return None
        return max(0.0, 1 - self.ours.predicted_tokens_s / self.bound_tokens_s)

    def other(self, name: str) -> Way | None:
        return next((way for way in self.others if way.name == name and way.predicted_tokens_s > 0), None)

    @property
    def best(self) -> Way | None:
        """The baseline that is predicted to serve most."""
        known = [way for way in self.others if way.predicted_tokens_s > 0]
        return max(known, key=lambda way: way.predicted_tokens_s, default=None)

    @property
    def best_simulated(self) -> Way | None:
        known = [way for way in self.others if way.simulated_tokens_s > 0]
        return max(known, key=lambda way: way.simulated_tokens_s, default=None)


def judge(asked: Case, settings: Settings) -> CaseResult:
    """Everybody's plan for one case, predicted and simulated."""
    devices = sum(node.count for node in asked.cluster.nodes)
    try:
        planned = plan_case(asked, seconds=settings.seconds)
    except InfeasibleError as error:
        return CaseResult(asked.name, devices, None, (), None, 0.0, error.message)
    mine = serve(planned.plan, asked, settings)
    told = planned.predicted
    ours = Way(
        OURS,
        told.tokens_s,
        mine.tokens_s,
        mine.spread,
        usd_per_million(told.price_usd_h, mine.tokens_s),
        f"{len(planned.plan.stages)} stages, {len(planned.plan.routes)} routes; {told.bottleneck}",
    )
    # The engine's options are ours to choose, for everybody: ratios compare placements.
    options = planned.plan.engine
    task = make_task(asked.cluster, asked.model, asked.workload, "throughput", None, 0, "auto", options)
    others = []
    known = [(planned.plan, mine)]
    for baseline in baselines(task, "throughput", settings.baseline_seconds):
        if baseline.plan is None:
            others.append(Way(baseline.name, math.nan, math.nan, math.nan, None, baseline.reason))
            continue
        theirs = prediction(baseline.plan)
        run = next((found for other, found in known if same(baseline.plan, other)), None)
        if run is None:
            run = serve(baseline.plan, asked, settings)
            known.append((baseline.plan, run))
        note = "; ".join(filter(None, (baseline.note, baseline.shortfall)))
        cost = usd_per_million(theirs.price_usd_h, run.tokens_s)
        others.append(Way(baseline.name, theirs.tokens_s, run.tokens_s, run.spread, cost, note))
    return CaseResult(asked.name, devices, ours, tuple(others), told.upper_bound_tokens_s, planned.wall_s)


def told(result: CaseResult) -> CaseResult:
    """Says what was found as soon as it is: the whole takes long."""
    ours, best, best_sim = result.ours, result.best, result.best_simulated
    if ours is None or best is None or best_sim is None:
        print(f"{result.name}: {result.infeasible or 'no baseline has a plan'}", file=sys.stderr, flush=True)
        return result
    print(
        f"{result.name}: predicted {ours.predicted_tokens_s:.1f} ({best.name} {best.predicted_tokens_s:.1f}), "
        f"simulated {ours.simulated_tokens_s:.1f} ({best_sim.name} {best_sim.simulated_tokens_s:.1f}), "
        f"gap {share(result.gap)}",
        file=sys.stderr,
        flush=True,
    )
    return result


def run(settings: Settings) -> Report:
    cases, without = all_published(settings.quick)
    if settings.jobs > 1:
        with ProcessPoolExecutor(settings.jobs) as pool:
            results = list(pool.map(partial(judge, settings=settings), cases))
    else:
        results = [told(judge(asked, settings)) for asked in cases]
    return report(results, without, settings)


def report(results: list[CaseResult], without: list[str], settings: Settings) -> Report:
    feasible = [result for result in results if result.ours is not None]
    grids = (
        _summary(feasible, settings),
        _everybody(feasible, "Output tokens/s, predicted", "predicted_tokens_s", 0),
        _everybody(feasible, "Output tokens/s, simulated", "simulated_tokens_s", 0),
        *_prices(feasible),
    )
    findings = [*_goals(feasible)]
    findings += [f"{r.name} cannot be served: {r.infeasible}" for r in results if r.infeasible]
    if without:
        findings.append(f"No built-in model is given for {', '.join(without)}: left out.")
    return Report("served", grids, tuple(findings), {"cases": [asdict(result) for result in results]})


def _summary(results: list[CaseResult], settings: Settings) -> Grid:
    heads = (
        "cluster/model", "devices", "ours predicted", "simulated", "spread", "bound", "gap",
        "best baseline", "ours/best", "ours/HexGen", "ours/Helix",
        "ours/best sim.", "ours/HexGen sim.", "ours/Helix sim.",
    )  # fmt: skip
    rows = []
    for result in results:
        if result.ours is None:
            continue
        ours, best, best_sim = result.ours, result.best, result.best_simulated
        rows.append(
            (
                result.name,
                str(result.devices),
                number(ours.predicted_tokens_s),
                number(ours.simulated_tokens_s),
                share(ours.spread),
                number(result.bound_tokens_s),
                share(result.gap),
                "-" if best is None else best.name,
                ratio(_ratio(result, best)),
                ratio(_ratio(result, result.other("HexGen"))),
                ratio(_ratio(result, result.other("Helix"))),
                ratio(_ratio(result, best_sim, simulated=True)),
                ratio(_ratio(result, result.other("HexGen"), simulated=True)),
                ratio(_ratio(result, result.other("Helix"), simulated=True)),
            )
        )
    title = (
        f"Ours against the baselines: {settings.seconds:g} s for our plan, {settings.baseline_seconds:g} s for "
        f"each baseline that searches, {settings.seeds} seeds of simulation"
    )
    return Grid(title, heads, tuple(rows))


def _ratio(result: CaseResult, other: Way | None, simulated: bool = False) -> float | None:
    if result.ours is None or other is None:
        return None
    if simulated:
        return over(result.ours.simulated_tokens_s, other.simulated_tokens_s)
    return over(result.ours.predicted_tokens_s, other.predicted_tokens_s)


def _everybody(results: list[CaseResult], title: str, field: str, digits: int) -> Grid:
    names = list(dict.fromkeys(way.name for result in results for way in result.others))
    rows = []
    for result in results:
        ways = {way.name: way for way in (*result.others, *([result.ours] if result.ours else []))}
        cells = [number(getattr(ways[name], field), digits) if name in ways else "-" for name in (OURS, *names)]
        rows.append((result.name, *cells))
    return Grid(title, ("cluster/model", OURS, *names), tuple(rows))


def _prices(results: list[CaseResult]) -> list[Grid]:
    known = [result for result in results if result.ours and result.ours.usd_per_million is not None]
    title = "USD per million output tokens, simulated (clusters whose prices are published)"
    return [_everybody(known, title, "usd_per_million", 2)] if known else []


# ---- goals -----------------------------------------------------------------------------------------------------


def _goals(results: list[CaseResult]) -> list[str]:
    found = [_never_below(results, simulated=False), _never_below(results, simulated=True)]
    for name, goal in GOALS.items():
        found += [_at_least(results, name, goal, simulated) for simulated in (False, True)]
    gaps = [result for result in results if result.gap is not None]
    wide = [f"{result.name} ({share(result.gap)})" for result in gaps if (result.gap or 0.0) > GAP_GOAL]
    met = f"{len(gaps) - len(wide)} of {len(gaps)}"
    found.append(f"Goal, gap to the proven bound at most {GAP_GOAL:.0%}: met on {met}" + _missed(wide))
    return found


def _never_below(results: list[CaseResult], simulated: bool) -> str:
    missed, asked = [], 0
    for result in results:
        best = result.best_simulated if simulated else result.best
        value = _ratio(result, best, simulated)
        if value is None or best is None or result.ours is None:
            continue
        asked += 1
        # Means of simulations differ by chance: as much as each one's seeds did.
        slack = max(_EQUAL, result.ours.spread / 2, best.spread / 2) if simulated else _EQUAL
        if value < 1 - slack:
            missed.append(f"{result.name} ({value:.2f} of {best.name})")
    how = "simulated" if simulated else "predicted"
    return f"Goal, never below the best baseline ({how}): met on {asked - len(missed)} of {asked}" + _missed(
        missed
    )


def _at_least(results: list[CaseResult], name: str, goal: float, simulated: bool) -> str:
    missed, near, asked = [], [], 0
    for result in results:
        other = result.other(name)
        value = _ratio(result, other, simulated)
        if value is None or other is None:
            continue
        if result.bound_tokens_s and other.predicted_tokens_s >= NEAR_BOUND * result.bound_tokens_s:
            near.append(result.name)
            continue
        asked += 1
        if value < goal:
            missed.append(f"{result.name} ({value:.2f}{_out_of_reach(result, other, goal)})")
    how = "simulated" if simulated else "predicted"
    text = f"Goal, at least {goal:g} times {name} ({how}): met on {asked - len(missed)} of {asked}" + _missed(
        missed
    )
    return text + (f" {name} is within {1 - NEAR_BOUND:.0%} of the bound on {', '.join(near)}." if near else "")


def _out_of_reach(result: CaseResult, other: Way, goal: float) -> str:
    """Where the proven bound itself is less than ``goal`` times what the baseline is predicted to serve."""
    most = over(result.bound_tokens_s, other.predicted_tokens_s)
    return f", and no plan exceeds {most:.2f}" if most is not None and most < goal else ""


def _missed(names: list[str]) -> str:
    return f"; missed on {', '.join(names)}." if names else "."
