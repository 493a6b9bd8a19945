"""Interleaved rounds of contenders, and ratios of their speeds: machines are shared and drift, so only what was
measured alternately in one run is compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Contender:
    run: Callable[[], int]  # produces tokens and says how many
    cpu_s: Callable[[], float]  # processor seconds so far

    def speeds(self) -> Speeds:
        cpu, began = self.cpu_s(), time.perf_counter()
        produced = self.run()
        wall = time.perf_counter() - began
        return Speeds(produced / wall, produced / max(1e-9, self.cpu_s() - cpu))


@dataclass(frozen=True, slots=True)
class Speeds:
    tokens_s: float  # on the wall
    tokens_cpu_s: float  # per second of processor time


@dataclass(frozen=True, slots=True)
class Ratio:
    """Tokens/s of ``a`` over tokens/s of ``b``, round by round."""

    name: str
    goal: float | None
    median: float
    smallest: float
    largest: float
    a_tokens_s: float
    b_tokens_s: float
    cpu_median: float  # the same in tokens per second of processor time
    cpu_smallest: float
    cpu_largest: float
    a_tokens_cpu_s: float
    b_tokens_cpu_s: float


def race(rounds: int, contenders: Mapping[str, Contender]) -> dict[str, list[Speeds]]:
    """Everybody once to warm up, then ``rounds`` times one after the other; each round begins with another one."""
    for contender in contenders.values():
        contender.run()
    names = list(contenders)
    found: dict[str, list[Speeds]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(contenders[name].speeds())
    return found


def ratio(name: str, goal: float | None, a: list[Speeds], b: list[Speeds]) -> Ratio:
    wall = [x.tokens_s / y.tokens_s for x, y in zip(a, b, strict=True)]
    cpu = [x.tokens_cpu_s / y.tokens_cpu_s for x, y in zip(a, b, strict=True)]
    return Ratio(
        name=name,
        goal=goal,
        median=statistics.median(wall),
        smallest=min(wall),
        largest=max(wall),
        a_tokens_s=statistics.median(x.tokens_s for x in a),
        b_tokens_s=statistics.median(x.tokens_s for x in b),
        cpu_median=statistics.median(cpu),
        cpu_smallest=min(cpu),
        cpu_largest=max(cpu),
        a_tokens_cpu_s=statistics.median(x.tokens_cpu_s for x in a),
        b_tokens_cpu_s=statistics.median(x.tokens_cpu_s for x in b),
    )
