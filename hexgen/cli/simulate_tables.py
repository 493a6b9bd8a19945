"""A simulation as tables for people, and as one JSON object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from hexgen.cli._common import tables_console
from hexgen.cli._load import without_nan
from hexgen.plan import Plan, Prediction
from hexgen.scheduler.simulation import SimulationResult
from hexgen.scheduler.simulation.result import PERCENTILES
from hexgen.units import format_time
from hexgen.workload import Slo, Workload, workload_to_dict

_ROUTES_SHOWN = 40
_TITLES = {
    "ttft": "TTFT (first token)",
    "tpot": "TPOT (each further token)",
    "itl": "ITL (between tokens)",
    "e2el": "E2EL (whole answer)",
}


@dataclass(frozen=True, slots=True)
class Simulated:
    plan: Plan
    workload: Workload
    trace: str | None
    seed: int
    result: SimulationResult
    predicted: Prediction
    largest_rate: float | None  # requests/s; None: not asked for


def as_object(found: Simulated) -> dict[str, Any]:
    """Plain values; what could not be measured is null. Times in ms, as `vllm bench serve` writes them."""
    result, predicted = found.result, found.predicted
    out: dict[str, Any] = {"model": found.plan.model, "workload": workload_to_dict(found.workload)}
    out |= {"trace": found.trace, "seed": found.seed} | result.summary()
    if found.workload.slo == Slo():
        out["attainment"] = out["request_goodput"] = None
    out["mean_itl_ms"] = _mean(result, "itl") * 1e3
    if found.largest_rate is not None:
        out["largest_rate"] = found.largest_rate
    out["predicted"] = {
        "output_throughput": predicted.tokens_s,
        "request_throughput": predicted.requests_s,
        "ttft_ms": predicted.ttft_s * 1e3,
        "tpot_ms": predicted.tpot_s * 1e3,
        "e2el_ms": predicted.latency_s * 1e3,
    }
    out["stages"] = [{"stage": name, "busy": busy} for name, busy in result.stage_busy.items()]
    out["routes"] = [_route(found, number) for number in range(len(found.plan.routes))]
    value: dict[str, Any] = without_nan(out)
    return value


def _mean(result: SimulationResult, name: str) -> float:
    """In seconds; NaN where there is none, also of gaps."""
    return math.nan if math.isnan(result.percentile(name, 50)) else result.mean(name)


def _route(found: Simulated, number: int) -> dict[str, Any]:
    result = found.result
    kept = result.sample_s >= result.started_s
    used, running = result.kv_used[kept, number], result.running[kept, number]
    return {
        "path": [hop.stage for hop in found.plan.routes[number].path],
        "requests": int((result.route == number).sum()),
        "kv_used_mean": float(used.mean()) if used.size else math.nan,
        "kv_used_peak": float(used.max()) if used.size else math.nan,
        "running_mean": float(running.mean()) if running.size else math.nan,
    }


def show(found: Simulated) -> None:
    console = tables_console()
    for table in (_rates(found), _times(found), _stages(found), _routes(found)):
        console.print(table)


def _rates(found: Simulated) -> Table:
    result, predicted = found.result, found.predicted
    table = Table(title=f"{found.plan.model}, simulated", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    span = f"{format_time(result.started_s)} to {format_time(result.ended_s)}"
    counts = f"{result.finished} finished, {result.rejected} refused, {result.unfinished} unfinished"
    table.add_row("requests", counts)
    table.add_row("counted from", span)
    table.add_row("output tokens/s", f"{result.tokens_s:.1f} (predicted {predicted.tokens_s:.1f} when saturated)")
    table.add_row("requests/s", f"{result.requests_s:.3f}")
    if found.workload.slo != Slo():
        table.add_row("within the limits", _cell(100 * result.attainment(), ".1f", " %"))
        table.add_row("goodput, requests/s", f"{result.goodput():.3f}")
    if found.largest_rate is not None:
        table.add_row("largest rate within the limits", f"{found.largest_rate:.3f} requests/s")
    table.add_row("steps, preemptions", f"{result.steps}, {result.preemptions}")
    return table


def _times(found: Simulated) -> Table:
    table = Table(title_justify="left")
    for name in ("", "mean", *(f"p{percent}" for percent in PERCENTILES), "predicted mean"):
        table.add_column(name, justify="right" if name else "left")
    predicted = found.predicted
    means = {"ttft": predicted.ttft_s, "tpot": predicted.tpot_s, "e2el": predicted.latency_s}
    for name, title in _TITLES.items():
        figures = [_mean(found.result, name), *(found.result.percentile(name, p) for p in PERCENTILES)]
        cells = ["-" if math.isnan(figure) else format_time(figure) for figure in figures]
        table.add_row(title, *cells, format_time(means[name]) if name in means else "")
    return table


def _stages(found: Simulated) -> Table:
    table = Table(title_justify="left")
    for name in ("stage", "layers", "devices", "busy"):
        table.add_column(name, justify="right" if name == "busy" else "left", overflow="fold")
    for stage in found.plan.stages:
        busy = found.result.stage_busy[stage.name]
        layers = f"[{stage.layers[0]}, {stage.layers[1]})"
        table.add_row(stage.name, layers, ", ".join(stage.devices), f"{100 * busy:.0f} %")
    return table


def _routes(found: Simulated) -> Table:
    table = Table(title_justify="left")
    for name in ("route", "path", "requests", "KV used (mean)", "(peak)", "running (mean)"):
        table.add_column(name, justify="left" if name in ("route", "path") else "right", overflow="fold")
    for number in range(min(len(found.plan.routes), _ROUTES_SHOWN)):
        row = _route(found, number)
        table.add_row(
            str(number),
            " > ".join(row["path"]),
            str(row["requests"]),
            _cell(100 * row["kv_used_mean"], ".0f", " %"),
            _cell(100 * row["kv_used_peak"], ".0f", " %"),
            _cell(row["running_mean"], ".1f"),
        )
    return table


def _cell(figure: float, shape: str, unit: str = "") -> str:
    return "-" if math.isnan(figure) else f"{figure:{shape}}{unit}"


def why_no_times(found: Simulated) -> str | None:
    """A line where no request ended while figures were counted; None where some did."""
    result = found.result
    if result.requests_s > 0:
        return None
    span = f"from {format_time(result.started_s)} to {format_time(result.ended_s)}"
    if result.unfinished == 0:
        return f"no request ended {span}, so there are no times; all others did before, or were refused"
    first_s = float(result.arrival_s.min())
    return (
        f"no request ended {span}, so there are no times: the first arrives at {format_time(first_s)}, and one "
        f"takes about {format_time(found.predicted.latency_s)}; let the clock run longer (--until)"
    )
