"""The best single node: tensor parallel over all of it, or equal groups in a row."""

from __future__ import annotations

from collections.abc import Iterator

from hexgen.scheduler.baselines.contract import Baseline, best_of
from hexgen.scheduler.best import solver_for
from hexgen.scheduler.groups import even_widths, node_groups
from hexgen.scheduler.solver import Solution
from hexgen.scheduler.task import Task


def single_node(task: Task, objective: str) -> Baseline:
    """One node of each kind is tried."""
    return best_of(task, objective, "best single node", "no node alone holds the model", _solutions(task))


def _solutions(task: Task) -> Iterator[list[Solution]]:
    seen: set[object] = set()
    for node in task.cluster.nodes:
        kind = (node.device, node.count, node.link)
        if kind in seen or not node.count:
            continue
        seen.add(kind)
        solver = solver_for(task, [node], "throughput")
        for width in range(1, min(node.count, task.model.heads) + 1):
            if node.count % width == 0:
                groups = node_groups(solver.topology, 0, even_widths(node.count, width))
                for depth in range(1, len(groups) + 1):  # replicas of the model in the node, all alike
                    if len(groups) % depth == 0:
                        parts = [groups[i : i + depth] for i in range(0, len(groups), depth)]
                        found = [solver.best(part) for part in parts]
                        yield [solution for solution in found if solution is not None]
