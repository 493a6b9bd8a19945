"""Time to the first plan and to the final one, against the size of the cluster."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from hexgen.model import load_model
from hexgen.scheduler.generate import generate
from planning.cases import case
from planning.ours import plan_case
from planning.plots import Line, Panel, draw
from planning.report import Grid, Report, number, share
from planning.settings import Settings

SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Devices -> seconds of wall clock: goals for the first plan, and for the final one.
FIRST_S = {64: 1.0, 1024: 5.0}
FINAL_S = {4096: 60.0}


@dataclass(frozen=True, slots=True)
class Timed:
    """``first``: with a time limit of zero, which ends the search at the first plan; ``final``: without one."""

    devices: int
    first_wall_s: float
    first_cpu_s: float
    first_tokens_s: float
    final_wall_s: float
    final_cpu_s: float
    final_tokens_s: float
    bound_tokens_s: float | None

    @property
    def gap(self) -> float | None:
        return None if not self.bound_tokens_s else max(0.0, 1 - self.final_tokens_s / self.bound_tokens_s)


def timed(devices: int) -> Timed:
    """A generated cluster of that size, its regions drawn at random, as `hexgen.scheduler.generate` has it."""
    cluster = generate(devices, seed=0)
    asked = case(cluster, load_model(cluster.model or ""), name=f"{devices} devices")
    first = plan_case(asked, seconds=0.0)
    final = plan_case(asked)
    return Timed(
        devices,
        first.wall_s,
        first.cpu_s,
        first.predicted.tokens_s,
        final.wall_s,
        final.cpu_s,
        final.predicted.tokens_s,
        final.predicted.upper_bound_tokens_s,
    )


def run(settings: Settings, plots: Path | None = None) -> Report:
    found = [timed(devices) for devices in (SIZES[:2] if settings.quick else SIZES)]
    rows = tuple(
        (
            str(entry.devices),
            number(entry.first_wall_s, 2),
            number(entry.first_cpu_s, 2),
            number(entry.first_tokens_s),
            number(entry.final_wall_s, 1),
            number(entry.final_cpu_s, 1),
            number(entry.final_tokens_s),
            share(entry.gap),
        )
        for entry in found
    )
    heads = (
        "devices", "first, s", "CPU s", "tokens/s", "final, s", "CPU s", "tokens/s", "gap to bound"
    )  # fmt: skip
    grid = Grid("Seconds to the first plan and to the final one, by devices (generated clusters)", heads, rows)
    findings = _goals(found, FIRST_S, "first_wall_s", "first plan") + _goals(
        found, FINAL_S, "final_wall_s", "final plan"
    )
    drawn = (_plot(found, plots / "planner-time.svg"),) if plots else ()
    return Report("scale", (grid,), tuple(findings), {"sizes": [asdict(entry) for entry in found]}, drawn)


def _goals(found: list[Timed], goals: dict[int, float], field: str, what: str) -> list[str]:
    told = []
    for entry in found:
        if entry.devices in goals:
            limit, took = goals[entry.devices], getattr(entry, field)
            met = "met" if took <= limit else "missed"
            told.append(f"Goal, {what} at {entry.devices} devices within {limit:g} s: {met} ({took:.2f} s).")
    return told


def _plot(found: list[Timed], path: Path) -> Path:
    sizes = [entry.devices for entry in found]
    lines = (
        Line("final plan", sizes, [entry.final_wall_s for entry in found]),
        Line("final plan, CPU", sizes, [entry.final_cpu_s for entry in found], dashed=True),
        Line("first plan", sizes, [entry.first_wall_s for entry in found]),
        Line("first plan, CPU", sizes, [entry.first_cpu_s for entry in found], dashed=True),
    )
    return draw(path, [Panel("Planning time", "devices", "seconds", lines, log_x=True, log_y=True)])
