"""What a plan is still good for after its cluster changed: what survives whole, and broken pipelines mended."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from hexgen.cluster import Node
from hexgen.plan import Plan, Route, Stage, resolve_cluster
from hexgen.scheduler.best import emit_plan, solver_for
from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.evaluate import group_shape
from hexgen.scheduler.groups import Group, even_widths
from hexgen.scheduler.improve import Budget, Partition, improve, make_partition
from hexgen.scheduler.layers import measure, within_limits
from hexgen.scheduler.solver import Goal, RouteSolver, Solution
from hexgen.scheduler.task import Task

_ROUTES = 250  # worked out to improve one seed: the search's usual budget is for starting from nothing


def unbroken(old: Plan, task: Task) -> Plan | None:
    """The routes whose devices are all still there, with stages and layers as they were; None where none is."""
    intact = _intact_stages(old, task)
    routes = tuple(route for route in old.routes if all(hop.stage in intact for hop in route.path))
    if not routes:
        return None
    used = {hop.stage for route in routes for hop in route.path}
    stages = tuple(stage for stage in old.stages if stage.name in used)
    return Plan(old.model, task.cluster, stages, routes, task.options)


def remaining_stages(old: Plan, task: Task) -> Plan | None:
    """The stages whose devices are all still there, without routes; None where none is, or none was lost."""
    intact = _intact_stages(old, task)
    if not intact or len(intact) == len(old.stages):
        return None
    stages = tuple(stage for stage in old.stages if stage.name in intact)
    return Plan(old.model, task.cluster, stages, (), task.options)


def shares_stages(plan: Plan) -> bool:
    hops = [hop.stage for route in plan.routes for hop in route.path]
    return len(set(hops)) < len(hops)


def _intact_stages(old: Plan, task: Task) -> set[str]:
    before = resolve_cluster(old)
    there = {device.id: device.type for device in task.cluster.devices()}
    return {
        stage.name
        for stage in old.stages
        if all(there.get(device) == before.device(device).type for device in stage.devices)
    }


def repaired(old: Plan, task: Task, goal: Goal) -> Iterator[Plan]:
    """Plans made of the old one's pipelines: the whole ones kept, what remains of the others put to use again.

    Only plans whose routes share no stage and use all layers of each are mended; others have no pipelines to keep.
    """
    if shares_stages(old):
        return
    solver = solver_for(task, computing_nodes(old, task), goal)
    for number, seed in enumerate(_seeds(old, task, solver)):
        budget = Budget(solver, solver.solved + _ROUTES, task.deadline)
        better = improve(solver, seed, random.Random(task.seed + number), budget)
        yield _named_as_before(emit_plan(better.routes, task), old)


def computing_nodes(old: Plan, task: Task) -> list[Node]:
    """All nodes; without the CPUs where the old plan was one of GPUs only (a CPU would change its dtype)."""
    before = resolve_cluster(old)
    kinds = {before.device(device).type.kind for stage in old.stages for device in stage.devices}
    nodes = task.cluster.nodes
    gpus = [node for node in nodes if node.device.kind != "cpu"]
    return gpus if gpus and "cpu" not in kinds else list(nodes)


def _seeds(old: Plan, task: Task, solver: RouteSolver) -> Iterator[Partition]:
    """First everything in its place, then what was broken joined in one pipeline with the devices not used yet."""
    stages = {stage.name: stage for stage in old.stages}
    intact = _intact_stages(old, task)
    whole: list[Solution] = []
    broken: list[list[Group]] = []
    for route in old.routes:
        members = [stages[hop.stage] for hop in route.path]
        kept = None
        if all(stage.name in intact for stage in members):
            kept = as_written(solver, members)
        if kept is not None:
            whole.append(_unless_much_better(solver, kept))
        else:
            broken.append([group for stage in members for group in _remains(solver, stage, stage.name in intact)])
    used = {d for s in whole for g in s.groups for d in g.devices} | {
        d for groups in broken for g in groups for d in g.devices
    }
    spare = _spare_groups(old, solver, used)
    mended: list[Solution] = []
    loose = list(spare)
    for groups in broken:
        found = solver.best(groups)
        if found is not None:
            mended.append(found)
        else:
            loose.extend(groups)
    if whole or mended:
        yield make_partition(solver, [*whole, *mended], loose)
    rest = [group for groups in broken for group in groups]
    for joined in ([*rest, *spare], rest):
        together = solver.best(joined) if len(broken) > 1 or (broken and spare) else None
        if together is not None:
            left = [] if joined is not rest else spare
            yield make_partition(solver, [*whole, together], left)


def as_written(solver: RouteSolver, members: Sequence[Stage]) -> Solution | None:
    """A pipeline of these stages with just the layers that they have; None where not one request fits."""
    groups = [_group(solver, stage) for stage in members]
    if not solver.topology.passable([group.place for group in groups]):
        return None
    chain, layers = solver.chain(groups), [stage.layers[1] - stage.layers[0] for stage in members]
    division = (within_limits if solver.goal == "slo" else measure)(chain, layers, solver.traffic)
    return None if division is None else Solution(tuple(groups), division, solver.value(division))


def _unless_much_better(solver: RouteSolver, kept: Solution) -> Solution:
    """A pipeline goes on as it is unless another division is better by more than what counts as equal."""
    other = solver.best(kept.groups)
    return other if other is not None and other.value > kept.value + 0.01 * abs(kept.value) else kept


def _group(solver: RouteSolver, stage: Stage) -> Group:
    devices = {device.id: device for device in solver.topology.cluster.devices()}
    place = solver.topology.index[stage.devices[0].rsplit("/", 1)[0]]
    return Group(stage.devices, group_shape(stage, solver.topology, devices), place)


def _remains(solver: RouteSolver, stage: Stage, intact: bool) -> list[Group]:
    """The stage itself, or a group on each node of what is left of it."""
    if intact:
        return [_group(solver, stage)]
    nodes = {node.name: node.count for node in solver.topology.nodes}
    left: dict[str, list[int]] = {}
    for device in stage.devices:
        name, number = device.rsplit("/", 1)
        if int(number) < nodes.get(name, 0):
            left.setdefault(name, []).append(int(number))
    return [_on_node(solver, name, numbers) for name, numbers in left.items()]


def _on_node(solver: RouteSolver, name: str, numbers: Sequence[int]) -> Group:
    place = solver.topology.index[name]
    node = solver.topology.nodes[place]
    devices = tuple(f"{name}/{i}" for i in sorted(numbers))
    return Group(devices, GroupShape((node.device,) * len(devices), node.link), place)


def _spare_groups(old: Plan, solver: RouteSolver, used: set[str]) -> list[Group]:
    """Devices that no stage holds, grouped as wide as the old plan mostly does on nodes of the kind."""
    before = resolve_cluster(old)
    widths: dict[tuple[str, int], Counter[int]] = {}
    for stage in old.stages:
        node = before.node(stage.devices[0].rsplit("/", 1)[0])
        widths.setdefault((node.device.name, node.count), Counter())[stage.width] += 1
    groups: list[Group] = []
    for node in solver.topology.nodes:
        free = [i for i in range(node.count) if f"{node.name}/{i}" not in used]
        usual = widths.get((node.device.name, node.count))
        width = usual.most_common(1)[0][0] if usual else min(node.count, solver.cost.model.heads)
        start = 0
        for size in even_widths(len(free), width):
            groups.append(_on_node(solver, node.name, free[start : start + size]))
            start += size
    return groups


def _named_as_before(plan: Plan, old: Plan) -> Plan:
    """A stage that still has the same devices keeps its name; the others get names that nobody has."""
    names = {frozenset(stage.devices): stage.name for stage in old.stages}
    taken = set(names.values())
    fresh = (f"s{i}" for i in range(len(taken) + len(plan.stages)) if f"s{i}" not in taken)
    renamed = {s.name: names.get(frozenset(s.devices)) or next(fresh) for s in plan.stages}
    return dataclasses.replace(
        plan,
        stages=tuple(dataclasses.replace(stage, name=renamed[stage.name]) for stage in plan.stages),
        routes=tuple(
            Route(tuple(dataclasses.replace(hop, stage=renamed[hop.stage]) for hop in route.path), route.weight)
            for route in plan.routes
        ),
    )
