"""What one run says: tokens/s while it was full, and beside it what was predicted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Run:
    """One closed-loop run. Times in seconds; ``simulated_...`` are of the same requests."""

    tokens_s: float  # while every route was full
    whole_tokens_s: float  # from the first request's start to the last answer
    simulated_tokens_s: float  # of the whole run
    ttft_s: float  # medians
    tpot_s: float
    simulated_ttft_s: float
    simulated_tpot_s: float
    cores: dict[str, float]
    throttled: dict[str, float]
    failed: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A plan on a laboratory with a model, predicted and measured."""

    lab: str
    model: str
    names: tuple[str, ...]
    shape: str
    predicted_tokens_s: float
    concurrency: int
    requests: int
    others: float  # cores that other programs kept busy before the runs
    runs: tuple[Run, ...]

    @property
    def measured_tokens_s(self) -> float:
        return statistics.median(run.tokens_s for run in self.runs)

    @property
    def off(self) -> float:
        """Measured over predicted, less one."""
        return self.measured_tokens_s / self.predicted_tokens_s - 1

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def entry_of(plain: dict[str, Any]) -> Entry:
    runs = tuple(Run(**run) for run in plain["runs"])
    return Entry(**{**plain, "names": tuple(plain["names"]), "runs": runs})


def full_tokens_s(found: dict[str, Any], concurrency: int) -> float:
    """Output tokens/s from when as many requests have ended as ran at once, until the last one was sent.

    Before that the requests are in step with one another; after it the routes run empty.
    """
    begins = found["start_times"]
    ends = sorted(start + (e2el or 0.0) for start, e2el in zip(begins, found["e2els"], strict=True))
    since, until = ends[min(concurrency, len(ends)) - 1], max(begins)
    if until <= since:
        return math.nan
    tokens = 0
    for start, ttft, gaps in zip(begins, found["ttfts"], found["itls"], strict=True):
        at = start + (ttft or 0.0)
        tokens += since <= at < until
        for gap in gaps:
            at += gap
            tokens += since <= at < until
    return float(tokens / (until - since))


def run_of(found: dict[str, Any], cores: dict[str, float], throttled: dict[str, float], concurrency: int) -> Run:
    """Of the JSON that `hexgen bench --detailed --against` writes."""
    simulated = {figure["name"]: figure["simulated"] for figure in found["against"]["figures"]}
    return Run(
        tokens_s=full_tokens_s(found, concurrency),
        whole_tokens_s=found["output_throughput"],
        simulated_tokens_s=simulated["output tokens/s"],
        ttft_s=found["median_ttft_ms"] / 1e3,
        tpot_s=found["median_tpot_ms"] / 1e3,
        simulated_ttft_s=simulated["p50 ttft"] / 1e3,
        simulated_tpot_s=simulated["p50 tpot"] / 1e3,
        cores={name: round(value, 3) for name, value in cores.items()},
        throttled={name: round(value, 3) for name, value in throttled.items()},
        failed=found["failed"],
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Over all entries: the limits of what is to be shown."""

    median_off: float  # of the prediction
    worst_off: float
    median_error: float  # of what was measured
    worst_error: float
    pairs: int  # of plans whose predictions differ by more than 10 %
    wrong: tuple[str, ...]  # of these, whose order was measured otherwise


def verdict(entries: Sequence[Entry]) -> Verdict:
    offs = sorted(abs(entry.off) for entry in entries)
    errors = sorted(abs(entry.predicted_tokens_s / entry.measured_tokens_s - 1) for entry in entries)
    pairs, wrong = 0, []
    for i, a in enumerate(entries):
        for b in entries[i + 1 :]:
            if (a.lab, a.model) != (b.lab, b.model):
                continue
            low, high = sorted((a, b), key=lambda entry: entry.predicted_tokens_s)
            if high.predicted_tokens_s > 1.1 * low.predicted_tokens_s:
                pairs += 1
                if high.measured_tokens_s <= low.measured_tokens_s:
                    wrong.append(f"{a.lab}, {a.model}: {high.names[0]} before {low.names[0]}")
    return Verdict(statistics.median(offs), offs[-1], statistics.median(errors), errors[-1], pairs, tuple(wrong))
