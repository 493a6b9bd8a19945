"""Bounds on value over price, for many pools and cycle times at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.columns.classes import Classes
from hexgen.scheduler.columns.cycles import Cycles, blocks
from hexgen.scheduler.columns.loads import Load, layers_within
from hexgen.scheduler.columns.pools import Pool
from hexgen.scheduler.columns.relaxed import Knapsacks, least_price

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SAME = 1e-9
_BLOCKS = (32, 6)  # fine cycles bounded together, at first and then
_THOROUGH = 4  # times the work of a first look
_FOREVER_S = 1e9


@dataclass(frozen=True, slots=True)
class Spots:
    """Cycle times in pools: ``cycles`` and ``pool`` (its number) are parallel."""

    cycles: Cycles
    pool: Ints

    def __len__(self) -> int:
        return len(self.pool)

    def only(self, rows: Ints) -> Spots:
        return Spots(self.cycles.only(rows), self.pool[rows])


class Bounds:
    """Over one cluster's classes. ``work``: numbers worked out so far."""

    def __init__(self, classes: Classes, layers: int) -> None:
        self.classes, self.layers = classes, layers
        self.pools: tuple[Pool, ...] = classes.pools
        self._every = every = (*classes.pools, classes.everything)
        self._available = np.array([pool.available for pool in every], dtype=np.float64).T
        self._devices = np.array([classes.devices(pool) for pool in every]).T
        self._crossings = np.array([pool.crossings for pool in every])
        self.usable = self._available > 0  # [types, pools]
        self._longer = _by_pool([classes.longer_hops(pool) for pool in every])
        self._entries = _by_pool([classes.entries(pool) for pool in every])
        self.work = 0.0

    def anywhere(self, depth: int, load: Load, cycles: Cycles, cost: Floats, floor: float) -> float:
        """One bound for all pools at once, quick and loose."""
        spots = Spots(cycles, np.full(len(cycles), len(self.pools)))
        return float(self._ratios(depth, load, spots, cost, floor).max(initial=0.0))

    def closely(self, depth: int, load: Load, cycles: Cycles, cost: Floats, floor: float) -> tuple[Spots, Floats]:
        """Where ``floor`` may be exceeded, and bounds there as close as they get without splitting intervals."""
        at = np.tile(np.arange(len(cycles)), len(self.pools))
        pool = np.repeat(np.arange(len(self.pools)), len(cycles))
        return self._closer(depth, load, Spots(cycles.only(at), pool), cost, floor)

    def finely(self, depth: int, load: Load, cycles: Cycles, cost: Floats, floor: float) -> tuple[Spots, Floats]:
        """The same for fine intervals: many as one first, and split while they may exceed ``floor``."""
        size = _BLOCKS[0]
        first = np.arange(0, len(cycles), size)
        at, pool = np.tile(first, len(self.pools)), np.repeat(np.arange(len(self.pools)), len(first))
        for smaller in (*_BLOCKS[1:], 1):
            ratios = self._ratios(depth, load, Spots(blocks(cycles, at, size), pool), cost, floor)
            keep = ratios > floor * (1 + _SAME)
            steps = np.arange(0, size, smaller)
            at, pool = (at[keep][:, None] + steps).ravel(), np.repeat(pool[keep], len(steps))
            there = at < len(cycles)
            at, pool, size = at[there], pool[there], smaller
        return self._closer(depth, load, Spots(cycles.only(at), pool), cost, floor)

    def _closer(self, depth: int, load: Load, spots: Spots, cost: Floats, floor: float) -> tuple[Spots, Floats]:
        loose = self._ratios(depth, load, spots, cost, floor)
        rows = np.flatnonzero(loose > floor * (1 + _SAME))
        part, loose = spots.only(rows), loose[rows]
        if len(rows) == 0:
            return part, loose
        close = np.minimum(loose, self._ratios(depth, load, part, cost, floor, thorough=True))
        rows = np.flatnonzero(close > floor * (1 + _SAME))
        return part.only(rows), close[rows]

    def _ratios(
        self, depth: int, load: Load, spots: Spots, cost: Floats, floor: float, *, thorough: bool = False
    ) -> Floats:
        """[spots]: a bound on value over price, of pipelines in the spot's pool and interval of cycle times."""
        ratios = np.zeros(len(spots))
        travel = np.array([pool.travel_s(depth, load.tokens) for pool in self._every])
        least = np.array([pool.link_s(depth, load.tokens) for pool in self._every])
        shortest = np.maximum(spots.cycles.start, np.maximum(least, travel / load.in_flight)[spots.pool])
        inside = np.flatnonzero(shortest <= spots.cycles.end)
        if len(inside) == 0:
            return ratios
        hop_s, entry_s = (
            np.where(self.usable, delay_s + load.tokens * token_s, 0.0)
            for delay_s, token_s in (self._longer, self._entries)
        )
        # The first stage's node and those behind a crossing are not entered by such a hop.
        free_s = (1 + self._crossings) * entry_s.max(axis=0)
        self.work += len(cost) * len(inside) * (_THOROUGH if thorough else 1)
        cycles, pool, value = spots.cycles.only(inside), spots.pool[inside], load.value / shortest[inside]
        knapsacks = Knapsacks(
            layers_within(load.middle, cycles.held),
            cost,
            np.minimum(self._available, depth)[:, pool],
            depth,
            self.layers,
            np.where(np.isfinite(load.middle[:, 1]), load.middle[:, 1], 0.0)[:, None] + hop_s[:, pool],
            load.slope_s,
            # The round trip may take until the interval's end.
            load.in_flight * np.minimum(cycles.end, _FOREVER_S) - (travel - free_s)[pool],
            self.classes.member,
            self._devices[:, pool],
            value / floor,
        )
        ratios[inside] = value / least_price(knapsacks, thorough=thorough)
        return ratios


def _by_pool(hops: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Delays and seconds a token: [types, pools] each."""
    return np.array([hop[0] for hop in hops]).T, np.array([hop[1] for hop in hops]).T
