"""What a simulation found: each request's times, and the rates, shares and percentiles that follow from them.

Names and definitions are those of `vllm bench serve`: TTFT is the first token's time after arrival; TPOT is
(latency - TTFT) / (output tokens - 1), of requests with more than one; ITL is the gap between two successive
tokens of a request, over all of them; E2EL is the time from arrival to the last token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.simulation.record import REFUSED, Recorder
from hexgen.scheduler.simulation.requests import Floats, Ints, Requests
from hexgen.workload import Slo

if TYPE_CHECKING:
    from hexgen.scheduler.simulation.layout import Layout
    from hexgen.scheduler.simulation.native import NativeRun
    from hexgen.scheduler.simulation.run import Run

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, eq=False)
class SimulationResult:
    """Arrays have one entry a request, in order of arrival; NaN where it did not happen.

    Rates, busy shares and statistics are over the window from ``started_s`` to ``ended_s``: rates count what
    happened in it, means and percentiles the requests that finished in it; what limits are kept is asked of those
    that arrived in it. Gaps between tokens are counted from the start.
    """

    arrival_s: Floats
    ttft_s: Floats
    tpot_s: Floats  # NaN also for a single token
    latency_s: Floats
    output_tokens: Ints  # delivered to requests that finished
    route: Ints  # which took it; -1: none
    started_s: float
    ended_s: float
    tokens_s: float  # output tokens a second
    requests_s: float  # finished requests a second
    finished: int  # of all requests
    rejected: int
    unfinished: int
    preemptions: int
    steps: int
    stage_busy: dict[str, float]  # share of the window
    link_busy: tuple[float, ...]
    sample_s: Floats  # [samples]
    kv_used: Floats  # [samples, routes], share of the route's pages
    running: Ints  # [samples, routes], sequences
    itl_s: Floats = field(repr=False)  # middles of bins of 1 %
    itl_counts: Ints = field(repr=False)
    itl_mean_s: float
    slo: Slo

    @property
    def in_window(self) -> npt.NDArray[np.bool_]:
        """Requests that arrived in the window."""
        found: npt.NDArray[np.bool_] = (self.arrival_s >= self.started_s) & (self.arrival_s <= self.ended_s)
        return found

    def percentile(self, name: str, percent: float) -> float:
        """Of ``ttft``, ``tpot``, ``itl`` or ``e2el``, in seconds; NaN where there is none."""
        if name == "itl":
            return self._itl_percentile(percent)
        values = self._values(name)
        return float(np.percentile(values, percent)) if values.size else float("nan")

    def mean(self, name: str) -> float:
        if name == "itl":
            return self.itl_mean_s
        values = self._values(name)
        return float(values.mean()) if values.size else float("nan")

    def _values(self, name: str) -> Floats:
        values: Floats = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2el": self.latency_s}[name]
        ends = self.arrival_s + self.latency_s  # NaN compares false: unfinished ones are out
        values = values[(ends >= self.started_s) & (ends <= self.ended_s)]
        return values[~np.isnan(values)]

    def _itl_percentile(self, percent: float) -> float:
        total = int(self.itl_counts.sum())
        if total == 0:
            return float("nan")
        return float(self.itl_s[int(np.searchsorted(np.cumsum(self.itl_counts), percent / 100 * total))])

    # ---- limits ----------------------------------------------------------------------------------------------

    def kept(self, slo: Slo) -> npt.NDArray[np.bool_]:
        """Which requests finished within all limits."""
        good: npt.NDArray[np.bool_] = ~np.isnan(self.latency_s)
        for limit, values in _limits(slo, self):
            good &= np.isnan(values) | (values <= limit)
        return good

    def attainment(self, slo: Slo | None = None) -> float:
        """The share of the window's requests that keep all limits; NaN where none can be judged.

        Refused ones count as missed, and so do unfinished ones that are late already. Those that the clock's end
        found within their limits say nothing, and are left out.
        """
        asked = slo or self.slo
        judged = self.in_window & (~np.isnan(self.latency_s) | self._late(asked))
        return float(self.kept(asked)[judged].mean()) if judged.any() else float("nan")

    def _late(self, slo: Slo) -> npt.NDArray[np.bool_]:
        """Requests without an end that have missed a limit already: refused, or waiting for too long."""
        age = self.ended_s - self.arrival_s
        late: npt.NDArray[np.bool_] = self.refused.copy()
        if slo.ttft_s is not None:
            late |= np.isnan(self.latency_s) & (np.where(np.isnan(self.ttft_s), age, self.ttft_s) > slo.ttft_s)
        if slo.latency_s is not None:
            late |= np.isnan(self.latency_s) & (age > slo.latency_s)
        return late

    @property
    def refused(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.route == REFUSED)

    def latency_attainment(self, deadline_s: float | Floats) -> float:
        """The share of the window's requests that end within ``deadline_s``: one for all, or one a request.

        HexGen's figures scale a reference's latency for the same request (ICML 2024, section 5.2): one run answers
        for every scale.
        """
        late = np.isnan(self.latency_s) & ((self.ended_s - self.arrival_s > deadline_s) | self.refused)
        judged = self.in_window & (~np.isnan(self.latency_s) | late)
        good = self.latency_s <= deadline_s
        return float(good[judged].mean()) if judged.any() else float("nan")

    def goodput(self, slo: Slo | None = None) -> float:
        """Requests a second that ended in the window and kept all limits."""
        ends = self.arrival_s + self.latency_s
        good = self.kept(slo or self.slo) & (ends >= self.started_s) & (ends <= self.ended_s)
        span_s = self.ended_s - self.started_s
        return float(good.sum()) / span_s if span_s > 0 else 0.0

    # ---- as one object ---------------------------------------------------------------------------------------

    def summary(self) -> dict[str, float | int]:
        """Plain figures, named as `vllm bench serve` writes them (times in ms)."""
        window = self.in_window
        span_s = self.ended_s - self.started_s
        out: dict[str, float | int] = {
            "duration": span_s,
            "completed": self.finished,
            "rejected": self.rejected,
            "unfinished": self.unfinished,
            "request_throughput": self.requests_s,
            "output_throughput": self.tokens_s,
            "request_goodput": self.goodput(),
            "attainment": self.attainment(),
            "preemptions": self.preemptions,
            "requests_in_window": int(window.sum()),
        }
        for name in ("ttft", "tpot", "itl", "e2el"):
            out[f"mean_{name}_ms"] = self.mean(name) * 1e3
            out[f"median_{name}_ms"] = self.percentile(name, 50) * 1e3
            for percent in PERCENTILES:
                out[f"p{percent}_{name}_ms"] = self.percentile(name, percent) * 1e3
        return out


def _limits(slo: Slo, result: SimulationResult) -> list[tuple[float, Floats]]:
    pairs = ((slo.ttft_s, result.ttft_s), (slo.tpot_s, result.tpot_s), (slo.latency_s, result.latency_s))
    return [(limit, values) for limit, values in pairs if limit is not None]


def result_of(
    layout: Layout, requests: Requests, recorder: Recorder, run: Run | NativeRun, slo: Slo
) -> SimulationResult:
    arrival = np.asarray(recorder.arrival_s)
    ttft = np.asarray(recorder.first_s) - arrival
    latency = np.asarray(recorder.finish_s) - arrival
    outputs = np.asarray(recorder.outputs, dtype=np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(outputs > 1, (latency - ttft) / (outputs - 1), np.nan)
    span_s = run.now_s - run.started_s
    each_s = 1 / span_s if span_s > 0 else 0.0
    pages = np.array([path.limits.pages for path in layout.routes])
    middles, counts = recorder.gap_histogram()
    finished = int((~np.isnan(latency)).sum())
    return SimulationResult(
        arrival_s=arrival,
        ttft_s=ttft,
        tpot_s=tpot,
        latency_s=latency,
        output_tokens=outputs,
        route=np.asarray(recorder.route, dtype=np.int64),
        started_s=run.started_s,
        ended_s=run.now_s,
        tokens_s=run.tokens * each_s,
        requests_s=run.finished * each_s,
        finished=finished,
        rejected=recorder.rejected,
        unfinished=len(requests) - finished - recorder.rejected,
        preemptions=run.preemptions,
        steps=run.steps,
        stage_busy={name: min(1.0, busy * each_s) for name, busy in zip(layout.stages, run.busy_s, strict=True)},
        link_busy=tuple(min(1.0, busy * each_s) for busy in run.link_busy_s),
        sample_s=np.asarray(recorder.sample_s),
        # Without a single sample there are still so many routes.
        kv_used=np.asarray(recorder.sample_used, dtype=np.float64).reshape(-1, len(pages)) / pages,
        running=np.asarray(recorder.sample_running, dtype=np.int64).reshape(-1, len(pages)),
        itl_s=middles,
        itl_counts=counts,
        itl_mean_s=recorder.gap_sum_s / max(1, int(counts.sum())),
        slo=slo,
    )
