"""Pricing: for given prices of groups, the pipeline that serves most for its price, or the proof that none does.

What is sought is the largest ratio of value to price, lambda. Prices multiplied by lambda are feasible for the
dual of the packing program, so lambda x (master's value) bounds every packing (Farley 1990, column generation).

A pipeline of d stages with B sequences on it serves V(d, B) / cycle. For fixed (d, B) a group whose step may take
a cycle's time holds so many layers, and the cheapest pipeline with that cycle is a knapsack: exactly d groups, all
layers, least price. Its relaxation (`relaxed`) filters; what passes goes through the dynamic program (`knapsack`).
Ranges of B are bounded together and split while they could matter. What is left out of a bound (the first stage's
embedding, links slower than the fastest of their kind) is left out in the pipelines' favour.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.columns.bounds import Bounds
from hexgen.scheduler.columns.classes import Classes
from hexgen.scheduler.columns.cycles import Cycles, fine, thinned
from hexgen.scheduler.columns.few import Few
from hexgen.scheduler.columns.loads import Load, make_load
from hexgen.scheduler.columns.pools import Pool
from hexgen.scheduler.columns.relaxed import LEAST_PRICE
from hexgen.scheduler.columns.small import MOST_STAGES
from hexgen.scheduler.columns.whole import best_whole, unlimited
from hexgen.scheduler.deadline import passed
from hexgen.scheduler.traffic import Traffic

Floats = npt.NDArray[np.float64]

_BOX_RATIO = 1.5  # of the numbers of sequences that are first bounded together
_CYCLES = (24, 48)  # cycle times looked at in one box: at first, and again where it could matter
_LIKELY = 48  # boxes looked into first
_SAME = 1e-9
_RESERVE = 0.5
_TRIES = 3  # knapsacks of one pool, where any pipeline will do
_KNAPSACK = 20_000  # numbers of an exact knapsack, about
_NARROW = 1.012  # of numbers of sequences that are not told apart
_PATIENCE = 60  # looks after which what was found will do


@dataclass(frozen=True, slots=True)
class Priced:
    """A pipeline as pricing sees it: groups of each type, and value over price (at least what it really has)."""

    types: tuple[int, ...]
    pool: Pool
    ratio: float


@dataclass(slots=True)
class _Box:
    """Pipelines of ``depth`` stages with ``low`` to ``high`` sequences. ``level``: how closely it was seen."""

    depth: int
    low: int
    high: int
    bound: float = 0.0
    level: int = 0


class Pricer:
    """Prices pipelines over one cluster's classes; what does not depend on prices is remembered."""

    def __init__(
        self,
        classes: Classes,
        traffic: Traffic,
        layers: int,
        *,
        limited: bool,
        looks: int,
        work: float,
    ) -> None:
        self.classes, self.traffic, self.layers, self.limited = classes, traffic, layers, limited
        self.looks = looks  # that one search takes at most; after them the bound is what is left
        self._bounds = Bounds(classes, layers)
        self._work = work  # numbers that all searches together may work out
        self.reserve = work * _RESERVE  # of them for the proof
        self._until: float | None = None  # of time.monotonic(): when the search that runs is to end
        self._loads: dict[tuple[int, int, int], Load | None] = {}
        self._few = None if limited else Few(classes, layers, traffic.max_sequences, self._load)
        self.boxes = self._first_boxes() if work > 0 else []

    @property
    def work(self) -> float:
        """What is left of it."""
        return self._work - self._bounds.work - (self._few.work if self._few is not None else 0.0)

    def best(
        self,
        prices: Sequence[float],
        floor: float,
        known: Callable[[tuple[int, ...]], bool],
        wanted: int,
        until: float | None,
    ) -> tuple[float, list[Priced]]:
        """A bound on every pipeline's value over price, and pipelines above it that are not ``known``, best first.

        ``prices``: of one group of each type. ``floor``: smaller ratios need not be told apart. ``wanted``: so
        many pipelines will do, looked for first where the last prices found the best; the bound is then infinite.
        """
        cost, self._until = np.maximum(np.asarray(prices, dtype=np.float64), LEAST_PRICE), until
        floor, few = self._best_few(cost, floor, known)
        if few or math.isinf(floor):
            return math.inf, few[:wanted]
        likely = sorted(self.boxes, key=lambda box: -box.bound)[:_LIKELY]
        if likely and likely[0].bound > 0:
            found = self._search(likely, cost, floor, known, wanted, _TRIES)[1]
            if found:
                return math.inf, found
        return self._search(self.boxes, cost, floor, known, wanted)

    def prove(
        self,
        prices: Sequence[float],
        floor: float,
        known: Callable[[tuple[int, ...]], bool],
        until: float | None,
    ) -> tuple[float, list[Priced]]:
        """The same for the bound's sake: as close to ``floor`` as what is left of the work and the time allows."""
        cost, self._until = np.maximum(np.asarray(prices, dtype=np.float64), LEAST_PRICE), until
        floor, few = self._best_few(cost, floor, known)
        if math.isinf(floor):
            return math.inf, []
        factor, found = self._search(self.boxes, cost, max([floor, *(p.ratio for p in few)]), known, None)
        return factor, [*few, *found]

    def listed(self, cost: Floats, floor: float) -> list[Priced] | None:
        """The pipelines of few stages that may be worth more than ``floor`` times their price, best first.

        None where there was no time to list them.
        """
        over = self._few.over(cost, floor, self._until) if self._few is not None else []
        if over is None:
            return None
        return [Priced(types, self.classes.pools[pool], ratio) for ratio, types, pool in over]

    def _best_few(
        self, cost: Floats, floor: float, known: Callable[[tuple[int, ...]], bool]
    ) -> tuple[float, list[Priced]]:
        """The floor that the known ones of them leave (see `_search`), and those above it that are not known."""
        listed = self.listed(cost, floor)
        if listed is None:
            return math.inf, []
        found: list[Priced] = []
        for priced in listed:
            if known(priced.types):
                floor = max(floor, priced.ratio)
            else:
                found.append(priced)
        return floor, found

    def _search(
        self,
        boxes: Sequence[_Box],
        cost: Floats,
        floor: float,
        known: Callable[[tuple[int, ...]], bool],
        wanted: int | None,
        tries: int | None = None,
    ) -> tuple[float, list[Priced]]:
        """Best first: boxes are looked at more closely, then split, while their bound exceeds ``floor``.

        ``tries``: knapsacks of one pool in a box; given, pipelines may be left out and the bound means nothing.
        """
        heap: list[tuple[float, int, _Box]] = []
        for i, box in enumerate(boxes):
            box.bound, box.level = self._bound(box, cost, 0), 0
            if wanted is not None and self._spent(self.reserve):
                return math.inf, []
            if box.bound > floor:
                heap.append((-box.bound, i, box))
        heapq.heapify(heap)
        count, looks = len(boxes), 0
        found: dict[tuple[int, ...], Priced] = {}
        while heap and -heap[0][0] > floor * (1 + _SAME):
            _, _, box = heapq.heappop(heap)
            count += 1
            if box.level == 0:
                box.bound, box.level = min(box.bound, self._bound(box, cost, 1, floor)), 1
                heapq.heappush(heap, (-box.bound, count, box))
            elif self._worth_splitting(box):
                middle = (box.low + box.high) // 2
                for low, high in ((box.low, middle), (middle + 1, box.high)):
                    half = _Box(box.depth, low, high, box.bound)
                    half.bound = min(box.bound, self._bound(half, cost, 0))
                    count += 1
                    heapq.heappush(heap, (-half.bound, count, half))
            else:
                priced = self._exact(box, cost, floor, tries)
                if priced is not None and known(priced.types):
                    # Its true value is in the program already; what is left of its ratio is optimism.
                    floor = max(floor, priced.ratio)
                elif priced is not None:
                    found.setdefault(tuple(sorted(priced.types)), priced)
            looks += 1
            if wanted is not None and (len(found) >= wanted or (found and looks > _PATIENCE)):
                return math.inf, sorted(found.values(), key=lambda p: -p.ratio)
            spent = self._spent(0.0 if wanted is None else self.reserve)
            if (looks > self.looks or spent) and heap:
                floor = max(floor, -heap[0][0])
                break
        ratios = [p.ratio for p in found.values()]
        return max([floor, *ratios]), sorted(found.values(), key=lambda p: -p.ratio)

    def _worth_splitting(self, box: _Box) -> bool:
        load = self._load(box.depth, box.low, box.high)
        return load is not None and not load.exact and box.high > box.low * _NARROW

    def _spent(self, reserve: float) -> bool:
        return self.work <= reserve or passed(self._until)

    # ---- boxes -----------------------------------------------------------------------------------------------

    def _first_boxes(self) -> list[_Box]:
        most = self.traffic.max_sequences
        edges = [1]
        while edges[-1] <= most:
            edges.append(min(most + 1, max(edges[-1] + 1, int(edges[-1] * _BOX_RATIO))))
        groups = sum(node.count * len(node.places) for node in self.classes.nodes)
        boxes: list[_Box] = []
        listed = range(2, self._few.depth + 1) if self._few is not None else range(0)
        for depth in range(1, min(groups, self.layers) + 1):
            if depth in listed:
                continue
            for low, high in pairwise(edges):
                if self._load(depth, low, high - 1) is None:
                    break  # more sequences need more memory still
                boxes.append(_Box(depth, low, high - 1))
        return boxes

    def _load(self, depth: int, low: int, high: int) -> Load | None:
        key = (depth, low, high)
        if key not in self._loads:
            self._loads[key] = make_load(
                self.classes, self.traffic, self.layers, depth, low, high, limited=self.limited
            )
        return self._loads[key]

    def _allowed(self, load: Load, cycles: Floats) -> npt.NDArray[np.bool_]:
        """Cycles that the workload's limits allow, as far as they follow from the cycle alone."""
        allowed = np.ones(len(cycles), dtype=bool)
        slo = self.traffic.slo
        if self.limited and slo.tpot_s is not None:
            allowed &= load.in_flight * cycles <= slo.tpot_s * (1 + _SAME)
        if self.limited and slo.latency_s is not None:
            allowed &= self.traffic.decodes * load.in_flight * cycles <= slo.latency_s
        return allowed

    def _allowed_cycles(self, load: Load, cycles: Cycles) -> Cycles:
        return cycles.only(self._allowed(load, cycles.start))

    # ---- bounds ----------------------------------------------------------------------------------------------

    def _bound(self, box: _Box, cost: Floats, level: int, floor: float = 1.0) -> float:
        load = self._load(box.depth, box.low, box.high)
        if load is None:
            return 0.0
        if box.depth == 1:
            return self._single(load, cost)[0]
        cycles = self._allowed_cycles(load, thinned(load, _CYCLES[level]))
        if level == 0:
            return self._bounds.anywhere(box.depth, load, cycles, cost, floor)
        return float(self._bounds.closely(box.depth, load, cycles, cost, floor)[1].max(initial=floor))

    def _single(self, load: Load, cost: Floats) -> tuple[float, int]:
        """One stage for everything: nothing to pack."""
        ratios = np.where(self._allowed(load, load.only), load.value / load.only / cost, 0.0)
        best = int(ratios.argmax())
        return float(ratios[best]), best

    # ---- the exact knapsack ----------------------------------------------------------------------------------

    def _exact(self, box: _Box, cost: Floats, floor: float, tries: int | None) -> Priced | None:
        """The best whole pipeline of the box, above ``floor``; ``tries``: knapsacks a pool, where any will do."""
        load = self._load(box.depth, box.low, box.high)
        if load is None:
            return None
        if box.depth == 1:
            ratio, best_type = self._single(load, cost)
            pool = next(p for p in self.classes.pools if p.available[best_type] > 0)
            return Priced((best_type,), pool, ratio) if ratio > floor else None
        cycles = self._allowed_cycles(load, fine(load))
        best: Priced | None = None
        spots, ratios = self._bounds.finely(box.depth, load, cycles, cost, floor)
        if len(spots) and box.depth > MOST_STAGES:
            usable = self._bounds.usable[:, spots.pool]
            price = unlimited(box.depth, self.layers, load, spots.cycles, cost, usable)
            ratios = np.minimum(ratios, load.value / spots.cycles.start / np.maximum(price, LEAST_PRICE))
            self._bounds.work += len(cost) * len(spots) * box.depth
            rows = np.flatnonzero(ratios > floor * (1 + _SAME))
            spots, ratios = spots.only(rows), ratios[rows]
        for number, pool in enumerate(self.classes.pools):
            rows = np.flatnonzero(spots.pool == number)
            if len(rows) == 0:
                continue
            kinds = self.classes.kinds(pool)
            part = spots.cycles.only(rows)
            found = best_whole(box.depth, self.layers, load, part, ratios[rows], cost, kinds, floor, tries)
            self._bounds.work += found.knapsacks * _KNAPSACK
            if found.types is not None:
                floor, best = found.ratio, Priced(found.types, pool, found.ratio)
        return best
