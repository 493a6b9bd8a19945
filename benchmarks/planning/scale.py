"""Time to the first plan and to the final one, against the size of the cluster.

Two kinds of clusters: every region drawn for itself, and all regions alike (Helix's mix), which are planned once.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from hexgen.model import load_model
from hexgen.scheduler.generate import generate
from planning.cases import case
from planning.ours import Planned, plan_case
from planning.plots import Line, Panel, draw
from planning.report import Grid, Report, number, share
from planning.settings import Settings

SIZES = (16, 64, 256, 1024, 4096)
ALIKE = (64, 1024, 4096)
# Devices -> seconds of wall clock: goals for the first plan, and for the final one.
FIRST_S = {64: 1.0, 1024: 5.0}
FINAL_S = {4096: 60.0}
LIMITED, LIMIT_S = 4096, 60.0  # from so many devices on, searches have so long: what the goal is about
DRAWN, EQUAL = "drawn", "alike"


@dataclass(frozen=True, slots=True)
class Took:
    """One plan."""

    wall_s: float
    cpu_s: float
    tokens_s: float


@dataclass(frozen=True, slots=True)
class Timed:
    """``first``: with a time limit of zero, which ends the search at the first plan.

    ``heuristic`` and ``auto``: the engines of those names, with a time limit where there are many devices;
    ``bound_tokens_s``: of the latter.
    """

    devices: int
    regions: str
    first: Took
    heuristic: Took
    auto: Took
    bound_tokens_s: float | None

    @property
    def gap(self) -> float | None:
        return None if not self.bound_tokens_s else max(0.0, 1 - self.auto.tokens_s / self.bound_tokens_s)


def timed(devices: int, regions: str) -> Timed:
    cluster = generate(devices, seed=0 if regions == DRAWN else None)
    asked = case(cluster, load_model(cluster.model or ""), name=f"{devices} devices")
    first = plan_case(asked, seconds=0.0)
    limit_s = LIMIT_S if devices >= LIMITED else None
    quick = plan_case(asked, engine="heuristic", seconds=limit_s)
    final = plan_case(asked, seconds=limit_s)
    return Timed(devices, regions, _took(first), _took(quick), _took(final), final.predicted.upper_bound_tokens_s)


def _took(made: Planned) -> Took:
    return Took(made.wall_s, made.cpu_s, made.predicted.tokens_s)


def run(settings: Settings, plots: Path | None = None) -> Report:
    asked = [(devices, DRAWN) for devices in SIZES] + [(devices, EQUAL) for devices in ALIKE]
    found = []
    for devices, regions in asked[:2] if settings.quick else asked:
        found.append(timed(devices, regions))
        print(f"{devices} devices, regions {regions}: {found[-1]}", file=sys.stderr, flush=True)
    heads = (
        "devices", "regions", "first, s", "CPU s", "tokens/s", "heuristic, s", "CPU s", "tokens/s", "auto, s",
        "CPU s", "tokens/s", "gap to bound",
    )  # fmt: skip
    grid = Grid(
        "Seconds to the first plan, of the heuristic and of the usual search (auto), by devices; from "
        f"{LIMITED:,} on, the latter two with a limit of {LIMIT_S:g} s",
        heads,
        tuple(_row(entry) for entry in found),
    )
    findings = [*_goals(found, FIRST_S, "first"), *_goals(found, FINAL_S, "heuristic")]
    findings += _goals(found, FINAL_S, "auto")
    drawn = (_plot(found, plots / "planner-time.svg"),) if plots else ()
    return Report("scale", (grid,), tuple(findings), {"sizes": [asdict(entry) for entry in found]}, drawn)


def _row(entry: Timed) -> tuple[str, ...]:
    first, quick, auto = entry.first, entry.heuristic, entry.auto
    return (
        str(entry.devices),
        entry.regions,
        number(first.wall_s, 2),
        number(first.cpu_s, 2),
        number(first.tokens_s),
        number(quick.wall_s, 1),
        number(quick.cpu_s, 1),
        number(quick.tokens_s),
        number(auto.wall_s, 1),
        number(auto.cpu_s, 1),
        number(auto.tokens_s),
        share(entry.gap),
    )


def _goals(found: list[Timed], goals: dict[int, float], what: str) -> list[str]:
    told = []
    for entry in found:
        if entry.devices in goals:
            limit, took = goals[entry.devices], getattr(entry, what)
            met = "met" if took.wall_s <= limit else "missed"
            told.append(
                f"Goal, {what} plan at {entry.devices} devices, regions {entry.regions}, within {limit:g} s: "
                f"{met} ({took.wall_s:.2f} s; {took.cpu_s:.2f} s of CPU)."
            )
    return told


def _plot(found: list[Timed], path: Path) -> Path:
    lines = []
    for regions in (DRAWN, EQUAL):
        some = [entry for entry in found if entry.regions == regions]
        sizes = [entry.devices for entry in some]
        for what in ("auto", "heuristic", "first"):
            seconds = [getattr(entry, what).wall_s for entry in some]
            lines.append(Line(f"{what}, regions {regions}", sizes, seconds, dashed=regions == EQUAL))
    return draw(path, [Panel("Planning time", "devices", "seconds", lines, log_x=True, log_y=True)])
