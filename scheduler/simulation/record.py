"""What is written down while a simulation runs."""

from __future__ import annotations

import math

import numpy as np

from hexgen.scheduler.simulation.requests import Floats, Ints, Requests
from hexgen.workload import Slo

# Gaps between tokens are counted in bins of one percent, from a microsecond to about a day.
GAP_LEAST_S = 1e-6
GAP_BINS = 2560
GAP_LOG_WIDTH = math.log(1.01)
REFUSED = -2  # instead of a route
SAMPLES = 1024  # of occupancy; at twice as many, every other one goes


def gap_bin(seconds: float) -> int:
    place = int(math.log(max(seconds, GAP_LEAST_S) / GAP_LEAST_S) / GAP_LOG_WIDTH)
    return min(place, GAP_BINS - 1)


def gap_edges(place: int) -> tuple[float, float]:
    """Gaps of that bin are at least the one and less than the other; the outer bins hold all beyond."""
    low = GAP_LEAST_S * math.exp(place * GAP_LOG_WIDTH) if place else -math.inf
    return low, GAP_LEAST_S * math.exp((place + 1) * GAP_LOG_WIDTH) if place < GAP_BINS - 1 else math.inf


class Recorder:
    """Plain lists and counters: this is written to once a token at worst."""

    def __init__(self, requests: Requests, routes: int, slo: Slo, judged_from: int, allowed_misses: int | None):
        count = len(requests)
        self.arrival_s: list[float] = requests.arrival_s.tolist()
        self.first_s = [math.nan] * count
        self.finish_s = [math.nan] * count
        self.outputs = [0] * count  # tokens delivered to a finished request
        self.route = [-1] * count  # -1: none yet
        self.rejected = 0
        self.tokens = 0  # output tokens that came back
        self.prompt_tokens = 0  # of requests whose first token came
        self.gap_counts = [0] * GAP_BINS
        self.gap_sum_s = 0.0
        self.sample_s: list[float] = []
        self.sample_used: list[list[int]] = []  # KV pages of each route
        self.sample_running: list[list[int]] = []  # sequences of each route
        self.next_sample_s = 0.0
        self._spacing_s = 0.01
        self._slo = slo
        self._judged_from = judged_from
        self._allowed = allowed_misses
        self._missed: set[int] = set()
        self.hopeless = False  # more requests have missed their limits than was allowed
        self._begun = self._done = judged_from  # all before these have begun, or ended, or missed a limit

    @property
    def judging(self) -> bool:
        """Whether the run may end as soon as too many have missed their limits."""
        return self._allowed is not None

    def crowd(self, now_s: float) -> float:
        """Requests in the system at a time, on average up to now (Little's law)."""
        stays = (
            (now_s if math.isnan(finish) else finish) - arrival
            for arrival, finish in zip(self.arrival_s, self.finish_s, strict=True)
            if arrival < now_s
        )
        return sum(stays) / now_s if now_s > 0 else 0.0

    def refuse(self, request: int) -> None:
        self.rejected += 1
        self.route[request] = REFUSED
        self._miss(request)

    def first_token(self, request: int, now_s: float) -> None:
        self.first_s[request] = now_s
        limit = self._slo.ttft_s
        if limit is not None and now_s - self.arrival_s[request] > limit:
            self._miss(request)

    def finish(self, request: int, outputs: int, now_s: float) -> None:
        self.finish_s[request] = now_s
        self.outputs[request] = outputs
        slo = self._slo
        late = slo.latency_s is not None and now_s - self.arrival_s[request] > slo.latency_s
        if not late and slo.tpot_s is not None and outputs > 1:
            late = now_s - self.first_s[request] > slo.tpot_s * (outputs - 1)
        if late:
            self._miss(request)

    def _miss(self, request: int) -> None:
        if request >= self._judged_from:
            self._missed.add(request)
            self.hopeless = self._allowed is not None and len(self._missed) > self._allowed

    def look(self, now_s: float) -> None:
        """Whoever waits for longer than a limit has missed it, and a trial need not run until they are served."""
        if self._slo.ttft_s is not None:
            self._begun = self._overdue(self._begun, now_s - self._slo.ttft_s, self.first_s)
        if self._slo.latency_s is not None:
            self._done = self._overdue(self._done, now_s - self._slo.latency_s, self.finish_s)

    def _overdue(self, first: int, before_s: float, came_s: list[float]) -> int:
        arrivals = self.arrival_s
        while first < len(arrivals) and arrivals[first] < before_s:
            if math.isnan(came_s[first]):
                self._miss(first)
            first += 1
        return first

    def gaps(self, seconds: float, count: int) -> None:
        """``count`` tokens came ``seconds`` after the one before them."""
        self.gap_sum_s += seconds * count
        self.gap_counts[gap_bin(seconds)] += count

    def sample(self, now_s: float, used: list[int], running: list[int]) -> None:
        self.sample_s.append(now_s)
        self.sample_used.append(used)
        self.sample_running.append(running)
        if len(self.sample_s) >= 2 * SAMPLES:
            del self.sample_s[1::2], self.sample_used[1::2], self.sample_running[1::2]
            self._spacing_s *= 2
        self.next_sample_s = now_s + self._spacing_s

    def gap_histogram(self) -> tuple[Floats, Ints]:
        """Middles of the bins in seconds, and the tokens in each."""
        middles: Floats = GAP_LEAST_S * np.exp(GAP_LOG_WIDTH * (np.arange(GAP_BINS) + 0.5))
        return middles, np.asarray(self.gap_counts, dtype=np.int64)
