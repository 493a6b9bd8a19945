"""Pipelines of two or three stages: few enough that every choice of groups is looked at, for all cycles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.columns.knapsack import FIRST, LAST, MIDDLE, Kind, have_room

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MOST_STAGES = 3


def cheapest_few(
    holds: Ints, cost: Floats, kinds: Sequence[Kind], depth: int, layers: int
) -> tuple[Floats, list[tuple[int, ...]]]:
    """The least price for each cycle, [cycles], ``inf`` where nothing fits, and the types behind it.

    ``holds``: [3, types, cycles], as in `hexgen.scheduler.columns.knapsack.cheapest`.
    """
    cycles = holds.shape[2]
    price = np.full(cycles, np.inf)
    chosen: list[tuple[int, ...]] = [() for _ in range(cycles)]
    usable = [i for i, kind in enumerate(kinds) if kind.available > 0 and holds[MIDDLE, i].any()]
    ends = _ends(holds)
    for types in sorted(
        combinations_with_replacement(usable, depth), key=lambda types: sum(float(cost[t]) for t in types)
    ):
        if not _there(types, kinds):
            continue
        total = sum(float(cost[t]) for t in types)
        if not np.any(price > total):
            break
        held = _held(types, holds, ends)
        better = (held >= layers) & (price > total)
        if better.any():
            price[better] = total
            for i in np.flatnonzero(better):
                chosen[i] = types
    return price, chosen


def _ends(holds: Ints) -> Ints:
    """What a type loses as first and as last stage: [2, types, cycles]; a great loss where it does not fit."""
    never = np.int64(1 << 20)
    loss = [np.where(holds[place] > 0, holds[MIDDLE] - holds[place], never) for place in (FIRST, LAST)]
    return np.array(loss)


def _held(types: tuple[int, ...], holds: Ints, ends: Ints) -> Ints:
    """Layers that the groups hold with the best choice of ends; none where a group holds nothing: [cycles]."""
    loss = np.full(holds.shape[2], np.int64(1 << 30))
    for i in range(len(types)):
        for j in range(len(types)):
            if i != j:
                loss = np.minimum(loss, ends[0, types[i]] + ends[1, types[j]])
    middle = holds[MIDDLE, list(types)]
    found: Ints = np.where((middle > 0).all(axis=0), middle.sum(axis=0) - loss, -1)
    return found


def _there(types: tuple[int, ...], kinds: Sequence[Kind]) -> bool:
    return all(types.count(t) <= kinds[t].available for t in types) and have_room([kinds[t] for t in types])
