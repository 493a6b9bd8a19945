"""Swarm's (Ryabinin et al., 2023), as Helix's paper describes it as a baseline: stages of equal layers.

The layers are cut into stages so short that the smallest machine holds one; machines, the fastest first, each join
the stage with the least throughput. A stage feeds every machine of the next one.
"""

from __future__ import annotations

from collections.abc import Iterator

from hexgen.plan import Plan
from hexgen.scheduler.baselines.contract import Baseline, best_in_time
from hexgen.scheduler.baselines.placement import FILLS, Machines, Range, machines_of, plans_of
from hexgen.scheduler.task import Task


def swarm(task: Task, objective: str, seconds: float | None = None) -> Baseline:
    """Stages as long as the smallest machine holds; the best over how much memory is left to keys and values, and
    over how many routes are kept; as many of these as ``seconds`` allow."""
    smallest = min(
        (machines.most_layers(i, False, False), machines.groups[i].shape.devices[0].name)
        for machines in machines_of(task, 1.0)
        for i in range(len(machines.groups))
    )
    reason = (
        f"a stage is as long as the smallest machine holds ({smallest[1]}: {smallest[0]} of {task.model.layers} "
        "layers), and there are fewer machines than such stages"
    )
    return best_in_time(task, objective, "Swarm", reason, _plans(task), seconds)


def _plans(task: Task) -> Iterator[Plan]:
    for fill in FILLS:
        for machines in machines_of(task, fill):
            ranges = swarm_ranges(machines)
            if ranges is not None:
                yield from plans_of(task, machines, ranges)


def swarm_ranges(machines: Machines) -> list[Range] | None:
    """Layers of each machine; None where there are fewer machines than stages. Stages differ by one layer where
    the layers do not divide."""
    layers, every = machines.layers, range(len(machines.groups))
    middle = min(machines.most_layers(i, False, False) for i in every)
    if middle < 1:
        return None
    count = -(-layers // middle)
    if count > len(machines.groups):
        return None
    sizes = [layers // count + (n < layers % count) for n in range(count)]
    starts = [sum(sizes[:n]) for n in range(count)]
    served = [0.0] * count
    ranges: list[Range] = [(0, 0)] * len(machines.groups)
    for i in sorted(every, key=lambda i: (-machines.tokens_s(i, sizes[0]), i)):
        stages = [n for n in range(count) if sizes[n] <= machines.most_layers(i, n == 0, n == count - 1)]
        if stages:
            n = min(stages, key=lambda n: (served[n], n))
            served[n] += machines.tokens_s(i, sizes[n])
            ranges[i] = (starts[n], starts[n] + sizes[n])
    return ranges
