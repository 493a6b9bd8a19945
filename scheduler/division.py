"""How layers divide over stages whose times are known: shortest longest stage, least sum, most within a threshold.

Two kinds of times, one contract: `LinearSeconds` (a roofline's, what most searches spend their time in) and
`TabledSeconds` (any that do not fall with layers). Every stage gets a layer at least, and at most its cap.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

Division = tuple[int, ...]
_TOLERANCE = 1e-12  # relative


class Seconds(Protocol):
    """Times of a fixed order of stages. ``caps`` must leave room for ``layers``."""

    def longest(self, division: Sequence[int]) -> float: ...

    def total(self, division: Sequence[int]) -> float: ...

    def shortest_max(self, layers: int, caps: Sequence[int]) -> Division:
        """Minimise the longest stage: each next layer to whoever would finish it first."""
        ...

    def cheapest(self, layers: int, caps: Sequence[int]) -> Division:
        """Minimise the sum."""
        ...

    def capped(self, caps: Sequence[int], threshold: float) -> list[int]:
        """The most layers of each stage within ``threshold`` seconds (never fewer than one)."""
        ...

    def thresholds(self, caps: Sequence[int], floor: float, ceiling: float) -> list[float]:
        """Every time that the longest stage could take, from ``floor`` to ``ceiling`` (and one step beyond)."""
        ...


@dataclass(frozen=True, slots=True)
class LinearSeconds:
    """``fixed[i] + slopes[i] * layers``, with positive slopes."""

    fixed: Sequence[float]
    slopes: Sequence[float]

    def longest(self, division: Sequence[int]) -> float:
        return max(f + s * n for f, s, n in zip(self.fixed, self.slopes, division, strict=True))

    def total(self, division: Sequence[int]) -> float:
        return sum(f + s * n for f, s, n in zip(self.fixed, self.slopes, division, strict=True))

    def shortest_max(self, layers: int, caps: Sequence[int]) -> Division:
        fixed, slopes = self.fixed, self.slopes
        division = [1] * len(caps)
        heap = [(fixed[i] + 2 * slopes[i], i) for i in range(len(caps)) if caps[i] > 1]
        heapq.heapify(heap)
        for _ in range(layers - len(caps)):
            finish, i = heap[0]
            division[i] += 1
            if division[i] < caps[i]:
                heapq.heapreplace(heap, (finish + slopes[i], i))
            else:
                heapq.heappop(heap)
        return tuple(division)

    def cheapest(self, layers: int, caps: Sequence[int]) -> Division:
        """Fill the cheapest stages first."""
        division = [1] * len(caps)
        left = layers - len(caps)
        for i in sorted(range(len(caps)), key=lambda i: (self.slopes[i], i)):
            taken = min(left, caps[i] - 1)
            division[i] += taken
            left -= taken
        return tuple(division)

    def capped(self, caps: Sequence[int], threshold: float) -> list[int]:
        reach = threshold * (1 + _TOLERANCE)
        return [
            max(1, min(cap, int((reach - f) / s) if reach > f else 0))
            for cap, f, s in zip(caps, self.fixed, self.slopes, strict=True)
        ]

    def thresholds(self, caps: Sequence[int], floor: float, ceiling: float) -> list[float]:
        values = {floor}
        for f, s, cap in zip(self.fixed, self.slopes, caps, strict=True):
            first = max(1, math.floor((floor - f) / s))
            last = min(cap, math.ceil((ceiling - f) / s)) if math.isfinite(ceiling) else cap
            values.update(f + s * n for n in range(first, last + 1) if f + s * n > floor)
        return sorted(values)


@dataclass(frozen=True, slots=True)
class TabledSeconds:
    """``rows[i][layers]``, non-decreasing from one layer on; each row reaches at least to its stage's cap."""

    rows: Sequence[Sequence[float]]

    def longest(self, division: Sequence[int]) -> float:
        return max(row[n] for row, n in zip(self.rows, division, strict=True))

    def total(self, division: Sequence[int]) -> float:
        return sum(row[n] for row, n in zip(self.rows, division, strict=True))

    def shortest_max(self, layers: int, caps: Sequence[int]) -> Division:
        """Exact for any non-decreasing times: a layer refused now would be as late in any other division."""
        division = [1] * len(caps)
        heap = [(self.rows[i][2], i) for i in range(len(caps)) if caps[i] > 1]
        heapq.heapify(heap)
        for _ in range(layers - len(caps)):
            _, i = heap[0]
            division[i] += 1
            if division[i] < caps[i]:
                heapq.heapreplace(heap, (self.rows[i][division[i] + 1], i))
            else:
                heapq.heappop(heap)
        return tuple(division)

    def cheapest(self, layers: int, caps: Sequence[int]) -> Division:
        """By least increments where these grow (convex times), else by dynamic programming over stages."""
        if all(_convex(row, cap) for row, cap in zip(self.rows, caps, strict=True)):
            return self._by_increments(layers, caps)
        return self._by_programming(layers, caps)

    def capped(self, caps: Sequence[int], threshold: float) -> list[int]:
        reach = threshold * (1 + _TOLERANCE)
        return [max(1, bisect_right(row, reach, 1, cap + 1) - 1) for row, cap in zip(self.rows, caps, strict=True)]

    def thresholds(self, caps: Sequence[int], floor: float, ceiling: float) -> list[float]:
        values = {floor}
        for row, cap in zip(self.rows, caps, strict=True):
            last = min(cap, bisect_left(row, ceiling, 1, cap + 1))
            values.update(row[n] for n in range(bisect_right(row, floor, 1, cap + 1), last + 1))
        return sorted(values)

    def _by_increments(self, layers: int, caps: Sequence[int]) -> Division:
        division = [1] * len(caps)
        heap = [(self.rows[i][2] - self.rows[i][1], i) for i in range(len(caps)) if caps[i] > 1]
        heapq.heapify(heap)
        for _ in range(layers - len(caps)):
            _, i = heap[0]
            division[i] += 1
            n = division[i]
            if n < caps[i]:
                heapq.heapreplace(heap, (self.rows[i][n + 1] - self.rows[i][n], i))
            else:
                heapq.heappop(heap)
        return tuple(division)

    def _by_programming(self, layers: int, caps: Sequence[int]) -> Division:
        """``least[k]``: the least sum of the stages so far when they hold ``k`` layers (min-plus convolution)."""
        least = np.full(layers + 1, np.inf)
        least[0] = 0.0
        taken: list[np.ndarray[tuple[int], np.dtype[np.intp]]] = []
        for row, cap in zip(self.rows, caps, strict=True):
            trials = np.full((min(cap, layers), layers + 1), np.inf)
            for n in range(1, len(trials) + 1):
                trials[n - 1, n:] = least[:-n] + row[n]
            chosen = trials.argmin(axis=0)
            least = trials[chosen, np.arange(layers + 1)]
            taken.append(chosen + 1)
        division: list[int] = []
        left = layers
        for choice in reversed(taken):
            division.append(int(choice[left]))
            left -= division[-1]
        return tuple(reversed(division))


def _convex(row: Sequence[float], cap: int) -> bool:
    steps = [b - a for a, b in pairwise(row[1 : cap + 1])]
    return all(b >= a * (1 - 1e-9) for a, b in pairwise(steps))
