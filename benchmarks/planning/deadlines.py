"""HexGen's way to judge a pool: the share of requests that end within a multiple of A100s' own latency.

HexGen (ICML 2024, section 5): Poisson arrivals of chat prompts, 32, 64 or 128 tokens in and out; a request's
deadline is a scale times what it takes alone on A100s. One simulation at a rate answers for every scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from hexgen.plan import Plan
from hexgen.scheduler.simulation import Requests, simulate
from hexgen.scheduler.simulation.requests import Floats
from hexgen.workload import Lengths, Slo, Workload
from planning.cases import Case, published
from planning.ours import plan_case

LENGTHS = (32, 64, 128)  # tokens, of prompts and of outputs, equally likely
REFERENCE = "hexgen-homogeneous16"
TARGET = 0.99
_WARM = 0.1  # of the requests, not judged
_APART_S = 1000.0
_STOP = 300.0  # a scale that is of no interest: the pool is overloaded, and more so at higher rates

Reference = Mapping[tuple[int, int], float]  # (prompt, output) tokens -> seconds alone on the A100s


def chat(limit_s: float | None = None, rate: float | None = None) -> Workload:
    """The same requests by their means, as planners are told; ``limit_s``: of the mean request's latency."""
    mean = Lengths(mean=sum(LENGTHS) / len(LENGTHS), max=max(LENGTHS))
    return Workload(mean, mean, "max" if rate is None else rate, Slo(latency_s=limit_s))


def requests(count: int, seed: int = 0) -> Requests:
    """At one request a second, to be squeezed or stretched with ``at_rate``."""
    gaps, prompts, outputs = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    arrival_s: Floats = np.cumsum(gaps.exponential(1.0, count))
    return Requests(
        arrival_s,
        prompts.choice(LENGTHS, count),
        outputs.choice(LENGTHS, count),
    )


def reference() -> Reference:
    """Each kind of request alone on the homogeneous pool, on the plan that answers one soonest, simulated."""
    asked = published(REFERENCE)
    made = plan_case(Case(asked.name, asked.cluster, asked.model, chat()), "latency").plan
    pairs = list(product(LENGTHS, LENGTHS))
    arrival_s: Floats = np.arange(len(pairs), dtype=np.float64) * _APART_S
    alone = Requests(
        arrival_s,
        np.array([prompt for prompt, _ in pairs]),
        np.array([output for _, output in pairs]),
    )
    found = simulate(made, asked.cluster, asked.model, alone)
    return dict(zip(pairs, found.latency_s.tolist(), strict=True))


def mean_s(alone: Reference) -> float:
    """Of the mix: every kind is equally likely."""
    return sum(alone.values()) / len(alone)


@dataclass(frozen=True, slots=True)
class Curve:
    """What one plan does: at each rate the latencies of the judged requests, in multiples of their references.

    Sorted; infinite where a request was refused.
    """

    rates: tuple[float, ...]
    scales: tuple[tuple[float, ...], ...]

    def attainment(self, i: int, scale: float) -> float:
        values = self.scales[i]
        return float(np.searchsorted(values, scale, side="right")) / len(values)

    def scale_at(self, i: int, target: float = TARGET) -> float:
        """The smallest scale that so many requests keep, at the i-th rate."""
        values = self.scales[i]
        return values[max(0, math.ceil(target * len(values) - 1e-9) - 1)]

    def peak_rate(self, scale: float, target: float = TARGET) -> float:
        """The largest rate that keeps the target, between rates by a line in logarithms; 0 where none does."""
        best = 0.0
        for i, rate in enumerate(self.rates):
            here = self.scale_at(i, target)
            if here <= scale:
                best = rate
                continue
            if i and self.scale_at(i - 1, target) <= scale and math.isfinite(here):
                before = self.scale_at(i - 1, target)
                along = math.log(scale / before) / math.log(here / before)
                best = max(best, self.rates[i - 1] * (rate / self.rates[i - 1]) ** along)
            break
        return best


def curve(
    made: Plan,
    asked: Case,
    alone: Reference,
    rates: Sequence[float],
    least: int,
    most: int,
    span_s: float,
    stop: float = _STOP,
) -> Curve:
    """The plan at each of the rates, in order, until ``TARGET`` of the requests need a scale above ``stop``.

    ``span_s`` of arrivals, but at least ``least`` and at most ``most`` requests; the same ones at every rate.
    """
    pattern = requests(most)
    done: list[float] = []
    scales: list[tuple[float, ...]] = []
    for rate in rates:
        count = min(most, max(least, int(rate * span_s)))
        # The pattern has one request a second on average; its first part may differ by chance, and keeps that.
        part = Requests(
            pattern.arrival_s[:count] / rate, pattern.prompt_tokens[:count], pattern.output_tokens[:count]
        )
        found = simulate(made, asked.cluster, asked.model, part)
        pairs = zip(part.prompt_tokens.tolist(), part.output_tokens.tolist(), strict=True)
        deadlines = np.array([alone[pair] for pair in pairs])
        judged = np.nan_to_num(found.latency_s / deadlines, nan=np.inf)[int(count * _WARM) :]
        done.append(rate)
        scales.append(tuple(float(value) for value in np.sort(judged)))
        if float(np.quantile(judged, TARGET, method="higher")) > stop:
            break
    return Curve(tuple(done), tuple(scales))


def rates_from(first: float, last: float, steps_per_doubling: int) -> list[float]:
    count = round(math.log2(last / first) * steps_per_doubling)
    return [first * 2 ** (i / steps_per_doubling) for i in range(count + 1)]
