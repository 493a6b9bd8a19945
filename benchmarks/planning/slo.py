"""Attainment over rates: our plan and every baseline on HexGen's pools, under HexGen's workload."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hexgen.errors import InfeasibleError
from hexgen.plan import Plan
from hexgen.scheduler.compare import baselines
from hexgen.scheduler.task import make_task
from planning.cases import Case, published, with_workload
from planning.deadlines import TARGET, Curve, Reference, chat, curve, mean_s, rates_from, reference
from planning.ours import plan_case, same
from planning.plots import Line, Panel, draw
from planning.report import Grid, Report, number, over, ratio
from planning.settings import Settings

POOLS = ("hexgen-full58", "hexgen-half30", "hexgen-homogeneous16")
SCALES = (8.0,)  # deadline over the A100s' own latency
_OURS = "ours"
_HOPELESS = 4.0  # times the deadline: higher rates are not looked at


@dataclass(frozen=True, slots=True)
class Judged:
    pool: str
    way: str
    scale: float
    curve: Curve

    @property
    def peak(self) -> float:
        return self.curve.peak_rate(self.scale)


def ways(asked: Case, settings: Settings) -> Iterator[tuple[str, Plan]]:
    """Everybody's plan for the workload's limits."""
    try:
        yield _OURS, plan_case(asked, "slo", settings.seconds / 4).plan
    except InfeasibleError:
        return
    task = make_task(asked.cluster, asked.model, asked.workload, "slo", None, 0, "auto", None)
    for baseline in baselines(task, "slo", settings.baseline_seconds):
        if baseline.plan is not None:
            yield baseline.name, baseline.plan


def judge(settings: Settings, alone: Reference) -> list[Judged]:
    pools = ("hexgen-homogeneous16",) if settings.quick else POOLS
    rates = rates_from(1.0, 8.0, 1) if settings.quick else rates_from(1.0, 128.0, 2)
    least, most, span_s = (200, 400, 10.0) if settings.quick else (500, 2500, 60.0)
    found = []
    for pool in pools:
        for scale in SCALES:
            asked = with_workload(published(pool), chat(scale * mean_s(alone)))
            known: list[tuple[Plan, Curve]] = []
            for name, made in ways(asked, settings):
                judged = next((c for other, c in known if same(made, other)), None)
                if judged is None:
                    judged = curve(made, asked, alone, rates, least, most, span_s, _HOPELESS * scale)
                    known.append((made, judged))
                found.append(Judged(pool, name, scale, judged))
    return found


def run(settings: Settings, plots: Path | None = None) -> Report:
    alone = reference()
    found = judge(settings, alone)
    names = list(dict.fromkeys(entry.way for entry in found))
    rows = []
    findings = []
    for pool in dict.fromkeys(entry.pool for entry in found):
        for scale in dict.fromkeys(entry.scale for entry in found):
            peaks = {e.way: e.peak for e in found if e.pool == pool and e.scale == scale}
            rows.append((pool, f"{scale:g}", *(number(peaks.get(name), 2) for name in names)))
            others = {name: peak for name, peak in peaks.items() if name != _OURS}
            if _OURS in peaks and others:
                best = max(others, key=lambda name: others[name])
                value = over(peaks[_OURS], others[best])
                findings.append(
                    f"{pool}, scale {scale:g}: ours carries {number(peaks[_OURS], 2)} requests/s, and {best}, the "
                    f"best baseline, {number(others[best], 2)}: {ratio(value)} times."
                )
    title = (
        f"Requests/s at which {TARGET:.0%} end within scale x the A100s' own latency "
        f"({mean_s(alone):.2f} s on average)"
    )
    grid = Grid(title, ("pool", "scale", *names), tuple(rows))
    drawn = (_plot(found, plots / "planner-slo.svg"),) if plots else ()
    figures = {
        "reference_s": {f"{p}/{o}": seconds for (p, o), seconds in alone.items()},
        "curves": [
            {
                "pool": entry.pool,
                "way": entry.way,
                "scale": entry.scale,
                "rates": entry.curve.rates,
                "attainment": [entry.curve.attainment(i, entry.scale) for i in range(len(entry.curve.rates))],
                "peak_rate": entry.peak,
            }
            for entry in found
        ],
    }
    return Report("slo", (grid,), tuple(findings), figures, drawn)


def _plot(found: list[Judged], path: Path) -> Path:
    panels = []
    for pool, scale in dict.fromkeys((entry.pool, entry.scale) for entry in found):
        lines = [
            Line(e.way, e.curve.rates, [e.curve.attainment(i, scale) for i in range(len(e.curve.rates))])
            for e in found
            if e.pool == pool and e.scale == scale
        ]
        title = f"{pool}, deadline {scale:g} x A100"
        panels.append(Panel(title, "requests/s", "share in time", lines, log_x=True, level=TARGET))
    return draw(path, panels)
