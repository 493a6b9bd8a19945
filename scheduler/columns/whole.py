"""Whole pipelines of one pool: which exact knapsacks are worth solving, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.columns.cycles import Cycles
from hexgen.scheduler.columns.knapsack import ROOMS, Kind, cheapest, have_room
from hexgen.scheduler.columns.loads import Load, layers_within
from hexgen.scheduler.columns.small import MOST_STAGES, cheapest_few

Floats = npt.NDArray[np.float64]
_SAME = 1e-9


@dataclass(frozen=True, slots=True)
class Whole:
    """The best pipeline found, None where none exceeds the floor, and knapsacks that it took."""

    types: tuple[int, ...] | None
    ratio: float
    knapsacks: int


def unlimited(
    depth: int, layers: int, load: Load, cycles: Cycles, cost: Floats, usable: npt.NDArray[np.bool_]
) -> Floats:
    """[spots]: no pipeline is cheaper in whole layers, were every group that is there at all there often enough.

    ``usable``: [types, spots]. Dynamic programming over stages and layers, for all spots at once.
    """
    first, middle, last = (layers_within(row, cycles.held) for row in (load.first, load.middle, load.last))
    left = np.arange(layers + 1)
    # price[spot, l]: the cheapest stages so far that leave at most l layers to the others.
    price = np.where(left == layers, 0.0, np.inf) * np.ones((len(cycles), 1))
    for stage in range(depth):
        holds = first if stage == 0 else last if stage == depth - 1 else middle
        best = np.full_like(price, np.inf)
        for kind in np.flatnonzero((usable & (holds > 0)).any(axis=1)):
            held = holds[kind].astype(np.int64)[:, None]
            # To leave l layers, l + held may be left before; none at all after as many as are left or more.
            before = np.minimum(left + held, layers)
            found = np.take_along_axis(price, before, axis=1) + cost[kind]
            found[~(usable[kind] & (holds[kind] > 0))] = np.inf
            np.minimum(best, found, out=best)
        price = best
    return price[:, 0]


def best_whole(
    depth: int,
    layers: int,
    load: Load,
    cycles: Cycles,
    bounds: Floats,
    cost: Floats,
    kinds: Sequence[Kind],
    floor: float,
    tries: int | None,
) -> Whole:
    """The pipeline of ``depth`` stages with the best value over price, if it is above ``floor``.

    ``bounds``: on that ratio, for each cycle. ``tries``: knapsacks at most, where any good pipeline will do.
    """
    left = np.flatnonzero(bounds > floor * (1 + _SAME))
    if len(left) == 0:
        return Whole(None, floor, 0)
    held = [layers_within(row, cycles.held[left]) for row in (load.middle, load.first, load.last)]
    holds = np.array(held).astype(np.int64)
    value, bounds = load.value / cycles.start[left], bounds[left]
    if depth <= MOST_STAGES:
        prices, types = cheapest_few(holds, cost, kinds, depth, layers)
        exact = np.minimum(bounds, value / prices)
        top = int(exact.argmax())
        return Whole(types[top] if exact[top] > floor else None, max(floor, float(exact[top])), 1)
    best: tuple[int, ...] | None = None
    # Cycles between two breakpoints hold the same layers: one knapsack answers for all of them.
    new = np.append(True, (holds[:, :, 1:] != holds[:, :, :-1]).any(axis=(0, 1)))
    first = np.maximum.accumulate(np.where(new, np.arange(len(left)), 0))
    unsolved = [int(i) for i in np.flatnonzero(new)]
    peak = {i: float(bounds[first == i].max()) for i in unsolved}
    solved = 0
    while unsolved and (tries is None or solved < tries):
        # The least price never rises with the cycle, so an answer bounds all shorter ones: to prove, halve.
        i = unsolved[len(unsolved) // 2] if tries is None else max(unsolved, key=peak.__getitem__)
        unsolved.remove(i)
        solved += 1
        most = float(value[i]) / floor
        for room in ROOMS:  # the quicker, if it tells
            found = cheapest(holds[:, :, i], cost, kinds, depth, layers, most, room=room)
            if found is None or have_room([kinds[t] for t in found[1]]):
                break
        price = most if found is None else found[0]
        ratio = float(np.minimum(bounds, value / price)[first == i].max())
        if found is not None and ratio > floor:
            floor, best = ratio, found[1]
        for j in unsolved:
            if j < i:
                peak[j] = min(peak[j], float(value[j]) / price)
        unsolved = [j for j in unsolved if peak[j] > floor * (1 + _SAME)]
    return Whole(best, floor, solved)
