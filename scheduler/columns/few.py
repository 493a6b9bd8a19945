"""Pipelines of few stages, listed once: what each serves at most does not depend on prices.

Where nodes hold many devices the best pipelines have two to four wide stages, and relaxations of so small a
knapsack say little. There are few enough of them to bound one by one: roughly at first, closely (each number of
sequences by itself) when a price asks for it, and never again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import comb

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.columns.classes import Classes
from hexgen.scheduler.columns.cycles import fine
from hexgen.scheduler.columns.loads import Load, layers_within_each
from hexgen.scheduler.deadline import passed

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MOST = 60_000  # pipelines listed
_DEEPEST = 6
_ROUGH, _CLOSE = 1.5, 1.012  # ratios of the numbers of sequences that are bounded together
_NEVER = 1 << 20  # layers lost where a group cannot stand at an end

Loads = Callable[[int, int, int], Load | None]  # of a depth, and from so many to so many sequences


@dataclass(slots=True)
class _Listed:
    """Pipelines of one depth. ``value``: tokens/s that they do not exceed; ``close``: and it gets no closer."""

    types: Ints  # [pipelines, depth]
    pool: Ints  # [pipelines]: one that holds it
    delay_s: Floats  # of a round trip's travel, least over the pools that hold it
    token_s: Floats
    link_s: Floats  # seconds that one token keeps the busiest link
    value: Floats
    close: npt.NDArray[np.bool_]


class Few:
    """All pipelines of 2 to ``depth`` stages. ``work``: numbers worked out so far."""

    def __init__(self, classes: Classes, layers: int, most_sequences: int, loads: Loads) -> None:
        self.classes, self.layers, self.most, self._loads = classes, layers, most_sequences, loads
        self.depth = _deepest(len(classes.types), layers)
        self.work = 0.0
        self._lists: list[_Listed | None] = []  # of 2 stages, of 3, ...; None: no pool holds any

    def over(
        self, cost: Floats, floor: float, until: float | None
    ) -> list[tuple[float, tuple[int, ...], int]] | None:
        """(Value over price at most, types, number of a pool) of those above ``floor``, best first.

        ``until``: of time.monotonic(); None where that came before all were listed.
        """
        for depth in range(2 + len(self._lists), self.depth + 1):
            if passed(until):
                return None
            self._lists.append(self._list(depth))
        found: list[tuple[float, tuple[int, ...], int]] = []
        for listed in self._lists:
            if listed is None:
                continue
            price = cost[listed.types].sum(axis=1)
            rows = np.flatnonzero((listed.value > floor * price) & ~listed.close)
            if len(rows) and not passed(until):
                self._look_closely(listed, rows, floor * price[rows])
            for i in np.flatnonzero(listed.value > floor * price):
                types = tuple(int(t) for t in listed.types[i])
                found.append((float(listed.value[i] / price[i]), types, int(listed.pool[i])))
        return sorted(found, key=lambda item: (-item[0], item[1]))

    def _look_closely(self, listed: _Listed, rows: Ints, enough: Floats) -> None:
        """Halve the numbers of sequences with which these pipelines seem to serve more than is ``enough``."""
        best = np.zeros(len(rows))
        boxes = [(low, high, np.arange(len(rows))) for low, high in self._boxes()]
        while boxes:
            low, high, some = boxes.pop()
            load = self._loads(listed.types.shape[1], low, high)
            if load is None:
                continue
            value = self._served(listed, rows[some], load)
            last = high <= low * _CLOSE or load.exact
            more = (value > enough[some]) & (value > best[some]) & (not last)
            best[some[~more]] = np.maximum(best[some[~more]], value[~more])
            if more.any():
                middle = (low + high) // 2
                boxes += [(low, middle, some[more]), (middle + 1, high, some[more])]
        listed.value[rows] = np.minimum(listed.value[rows], best)
        listed.close[rows] = best > enough

    def _boxes(self) -> list[tuple[int, int]]:
        found, low = [], 1
        while low <= self.most:
            high = min(self.most, max(low, int(low * _ROUGH)))
            found.append((low, high))
            low = high + 1
        return found

    def _list(self, depth: int) -> _Listed | None:
        classes = self.classes
        every = list(combinations_with_replacement(range(len(classes.types)), depth))
        types = np.array(every, dtype=np.int64)
        counts = np.zeros((len(types), len(classes.types)), dtype=np.int16)
        for j in range(depth):
            counts[np.arange(len(types)), types[:, j]] += 1
        takes = counts @ classes.member.T.astype(np.int16)
        pool = np.full(len(types), len(classes.pools))
        delay, token, link = (np.full(len(types), np.inf) for _ in range(3))
        for number, there in enumerate(classes.pools):
            holds = (counts <= np.array(there.available)).all(axis=1) & (takes <= classes.devices(there)).all(
                axis=1
            )
            pool[holds & (pool == len(classes.pools))] = number
            fixed = there.travel_s(depth, 0.0)
            # The first stage's node and those behind a crossing are not entered by a hop of their area.
            more = [
                np.maximum(
                    0.0, hop_s[types[holds]].sum(axis=1) - _largest(entry_s[types[holds]], 1 + there.crossings)
                )
                for hop_s, entry_s in zip(classes.longer_hops(there), classes.entries(there), strict=True)
            ]
            delay[holds] = np.minimum(delay[holds], fixed + more[0])
            token[holds] = np.minimum(token[holds], there.travel_s(depth, 1.0) - fixed + more[1])
            link[holds] = np.minimum(link[holds], there.link_s(depth, 1.0))
        rows = np.flatnonzero(pool < len(classes.pools))
        if len(rows) == 0:
            return None
        listed = _Listed(
            types[rows],
            pool[rows],
            delay[rows],
            token[rows],
            link[rows],
            np.full(len(rows), np.inf),
            np.zeros(len(rows), dtype=bool),
        )
        self._look_closely(listed, np.arange(len(rows)), listed.value)
        return listed

    def _served(self, listed: _Listed, rows: Ints, load: Load) -> Floats:
        """[rows]: tokens/s at most with the load's numbers of sequences: the first cycles in which it would do."""
        cycles = fine(load)
        types = listed.types[rows]
        if load.slope_s is not None:  # the quickest first, as `_busy_s` fills them
            types = np.take_along_axis(types, load.slope_s[types].argsort(axis=1, kind="stable"), axis=1)
        travel = listed.delay_s[rows] + load.tokens * listed.token_s[rows]
        middle, first, last = (
            layers_within_each(row, cycles.held) for row in (load.middle, load.first, load.last)
        )
        at_first = np.where(first > 0, middle - first, _NEVER)
        at_last = np.where(last > 0, middle - last, _NEVER)
        low, high = np.zeros(len(rows), dtype=np.int64), np.full(len(rows), len(cycles))
        while (going := np.flatnonzero(low < high)).size:
            i = (low[going] + high[going]) // 2
            self.work += types.shape[1] * len(going)
            some, index = types[going], i[:, None]
            held = middle[some, index]
            total = held.sum(axis=1) - _at_ends(at_first[some, index], at_last[some, index])
            enough = (held > 0).all(axis=1) & (total >= self.layers)
            busy = _busy_s(load, some, held, self.layers)
            enough &= busy + travel[going] <= load.in_flight * cycles.end[i]
            high[going[enough]] = i[enough]
            low[going[~enough]] = i[~enough] + 1
        value = np.zeros(len(rows))
        there = np.flatnonzero(low < len(cycles))
        link = load.tokens * listed.link_s[rows[there]]
        shortest = np.maximum(cycles.start[low[there]], np.maximum(link, travel[there] / load.in_flight))
        value[there] = load.value / shortest
        return value


def _deepest(types: int, layers: int) -> int:
    """The most stages for which there are few enough pipelines; 1: list none."""
    total, depth = 0, 1
    while depth < min(_DEEPEST, layers):
        total += comb(types + depth, depth + 1)
        if total > _MOST:
            break
        depth += 1
    return depth


def _largest(values: Floats, number: int) -> Floats:
    """Sums of the so many largest of each row."""
    found: Floats = -np.sort(-values, axis=1)[:, :number].sum(axis=1)
    return found


def _at_ends(first: Ints, last: Ints) -> Ints:
    """Layers lost to embedding and head, with the best choice of ends: [pipelines] of [pipelines, depth]."""
    best = np.full(len(first), 2 * _NEVER, dtype=np.int64)
    for i in range(first.shape[1]):
        others = np.delete(last, i, axis=1).min(axis=1)
        best = np.minimum(best, first[:, i] + others)
    return best


def _busy_s(load: Load, types: Ints, held: Ints, layers: int) -> Floats:
    """Seconds that all stages are busy at least: one layer each, the rest where a layer is quickest."""
    if load.slope_s is None:
        return np.zeros(len(types))
    slopes = load.slope_s[types]
    busy = load.middle[types, 1].sum(axis=1)
    left = np.full(len(types), layers - types.shape[1], dtype=np.int64)
    for j in range(types.shape[1]):
        more = np.clip(left, 0, np.maximum(held[:, j] - 1, 0))
        busy = busy + more * slopes[:, j]
        left = left - more
    found: Floats = busy
    return found
