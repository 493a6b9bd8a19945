"""Tables and the picture of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labs.figures import Entry, entry_of, verdict

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs" / "lab.md"
PLOT = ROOT / "docs" / "plots" / "lab-headline.svg"
BEGIN, END = "<!-- predictions: benchmarks/lab_predictions.py -->", "<!-- end of predictions -->"


def shown(entries: Sequence[Entry]) -> str:
    """A row a plan, and what they come to."""
    if not entries:
        return "nothing measured"
    lines = [
        "| lab | model | plan | layers by node | predicted | measured: median (least to most) | off |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for e in entries:
        each = [run.tokens_s for run in e.runs]
        lines.append(
            f"| {e.lab} | {e.model} | {', '.join(e.names)} | {e.shape} | {e.predicted_tokens_s:.1f} "
            f"| {e.measured_tokens_s:.1f} ({min(each):.1f} to {max(each):.1f}) | {e.off:+.1%} |"
        )
    found = verdict(entries)
    lines += [
        "",
        f"Measured is off what was predicted by {found.median_off:.1%} in the median of {len(entries)} plans and "
        f"{found.worst_off:.1%} at worst; predicted is off what was measured by {found.median_error:.1%} and "
        f"{found.worst_error:.1%}. "
        f"{found.pairs} pairs of plans differ by more than 10 % in prediction; measured the other way round: "
        f"{', '.join(found.wrong) or 'none'}.",
        "",
        _simulated(entries),
    ]
    return "\n".join(lines)


def _simulated(entries: Sequence[Entry]) -> str:
    """Simulated against measured over the same requests."""
    parts = []
    for name, measured, simulated in (
        ("tokens/s", "whole_tokens_s", "simulated_tokens_s"),
        ("TTFT p50", "ttft_s", "simulated_ttft_s"),
        ("TPOT p50", "tpot_s", "simulated_tpot_s"),
    ):
        ratios = [
            statistics.median(getattr(run, measured) / getattr(run, simulated) for run in entry.runs)
            for entry in entries
        ]
        within = sum(abs(ratio - 1) <= 0.2 for ratio in ratios)
        parts.append(
            f"{name} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}; "
            f"{within} of {len(ratios)} within 20 %)"
        )
    return (
        "Measured over simulated, the same requests, median of the plans (smallest to largest): "
        + "; ".join(parts)
        + "."
    )


def headline(late: Sequence[dict[str, Any]], entries: Sequence[Entry]) -> str:
    if not late:
        return ""
    lines = [
        "| lab | whose | plan for tokens/s | tokens/s: median (least to most) | plan for deadlines | rate "
        "| 99 % met: median (least to most) |",
        "|---|---|---|---:|---|---:|---:|",
    ]
    for found in late:
        entry = _entry(found, entries)
        each = [run.tokens_s for run in entry.runs]
        met = [float(np.percentile(values, 99)) for values in found["latencies_s"]]
        lines.append(
            f"| {found['lab']} | {found['name']} | {entry.shape} | {entry.measured_tokens_s:.1f} "
            f"({min(each):.1f} to {max(each):.1f}) | {found['shape']} | {found['rate']:.2f}/s "
            f"| {statistics.median(met):.2f} s ({min(met):.2f} to {max(met):.2f}) |"
        )
    return "\n".join(lines)


def open_loop(late: Sequence[dict[str, Any]]) -> str:
    """Simulated against measured under Poisson arrivals."""
    told = [found for found in late if found.get("medians")]
    if not told:
        return ""
    parts = []
    for name in ("ttft", "tpot", "e2el"):
        ratios = [statistics.median(run[name] for run in found["medians"]) for found in told]
        parts.append(f"{name.upper()} {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    plans = ", ".join(f"{found['lab']} {found['name']}" for found in told)
    return (
        f"Under these arrivals, medians measured over simulated, median of the runs ({plans}): {'; '.join(parts)}."
    )


def _entry(found: dict[str, Any], entries: Sequence[Entry]) -> Entry:
    """The plan's closed-loop runs."""
    return next(e for e in entries if (e.lab, e.model) == (found["lab"], "demo") and found["name"] in e.names)


def raw(entries: Sequence[Entry]) -> str:
    lines = ["| lab | model | plan | tokens/s of each run |", "|---|---|---|---|"]
    for e in entries:
        each = ", ".join(f"{run.tokens_s:.1f}" for run in e.runs)
        lines.append(f"| {e.lab} | {e.model} | {', '.join(e.names)} | {each} |")
    return "\n".join(lines)


def draw_headline(late: Sequence[dict[str, Any]], entries: Sequence[Entry], path: Path = PLOT) -> None:
    """Share of requests within a deadline, all runs together, a panel a laboratory."""
    from planning.plots import Line, Panel, draw

    panels = []
    for lab in dict.fromkeys(found["lab"] for found in late):
        lines, rate = [], 0.0
        for found in (found for found in late if found["lab"] == lab):
            rate = found["rate"]
            every = np.concatenate([np.array(values) for values in found["latencies_s"]])
            share = np.linspace(0.02, 1, 50)
            label = f"{found['name']}; saturated {_entry(found, entries).measured_tokens_s:.0f} tokens/s"
            lines.append(
                Line(label, np.quantile(every, share).tolist(), share.tolist(), dashed=found["name"] != "ours")
            )
        title = f"lab-{lab}, {rate:.1f} requests/s"
        panels.append(Panel(title, "deadline, s", "requests that meet it", lines, level=0.99))
    draw(path, panels, across=3)


def write_docs(kept: dict[str, list[dict[str, Any]]]) -> None:
    entries = [entry_of(entry) for entry in kept["entries"]]
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [
        BEGIN,
        f"Measured on {kept['date']}.",
        shown(entries),
        headline(kept["deadlines"], entries),
        open_loop(kept["deadlines"]),
        raw(entries),
    ]
    DOCS.write_text(before + "\n\n".join(part for part in parts if part) + "\n\n" + END + after)
    if kept["deadlines"]:
        draw_headline(kept["deadlines"], entries)
