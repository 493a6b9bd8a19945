"""Simple ways to place the model, through the same evaluator: what the planner's plan is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hexgen.errors import HexgenError
from hexgen.memory import plan_dtype
from hexgen.plan import Plan
from hexgen.scheduler.best import emit_plan, finish
from hexgen.scheduler.cost import CostModel
from hexgen.scheduler.groups import Group, Topology, even_widths, node_groups
from hexgen.scheduler.layers import measure
from hexgen.scheduler.solver import RouteSolver, Solution
from hexgen.scheduler.task import Task
from hexgen.scheduler.traffic import traffic_of


@dataclass(frozen=True, slots=True)
class Baseline:
    """One way to do it: the plan it gives, or why it gives none."""

    name: str
    plan: Plan | None
    reason: str = ""


def baselines(task: Task, objective: str) -> tuple[Baseline, ...]:
    """Best single node, equal layers over all devices, symmetric TP x PP as an engine for equal GPUs needs it."""
    return (
        _best(task, objective, "best single node", "no node alone holds the model", _single_nodes(task)),
        _best(
            task,
            objective,
            "equal layers, one stage a device",
            "the smallest device does not hold its equal part",
            _equal_layers(task, None),
        ),
        _best(
            task,
            objective,
            "equal layers, one stage a node",
            "the smallest node does not hold its equal part",
            _equal_layers(task, 0),
        ),
        _best(
            task,
            objective,
            "symmetric TP x PP",
            "no equal widths with equal layers fit",
            _symmetric(task),
        ),
    )


def _best(
    task: Task, objective: str, name: str, reason: str, candidates: Iterator[tuple[RouteSolver, list[Solution]]]
) -> Baseline:
    best: Plan | None = None
    for _, routes in candidates:
        if not routes:
            continue
        try:
            found = finish(task, emit_plan(routes, task), objective)
        except HexgenError as error:
            reason = error.message
            continue
        if best is None or _score(found, objective) > _score(best, objective):
            best = found
    return Baseline(name, best, "" if best else reason)


def _score(plan: Plan, objective: str) -> float:
    predicted = plan.predicted
    if predicted is None:
        return 0.0
    return predicted.single_tokens_s if objective == "latency" else predicted.tokens_s


def _solver(task: Task, places: Sequence[int] | None = None) -> RouteSolver:
    nodes = task.cluster.nodes if places is None else [task.cluster.nodes[i] for i in places]
    traffic = traffic_of(task.model, task.workload, task.options)
    dtype = plan_dtype(task.options, task.model, [node.device for node in nodes])
    return RouteSolver(
        Topology(task.cluster, nodes), CostModel(task.model, dtype, task.options), traffic, "throughput"
    )


def _single_nodes(task: Task) -> Iterator[tuple[RouteSolver, list[Solution]]]:
    """Each kind of node by itself: tensor parallel over all of it, or equal groups in a row."""
    seen: set[tuple[object, ...]] = set()
    for place, node in enumerate(task.cluster.nodes):
        kind = (node.device, node.count, node.link)
        if kind in seen:
            continue
        seen.add(kind)
        solver = _solver(task, [place])
        for width in range(1, min(node.count, task.model.heads) + 1):
            if node.count % width == 0:
                groups = node_groups(solver.topology, 0, even_widths(node.count, width))
                solution = solver.best(groups)
                yield solver, [solution] if solution else []


def _equal_layers(task: Task, width: int | None) -> Iterator[tuple[RouteSolver, list[Solution]]]:
    """One pipeline over everything, layers divided evenly. ``width`` None: single devices; 0: whole nodes."""
    solver = _solver(task)
    groups: list[Group] = []
    for place, node in enumerate(solver.topology.nodes):
        size = 1 if width is None else min(node.count, task.model.heads)
        groups.extend(node_groups(solver.topology, place, even_widths(node.count, size)))
    yield solver, _evenly(solver, [groups])


def _symmetric(task: Task) -> Iterator[tuple[RouteSolver, list[Solution]]]:
    """Every pipeline the same: one width that divides the heads, equal layers, what does not divide left out."""
    solver = _solver(task)
    model = task.model
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
                yield solver, _evenly(solver, [groups[i * depth : (i + 1) * depth] for i in range(count)])


def _evenly(solver: RouteSolver, pipelines: Sequence[Sequence[Group]]) -> list[Solution]:
    """The pipelines with layers as equal as they go; nothing where one of them does not fit."""
    routes: list[Solution] = []
    layers = solver.cost.model.layers
    for groups in pipelines:
        depth = len(groups)
        if depth > layers:
            return []
        division = [layers // depth + (i < layers % depth) for i in range(depth)]
        found = measure(solver.chain(groups), division, solver.traffic)
        if found is None:
            return []
        routes.append(Solution(tuple(groups), found, found.steady.tokens_s))
    return routes
