"""The figures of a run, with the names and definitions of `vllm bench serve` (vllm/benchmarks/serve.py).

Of completed requests: TTFT is the first token's time after sending; TPOT is (latency - TTFT) / (output tokens
- 1), of requests with more than one; ITL is the gap between two successive pieces of a stream, over all of them;
E2EL is the time from sending to the last token. Throughput is over the whole run, from its start to its last
answer. Percentiles are interpolated linearly, as numpy does.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hexgen.bench.record import Outcome, Record
from hexgen.workload import Slo

Floats = npt.NDArray[np.float64]
PERCENTILES = (50, 90, 99)
NAMES = ("ttft", "tpot", "itl", "e2el")
_MOST_REASONS = 20
OTHER_REASONS = "other reasons"


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """Rates are per second; ``times_s`` by name as in ``NAMES``, in seconds, empty where nothing was measured."""

    completed: int
    failed: int
    unfinished: int  # cut off when the run was ended, or never sent
    duration_s: float
    input_tokens: int
    output_tokens: int
    good: int | None  # requests within every limit; None: there are no limits
    times_s: dict[str, Floats]
    reasons: dict[str, int]  # why requests failed, most frequent first
    peak_output_tokens_s: float  # pieces, in the busiest second
    peak_concurrency: int  # requests that were under way in some part of the busiest second
    late_s: Floats  # of every sent request: how much later than due it was sent

    def mean(self, name: str) -> float:
        values = self.times_s[name]
        return float(values.mean()) if values.size else math.nan

    def std(self, name: str) -> float:
        values = self.times_s[name]
        return float(values.std()) if values.size else math.nan

    def percentile(self, name: str, percent: float) -> float:
        values = self.times_s[name]
        return float(np.percentile(values, percent)) if values.size else math.nan

    @property
    def requests_s(self) -> float:
        return self._rate(self.completed)

    @property
    def tokens_s(self) -> float:
        return self._rate(self.output_tokens)

    @property
    def goodput(self) -> float | None:
        return None if self.good is None else self._rate(self.good)

    def _rate(self, count: float) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0

    def summary(self) -> dict[str, Any]:
        """Plain values under vLLM's names, times in ms; null where nothing was measured."""
        out: dict[str, Any] = {
            "duration": self.duration_s,
            "completed": self.completed,
            "failed": self.failed,
            "unfinished": self.unfinished,
            "total_input_tokens": self.input_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": self.requests_s,
            "request_goodput": self.goodput,
            "output_throughput": self.tokens_s,
            "total_token_throughput": self._rate(self.input_tokens + self.output_tokens),
            "max_output_tokens_per_s": self.peak_output_tokens_s,
            "max_concurrent_requests": self.peak_concurrency,
        }
        for name in NAMES:
            figures = {"mean": self.mean(name), "median": self.percentile(name, 50), "std": self.std(name)}
            figures |= {f"p{percent}": self.percentile(name, percent) for percent in PERCENTILES}
            out |= {f"{kind}_{name}_ms": _ms(value) for kind, value in figures.items()}
        out["failures"] = self.reasons
        return out


def measures_of(outcome: Outcome, slo: Slo | None = None) -> Measures:
    """``slo``: the limits of goodput; none, or one without any limit, leaves goodput out."""
    done = outcome.completed
    limits = slo if slo is not None and slo != Slo() else None
    gaps = [np.diff(np.frombuffer(r.times)) for r in done if len(r.times) > 1]
    tpots = np.array([r.tpot_s for r in done])
    peak_tokens_s, peak_concurrency = _peaks(done)
    failed = outcome.failed
    return Measures(
        completed=len(done),
        failed=len(failed),
        unfinished=len(outcome.records) - len(done) - len(failed),
        duration_s=outcome.duration_s,
        input_tokens=sum(r.prompt_tokens for r in done),
        output_tokens=sum(r.output_tokens for r in done),
        good=None if limits is None else sum(within(r, limits) for r in done),
        times_s={
            "ttft": np.array([r.ttft_s for r in done]),
            "tpot": tpots[~np.isnan(tpots)] if tpots.size else tpots,
            "itl": np.concatenate(gaps) if gaps else np.zeros(0),
            "e2el": np.array([r.latency_s for r in done]),
        },
        reasons=_reasons(failed),
        peak_output_tokens_s=peak_tokens_s,
        peak_concurrency=peak_concurrency,
        late_s=np.array([r.sent_s - r.due_s for r in outcome.records if not math.isnan(r.sent_s)]),
    )


def within(record: Record, slo: Slo) -> bool:
    """Whether a completed request kept every limit; a single token has a TPOT of 0, as vLLM counts it."""
    tpot_s = 0.0 if math.isnan(record.tpot_s) else record.tpot_s
    pairs = ((slo.ttft_s, record.ttft_s), (slo.tpot_s, tpot_s), (slo.latency_s, record.latency_s))
    return all(limit is None or value <= limit for limit, value in pairs)


def _reasons(failed: list[Record]) -> dict[str, int]:
    counts = Counter(record.error or "" for record in failed).most_common()
    found = dict(counts[:_MOST_REASONS])
    rest = sum(count for _, count in counts[_MOST_REASONS:])
    return found | ({OTHER_REASONS: rest} if rest else {})


def _peaks(done: list[Record]) -> tuple[float, int]:
    """In seconds counted from the first sending, as vLLM does: pieces, and requests that touch the second."""
    if not done:
        return 0.0, 0
    start_s = min(r.sent_s for r in done)
    seconds = int(max(r.times[-1] for r in done) - start_s) + 2
    pieces = np.zeros(seconds, dtype=np.int64)
    change = np.zeros(seconds + 1, dtype=np.int64)
    for r in done:
        np.add.at(pieces, (np.frombuffer(r.times) - start_s).astype(np.int64), 1)
        change[int(r.sent_s - start_s)] += 1
        change[int(r.times[-1] - start_s) + 1] -= 1
    return float(pieces.max()), int(np.cumsum(change).max())


def _ms(value: float) -> float | None:
    return None if math.isnan(value) else value * 1e3


def detail(outcome: Outcome) -> dict[str, Any]:
    """Each request's own figures, under the names of `vllm bench serve --save-detailed`; times in seconds."""
    records = outcome.records

    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "input_lens": [r.prompt_tokens or r.ask.prompt_tokens for r in records],
        "output_lens": [r.output_tokens for r in records],
        "start_times": [known(r.sent_s - outcome.started_s) for r in records],
        "ttfts": [r.ttft_s if r.times else None for r in records],
        "itls": [np.diff(np.frombuffer(r.times)).tolist() if len(r.times) > 1 else [] for r in records],
        "e2els": [r.latency_s if r.completed else None for r in records],
        "errors": [r.error or "" for r in records],
    }
