"""Symmetric TP x PP, as an engine for equal GPUs (vLLM, among others) needs it."""

from __future__ import annotations

from collections.abc import Iterator

from hexgen.scheduler.baselines.contract import Baseline, best_of, by_type, evenly
from hexgen.scheduler.best import solver_for
from hexgen.scheduler.groups import Group, node_groups
from hexgen.scheduler.solver import RouteSolver, Solution
from hexgen.scheduler.task import Task


def symmetric(task: Task, objective: str) -> Baseline:
    """Over all nodes, and over those of each type alone."""
    return best_of(task, objective, "symmetric TP x PP", "no equal widths with equal layers fit", _solutions(task))


def _solutions(task: Task) -> Iterator[list[Solution]]:
    subsets = [task.cluster.nodes, *by_type(task.cluster.nodes)]
    for nodes in subsets[: 1 if len(subsets) == 2 else None]:
        yield from _of(solver_for(task, nodes, "throughput"))


def _of(solver: RouteSolver) -> Iterator[list[Solution]]:
    """Every pipeline the same: one width that divides the heads, equal layers, what does not divide left out."""
    model = solver.cost.model
    for width in range(1, model.heads + 1):
        if model.heads % width:
            continue
        groups: list[Group] = []
        for place, node in enumerate(solver.topology.nodes):
            groups.extend(node_groups(solver.topology, place, [width] * (node.count // width)))
        if not groups:
            break
        for depth in range(1, min(len(groups), model.layers) + 1):
            if model.layers % depth == 0:
                count = len(groups) // depth
                yield evenly(solver, [groups[i * depth : (i + 1) * depth] for i in range(count)])
