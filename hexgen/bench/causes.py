"""Why a run differed from its prediction, in words, the largest part of the run first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hexgen.bench.against import Comparison, StageTimes
from hexgen.bench.measures import Measures
from hexgen.bench.record import Outcome
from hexgen.bench.run import Bench
from hexgen.units import format_time

_WORTH = 0.02  # of the run: less is not told
_MOST = 6
_ALIKE = 1.15  # factors below it are called the same
_RESTS = 0.25  # of the run: who waits as long is not what bounds it


@dataclass(frozen=True, slots=True)
class Finding:
    """``share``: how much of the longer run, or of a request's time, the difference is."""

    share: float
    what: str
    cause: str


def findings(comparison: Comparison, bench: Bench, *, tabled: bool) -> list[Finding]:
    """The largest differences with their likely causes. ``tabled``: step times came from a table, not the
    catalogue.
    """
    found = [
        finding
        for stage in comparison.stages
        for finding in _of_stage(stage, comparison, bench, tabled)
        if finding.share >= _WORTH
    ]
    found += _of_requests(comparison, bench)
    return sorted(found, key=lambda finding: -finding.share)[:_MOST]


def _of_stage(stage: StageTimes, comparison: Comparison, bench: Bench, tabled: bool) -> list[Finding]:
    if not stage.measured or stage.steps == 0:
        return []
    run_s = max(comparison.measured_s, comparison.simulated_s)
    found = []
    predicted, measured, host = stage.predicted["busy"], stage.busy_s, stage.measured["host"]
    if predicted > 0:
        text = (
            f"stage {stage.stage} was busy for {format_time(measured)}, predicted {_beside(predicted, measured)}"
        )
        outside = f"{format_time(host)} of it outside the model, {format_time(host / stage.steps)} a step"
        cause = _busy_cause(stage, measured / predicted, comparison, bench, tabled)
        found.append(Finding(abs(measured - predicted) / run_s, f"{text}; {outside}", cause))
    predicted, measured = stage.predicted["transfer"], stage.measured["transfer"]
    text = f"stage {stage.stage} passed on for {format_time(measured)}, predicted {_beside(predicted, measured)}"
    if measured <= predicted:
        cause = "small messages leave at once: the sender does not wait for the wire that the prediction counts"
    elif stage.sends_far:
        cause = (
            "sending waits for the wire or for a core: the link is slower than the cluster file says (`hexgen "
            "discover` measures it), the next stage reads late, or its machine is busy"
        )
    else:
        cause = "nothing leaves the node: passing on waits for a core, which stages share, or for who reads"
    found.append(Finding(abs(measured - predicted) / run_s, text, cause))
    return found


def _busy_cause(stage: StageTimes, factor: float, comparison: Comparison, bench: Bench, tabled: bool) -> str:
    """Either there were more steps than in simulation, or each took longer."""
    steps = comparison.steps / max(1, comparison.simulated.steps) if comparison.steps else 1.0
    each = factor / steps
    if max(steps, 1 / steps) > max(each, 1 / each) and max(steps, 1 / steps) > _ALIKE:
        more = f"{comparison.steps} steps ran where the simulation needs {comparison.simulated.steps}"
        return (
            f"{more}: they were emptier, because requests came out of step with one another"
            if steps > 1
            else f"{more}: they were fuller, because requests waited and were then served together"
        )
    besides = ""
    if max(steps, 1 / steps) > _ALIKE:
        besides = f" ({comparison.steps} steps ran where the simulation needs {comparison.simulated.steps})"
    if each > _ALIKE and bench.load > 1:
        return (
            f"each step took {each:.2f} times as long as predicted{besides}: other work had this machine's cores "
            f"already before the run ({bench.load:.1f} times as much as they can do)"
        )
    if each > _ALIKE and stage.measured["host"] > stage.busy_s / 2:
        return (
            f"each step took {each:.2f} times as long as predicted{besides}, most of it outside the model: "
            "batching, page tables, sampling, answering"
        )
    if each > _ALIKE and tabled:
        return (
            f"each step took {each:.2f} times as long as by the cost table{besides}: something else uses that "
            "machine, or it has fewer cores than its workers have threads"
        )
    if each > _ALIKE:
        return (
            f"each step took {each:.2f} times as long as the catalogue's figures say{besides}: measure this "
            "model's layers there with `hexgen discover --model` and give the table with --cost"
        )
    if each < 1 / _ALIKE:
        why = "the table was measured while other work ran" if tabled else "the device is faster than its figures"
        if tabled and stage.measured["wait"] > _RESTS * comparison.measured_s:
            why = "it rests between steps; where a quota bounds its processor's time, some is left for the next"
        return f"each step took {each:.2f} times as long as predicted{besides}: {why}"
    return "within the prediction's own error"


def _of_requests(comparison: Comparison, bench: Bench) -> list[Finding]:
    measures, outcome = bench.measures, bench.outcome
    found = []
    ttft_s = measures.mean("ttft")
    queue_s, server_s = _server_means(comparison, outcome)
    if ttft_s > 0 and queue_s > _WORTH * ttft_s:
        waited = comparison.simulated.mean("ttft")
        found.append(
            Finding(
                queue_s / ttft_s * _weight(measures, "ttft"),
                f"requests waited {format_time(queue_s)} for a route, in a mean TTFT of {format_time(ttft_s)}"
                f" (predicted, waiting included: {format_time(waited)})",
                "every route was full: the load is above what this plan serves now",
            )
        )
    door_s = ttft_s - server_s
    if ttft_s > 0 and door_s > 0.1 * ttft_s:
        found.append(
            Finding(
                door_s / ttft_s * _weight(measures, "ttft"),
                f"{format_time(door_s)} of the TTFT lie outside what the server counts",
                "connecting, HTTP or gRPC, the network, and this client; the prediction begins at the coordinator",
            )
        )
    cached = comparison.totals.get("cached_tokens_total", 0.0)
    if measures.input_tokens and cached > _WORTH * measures.input_tokens:
        share = cached / measures.input_tokens
        found.append(
            Finding(
                share,
                f"{share:.0%} of the prompt tokens came from the prefix cache",
                "prompts were repeated or begin alike; the prediction computes every prompt",
            )
        )
    preempted = comparison.totals.get("preemptions_total", 0.0)
    if preempted > comparison.simulated.preemptions + 0.01 * measures.completed:
        found.append(
            Finding(
                preempted / max(1, measures.completed),
                f"{preempted:.0f} sequences were preempted, in simulation {comparison.simulated.preemptions}",
                "KV room ran out: their tokens were computed again",
            )
        )
    return found


def _server_means(comparison: Comparison, outcome: Outcome) -> tuple[float, float]:
    """(waiting for a route, first token) by the server's own count, mean seconds a request; NaN unknown."""
    done = outcome.completed
    told = [r for r in done if not math.isnan(r.server_ttft_s)]
    if told:
        return (
            sum(r.server_queue_s for r in told) / len(told),
            sum(r.server_ttft_s for r in told) / len(told),
        )
    totals = comparison.totals

    def mean(name: str) -> float:
        count = totals.get(f"{name}_seconds_count", 0.0)
        return totals[f"{name}_seconds_sum"] / count if count > 0 else math.nan

    return mean("queue"), mean("ttft")


def _weight(measures: Measures, name: str) -> float:
    """The part of a request's time that a figure is: what differs in a small part is a small difference."""
    latency_s = measures.mean("e2el")
    return measures.mean(name) / latency_s if latency_s > 0 else 0.0


def _beside(predicted: float, measured: float) -> str:
    if predicted <= 0:
        return "none"
    factor = measured / predicted
    change = f"{factor - 1:+.0%}" if factor < 10 else f"{factor:.0f} times as much"
    return f"{format_time(predicted)} ({change})"
