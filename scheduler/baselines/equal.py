"""Equal layers: one pipeline over every device (or every node), each with the same number of layers."""

from __future__ import annotations

from hexgen.scheduler.baselines.contract import Baseline, best_of, evenly
from hexgen.scheduler.best import solver_for
from hexgen.scheduler.groups import Group, even_widths, node_groups
from hexgen.scheduler.task import Task


def equal_layers(task: Task, objective: str, *, whole_nodes: bool) -> Baseline:
    """Stages are single devices, or nodes with tensor parallelism over all of each."""
    unit = "node" if whole_nodes else "device"
    solver = solver_for(task, task.cluster.nodes, "throughput")
    groups: list[Group] = []
    for place, node in enumerate(solver.topology.nodes):
        width = min(node.count, task.model.heads) if whole_nodes else 1
        groups.extend(node_groups(solver.topology, place, even_widths(node.count, width)))
    reason = f"the smallest {unit} does not hold its equal part"
    if len(groups) > task.model.layers:
        reason = f"{len(groups)} stages for {task.model.layers} layers"
    return best_of(task, objective, f"equal layers, one stage a {unit}", reason, [evenly(solver, [groups])])
