"""The honest refusal: devices that the plan leaves unused, and what forcing them in would cost at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hexgen.cluster import Node
from hexgen.plan import Plan
from hexgen.scheduler.best import emit_plan, finish, goal_of, solver_for
from hexgen.scheduler.explain.classes import node_classes
from hexgen.scheduler.explain.facts import LeftOut
from hexgen.scheduler.explain.seed import seed_of, unused_groups
from hexgen.scheduler.explain.state import node_of, pipelines
from hexgen.scheduler.explain.value import value_of
from hexgen.scheduler.groups import Group
from hexgen.scheduler.improve import make_partition
from hexgen.scheduler.solver import RouteSolver, Solution
from hexgen.scheduler.task import Objective, Task

_FORCED_NODES = 64  # of one kind: more are not tried one by one


def left_out(plan: Plan, task: Task, objective: Objective) -> tuple[LeftOut, ...]:
    """Unused devices by kinds of equal nodes. The objective ``cost`` leaves out what is not needed: not forced."""
    held = {device for stage in plan.stages for device in stage.devices}
    used_nodes = {node_of(device) for device in held}
    found: list[LeftOut] = []
    unused = [
        node for node in task.cluster.nodes if any(f"{node.name}/{i}" not in held for i in range(node.count))
    ]
    for members in node_classes(task.cluster, unused):
        devices = tuple(d for node in members for i in range(node.count) if (d := f"{node.name}/{i}") not in held)
        whole = all(node.name not in used_nodes for node in members)
        prices = [node.price_usd_h for node in members]
        entry = LeftOut(
            nodes=tuple(node.name for node in members),
            devices=devices,
            type=members[0].device.name,
            forced_value=None,
            forced_gain=None,
            price_usd_h=sum(p for p in prices if p is not None) if whole and None not in prices else None,
        )
        found.append(_forced(entry, plan, task, objective))
    return tuple(found)


def _forced(entry: LeftOut, plan: Plan, task: Task, objective: Objective) -> LeftOut:
    if objective == "cost":
        return replace(entry, reason="what is asked for is served without them, and they cost money")
    if not pipelines(plan):
        return replace(entry, reason="the routes share stages: max-flow found no use for them")
    if len(entry.nodes) > _FORCED_NODES:
        return replace(entry, reason="too many to be tried one by one")
    # One solver over every node, so that a CPU forced into a plan of GPUs pays for its dtype.
    solver = solver_for(task, _nodes(plan, entry, task), goal_of(objective))
    seed = seed_of(plan, solver)
    if seed is None:
        return replace(entry, reason=_unfit(plan, entry, task))
    held = {device for route in seed.routes for group in route.groups for device in group.devices}
    groups = [g for g in unused_groups(solver.topology, held, plan.stages) if set(g.devices) <= set(entry.devices)]
    routes = _inserted(solver, seed.routes, groups)
    if routes is None:
        return replace(entry, reason="no route can take them: too many stages, or too little memory")
    kept = make_partition(solver, routes, ())
    if len(kept.routes) < len(routes):  # latency: only the quickest pipeline counts
        return replace(entry, reason="a request travels on one pipeline, and it is slower with them")
    forced = finish(task, emit_plan(kept.routes, task), objective)
    value = value_of(forced, objective)
    price, budget = forced.predicted.price_usd_h if forced.predicted else None, task.cluster.budget_usd_h
    dear = budget is not None and price is not None and price > budget * (1 + 1e-9)
    return replace(
        entry,
        forced_value=value,
        forced_gain=value / value_of(plan, objective) - 1,
        reason=f"with them the plan would cost {price:.2f} USD/h, over the budget of {budget:.2f}" if dear else "",
    )


def _unfit(plan: Plan, entry: LeftOut, task: Task) -> str:
    with_cpu = any(task.cluster.node(name).device.kind == "cpu" for name in entry.nodes)
    held = any(task.cluster.device(d).type.kind == "cpu" for stage in plan.stages for d in stage.devices)
    if with_cpu and not held:
        return "with a CPU all of them compute in float32, and the model no longer fits"
    return "the routes no longer fit beside them"


def _nodes(plan: Plan, entry: LeftOut, task: Task) -> list[Node]:
    names = {node_of(device) for stage in plan.stages for device in stage.devices} | set(entry.nodes)
    return [node for node in task.cluster.nodes if node.name in names]


def _inserted(solver: RouteSolver, routes: Sequence[Solution], groups: Sequence[Group]) -> list[Solution] | None:
    """All together as a route of their own, where they can; else each where it costs least."""
    own = solver.best(groups)
    if own is not None and solver.goal != "latency":
        return [*routes, own]
    current = list(routes)
    for group in groups:
        best: tuple[float, int, Solution] | None = None
        for number, route in enumerate(current):
            found = solver.best([*route.groups, group])
            if found is not None and (best is None or found.value - route.value > best[0]):
                best = (found.value - route.value, number, found)
        if best is None:
            return None
        current[best[1]] = best[2]
    return current
