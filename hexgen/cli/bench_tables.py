"""A benchmark as tables for people, and as one JSON object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hexgen.bench.against import Comparison, Figure
from hexgen.bench.causes import Finding
from hexgen.bench.measures import NAMES, PERCENTILES, detail
from hexgen.bench.run import Bench
from hexgen.cli._common import tables_console
from hexgen.cli._load import without_nan
from hexgen.cli.bench_request import BenchRequest, Load
from hexgen.units import format_time
from hexgen.workload import workload_to_dict

_TITLES = {
    "ttft": "TTFT (first token)",
    "tpot": "TPOT (each further token)",
    "itl": "ITL (between pieces)",
    "e2el": "E2EL (whole answer)",
}
_RATES = ("output tokens/s", "requests/s")


@dataclass(frozen=True, slots=True)
class Shown:
    asked: BenchRequest
    load: Load
    bench: Bench
    comparison: Comparison | None
    findings: tuple[Finding, ...]


def as_object(shown: Shown, *, detailed: bool) -> dict[str, Any]:
    """Plain values under the names of `vllm bench serve`; what could not be measured is null."""
    asked, bench = shown.asked, shown.bench
    workload = shown.load.fitting(bench.facts)
    closed = asked.concurrency is not None
    out: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": _backend(asked),
        "model_id": bench.facts.model,
        "num_prompts": len(bench.outcome.records),
        "request_rate": None if closed else "inf" if workload.rate == "max" else workload.rate,
        "burstiness": asked.burstiness,
        "max_concurrency": asked.concurrency,
        "seed": asked.seed,
        "workload": workload_to_dict(workload),
        "trace": None if asked.trace is None else str(asked.trace),
    }
    out |= bench.measures.summary()
    out["remarks"] = list(bench.remarks)
    if detailed:
        out |= detail(bench.outcome)
    if shown.comparison is not None:
        out["against"] = _comparison_object(shown.comparison, shown.findings, str(asked.against))
    value: dict[str, Any] = without_nan(out)
    return value


def _comparison_object(found: Comparison, causes: tuple[Finding, ...], plan: str) -> dict[str, Any]:
    return {
        "plan": plan,
        "simulated_duration": found.simulated_s,
        "measured_duration": found.measured_s,
        "steps": {"simulated": found.simulated.steps, "measured": found.steps},
        "figures": [
            {
                "name": f.name,
                "closed_form": _plain(f, f.closed_form),
                "simulated": _plain(f, f.simulated),
                "measured": _plain(f, f.measured),
                "measured_over_simulated": f.ratio,
            }
            for f in found.figures
        ],
        "stages": [
            {
                "stage": stage.stage,
                "steps": stage.steps,
                "predicted_s": stage.predicted,
                "measured_s": stage.measured or None,
            }
            for stage in found.stages
        ],
        "differences": [{"share": f.share, "what": f.what, "cause": f.cause} for f in causes],
    }


def _plain(figure: Figure, value: float) -> float:
    """Rates as they are, times in ms."""
    return value if figure.name in _RATES else value * 1e3


def _backend(asked: BenchRequest) -> str:
    if asked.grpc is not None:
        return "hexgen-grpc"
    return "openai-chat" if asked.chat else "openai"


# ---- tables -----------------------------------------------------------------------------------------------------


def show(shown: Shown) -> None:
    console = tables_console()
    tables = [_rates(shown), _times(shown.bench)]
    if shown.bench.measures.reasons:
        tables.append(_failures(shown.bench))
    if shown.comparison is not None:
        tables += [_figures(shown.comparison), _stages(shown.comparison)]
    for table in tables:
        console.print(table)
    if shown.comparison is not None:
        console.print(
            "closed form: the planner's steady state; its tokens/s and requests/s are those of saturation"
        )
    for remark in shown.bench.remarks:
        console.print(f"note: {escape(remark)}", soft_wrap=True)
    if shown.comparison is not None:
        _causes(console, shown)


def _rates(shown: Shown) -> Table:
    bench, measures, asked = shown.bench, shown.bench.measures, shown.asked
    workload = shown.load.fitting(bench.facts)
    table = Table(title=f"{escape(bench.facts.model)}, measured", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    if asked.concurrency is not None:
        sent = f"{asked.concurrency} at a time"
    elif workload.rate == "max":
        sent = "all at once"
    else:
        sent = f"{workload.rate:.3g} requests/s, burstiness {asked.burstiness:g}"
        sent = f"{workload.rate:.3g} requests/s, from the trace" if asked.trace is not None else sent
    table.add_row("load", sent)
    counts = f"{measures.completed} completed, {measures.failed} failed"
    if measures.unfinished:
        counts += f", {measures.unfinished} unfinished"
    table.add_row("requests", counts)
    table.add_row("duration", format_time(measures.duration_s))
    table.add_row("prompt tokens, output tokens", f"{measures.input_tokens}, {measures.output_tokens}")
    table.add_row(
        "output tokens/s", f"{measures.tokens_s:.1f} (most in a second {measures.peak_output_tokens_s:.0f})"
    )
    table.add_row("requests/s", f"{measures.requests_s:.3f}")
    if measures.goodput is not None:
        share = measures.good or 0
        table.add_row("goodput, requests/s", f"{measures.goodput:.3f} ({share} of {measures.completed})")
    table.add_row("requests in the busiest second", str(measures.peak_concurrency))
    return table


def _times(bench: Bench) -> Table:
    table = Table(title_justify="left")
    for name in ("", "mean", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(name, justify="right" if name else "left")
    for name in NAMES:
        figures = [bench.measures.mean(name), *(bench.measures.percentile(name, p) for p in PERCENTILES)]
        table.add_row(_TITLES[name], *(_time(figure) for figure in figures))
    return table


def _failures(bench: Bench) -> Table:
    table = Table(title_justify="left")
    table.add_column("failed", justify="right")
    table.add_column("why", overflow="fold")
    for reason, count in bench.measures.reasons.items():
        table.add_row(str(count), escape(reason))
    return table


def _figures(found: Comparison) -> Table:
    table = Table(title="predicted and measured", title_justify="left")
    for name in ("", "closed form", "simulated", "measured", "measured/simulated"):
        table.add_column(name, justify="right" if name else "left")
    for figure in found.figures:
        cells = [figure.closed_form, figure.simulated, figure.measured]
        if figure.name in _RATES:
            shown = ["-" if math.isnan(cell) else f"{cell:.2f}" for cell in cells]
        else:
            shown = [_time(cell) for cell in cells]
        ratio = "-" if math.isnan(figure.ratio) else f"{figure.ratio:.2f}"
        table.add_row(_title(figure), *shown, ratio)
    return table


def _title(figure: Figure) -> str:
    kind, _, name = figure.name.partition(" ")
    return f"{name.upper()} {kind}" if name in NAMES else figure.name


def _stages(found: Comparison) -> Table:
    table = Table(title="seconds of each stage over the run, predicted / measured", title_justify="left")
    for name in ("stage", "steps", "busy", "of it compute", "of it host", "wait", "transfer"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in found.stages:
        told = stage.measured
        measured = {"busy": stage.busy_s, **told} if told else {}
        pairs = {kind: f"{stage.predicted[kind]:.2f} / {_seconds(measured, kind)}" for kind in stage.predicted}
        table.add_row(
            escape(stage.stage),
            str(stage.steps or "?"),
            pairs["busy"],
            _seconds(measured, "compute"),
            _seconds(measured, "host"),
            pairs["wait"],
            pairs["transfer"],
        )
    table.add_row("whole run", str(found.steps or "?"), f"{found.simulated_s:.2f} / {found.measured_s:.2f}")
    return table


def _seconds(measured: dict[str, float], kind: str) -> str:
    return f"{measured[kind]:.2f}" if kind in measured else "?"


def _causes(console: Console, shown: Shown) -> None:
    if shown.comparison is not None and not any(stage.measured for stage in shown.comparison.stages):
        console.print("note: this server does not say where its stages' time goes")
    if not shown.findings:
        console.print("no difference is large enough to name a cause")
        return
    console.print("largest differences, and their likely causes:")
    for finding in shown.findings:
        console.print(f"  {finding.share:4.0%}  {escape(finding.what)}", soft_wrap=True)
        console.print(f"        {escape(finding.cause)}", soft_wrap=True)


def _time(value: float) -> str:
    return "-" if math.isnan(value) else format_time(value)
