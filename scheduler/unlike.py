"""Large clusters whose regions are unlike each other: each is planned for itself, with little time for each.

Which regular start is best hardly differs between regions drawn from the same kinds of nodes (on Helix's kinds:
groups of two, four or five pipelines for 64 devices), so all starts are tried for the first few only, and what won
there is what the others start from. What is left of the budget improves them, an equal share each.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from hexgen.scheduler.brisk import BriskSolver
from hexgen.scheduler.deadline import part_until, passed
from hexgen.scheduler.groups import Group, Topology
from hexgen.scheduler.improve import Budget, Partition, improve
from hexgen.scheduler.progress import OnProgress, Progress
from hexgen.scheduler.regions import Places
from hexgen.scheduler.search import best_dealt, regular_groupings, search
from hexgen.scheduler.solver import RouteSolver

_TAUGHT = 3  # regions for which every start is tried
_AS_GOOD = 0.98  # what recipes must reach there, or every region gets every start
_ROUTES = 150  # that improving one region may work out; where time is limited, time decides first
_MORE_ROUTES = 2000

Recipe = tuple[int, float]  # widest group, devices a pipeline


def plan_unlike(
    solver: RouteSolver, parts: Sequence[Places], seed: int, deadline: float | None, progress: OnProgress | None
) -> list[Partition | None]:
    """A partition of each part of the nodes; None where the model does not fit into it."""
    began = time.monotonic()
    topology = solver.topology
    solvers = [
        BriskSolver(solver, Topology(topology.cluster, [topology.nodes[p] for p in part])) for part in parts
    ]
    starts = _starts(solvers, seed, deadline)
    found: list[Partition | None] = []
    served = sum(start.value for start in starts if start is not None)
    for i, (part, start) in enumerate(zip(solvers, starts, strict=True)):
        better = start
        if start is not None and not passed(deadline):
            routes = _ROUTES if deadline is None else _MORE_ROUTES
            budget = Budget(part, part.solved + routes, part_until(deadline, 1 / (len(parts) - i)))
            better = improve(part, start, random.Random(seed), budget)
            served += better.value - start.value
        found.append(better)
        if progress is not None:
            progress(Progress(served, None, time.monotonic() - began, f"region {i + 1} of {len(parts)}"))
    return found


def _starts(solvers: Sequence[BriskSolver], seed: int, deadline: float | None) -> list[Partition | None]:
    recipes: list[Recipe] = []
    starts: list[Partition | None] = []
    trusted = not passed(deadline)  # else there is nothing quicker than the first start of all
    for i, part in enumerate(solvers):
        start = _by_recipes(part, recipes) if trusted and i >= _TAUGHT else None
        if start is None:
            start = search(part, seed, part_until(deadline, 1 / (len(solvers) - i)), 0)
        starts.append(start)
        if trusted and i < _TAUGHT and start is not None:
            recipes.append(_recipe(start))
            known = _by_recipes(part, recipes)
            trusted = known is not None and known.value >= _AS_GOOD * start.value
    return starts


def _recipe(start: Partition) -> Recipe:
    groups = _groups(start)
    return max(group.width for group in groups), sum(group.width for group in groups) / len(start.routes)


def _by_recipes(part: BriskSolver, recipes: Sequence[Recipe]) -> Partition | None:
    """The best of the partitions with as wide groups, and about as many devices a pipeline."""
    devices = sum(node.count for node in part.topology.nodes)
    groupings: dict[int, list[Group]] = {}
    for groups in regular_groupings(part.topology, part.cost.model.heads):
        groupings.setdefault(max(group.width for group in groups), groups)
    tried: dict[tuple[int, int], Partition | None] = {}
    for widest, each in recipes:
        width = max((width for width in groupings if width <= widest), default=min(groupings))
        about = round(devices / each)
        for count in range(max(1, about - 1), about + 2):
            if (width, count) not in tried:
                tried[width, count] = best_dealt(part, groupings[width], count)
    found = [partition for partition in tried.values() if partition is not None]
    return max(found, key=lambda partition: partition.value, default=None)


def _groups(partition: Partition) -> list[Group]:
    return [*(group for route in partition.routes for group in route.groups), *partition.spare]
