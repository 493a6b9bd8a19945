"""Petals' greedy (Borzunov et al., 2023, section 3.2): each server takes the blocks served least so far.

Servers join one after the other, each with as many consecutive blocks as it holds, where the sorted throughputs of
its window are smallest. Then each in turn looks again, as `should_choose_other_blocks` in Petals does: if everyone
moving to better places lifts the least served block enough, they move.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from hexgen.plan import Plan
from hexgen.scheduler.baselines.contract import Baseline, best_in_time
from hexgen.scheduler.baselines.placement import FILLS, Machines, Range, machines_of, plans_of
from hexgen.scheduler.task import Task

_ORDERS = 4  # in which servers join; the best is shown
_BALANCE_QUALITY = 0.75  # Petals' default: move where the old least is below this share of the new one
_ROUNDS = 10
_LARGE = 128  # machines: beyond that one order of joining, and one round of moving


def petals(task: Task, objective: str, seconds: float | None = None) -> Baseline:
    """The best over a few orders of joining, over how much memory is left to keys and values, and over how many
    routes are kept; as many of these as ``seconds`` allow."""
    reason = "the servers' blocks leave gaps: not enough memory for every layer once"
    return best_in_time(task, objective, "Petals", reason, _plans(task), seconds)


def _plans(task: Task) -> Iterator[Plan]:
    for order in range(_ORDERS):
        for fill in FILLS:
            for machines in machines_of(task, fill):
                if order == 0 or len(machines.groups) <= _LARGE:
                    yield from plans_of(task, machines, petals_ranges(machines, task.seed + order))


def petals_ranges(machines: Machines, seed: int) -> list[Range]:
    """Layers of each machine; those that hold not even one get (0, 0)."""
    rng = random.Random(seed)
    order = list(range(len(machines.groups)))
    rng.shuffle(order)
    served = [0.0] * machines.layers
    ranges: list[Range] = [(0, 0)] * len(order)
    for i in order:
        ranges[i] = _chosen(machines, i, served)
        _add(served, ranges[i], _rate(machines, i, ranges[i]))
    balanced = _rebalanced(machines, ranges, served, rng)
    return balanced if balanced is not None else ranges


def _rate(machines: Machines, i: int, held: Range) -> float:
    return machines.tokens_s(i, held[1] - held[0]) if held[0] < held[1] else 0.0


def _add(served: list[float], held: Range, rate: float) -> None:
    for layer in range(*held):
        served[layer] += rate


def _chosen(machines: Machines, i: int, served: Sequence[float]) -> Range:
    windows = machines.windows(i)
    if not windows:
        return (0, 0)
    return min(windows, key=lambda window: (sorted(served[window[0] : window[1]]), window))


def _rebalanced(
    machines: Machines, ranges: Sequence[Range], served: Sequence[float], rng: random.Random
) -> list[Range] | None:
    """Where the servers end up when each in turn leaves and chooses again; None where that helps too little."""
    moved, now = list(ranges), list(served)
    order = list(range(len(moved)))
    for _ in range(_ROUNDS if len(ranges) <= _LARGE else 1):
        rng.shuffle(order)
        changed = False
        for i in order:
            before, rate = moved[i], _rate(machines, i, moved[i])
            _add(now, before, -rate * (1 + 1e-3))  # a little more than its own: ties keep it where it is
            chosen = _chosen(machines, i, now)
            _add(now, before, rate * 1e-3)
            moved[i] = chosen
            _add(now, chosen, _rate(machines, i, chosen))
            changed |= chosen != before
        if not changed:
            break
    least, before_least = min(now), min(served)
    if least <= 1e-9 or before_least >= _BALANCE_QUALITY * least:
        return None
    return moved
