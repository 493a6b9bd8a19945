"""A plan as the search sees it, on a cluster that may have changed since: where quick re-plans start from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from hexgen.cluster import Device, Node
from hexgen.plan import Plan, Stage
from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.evaluate import group_shape
from hexgen.scheduler.explain.state import node_of, nodes_of
from hexgen.scheduler.groups import Group, Topology, even_widths
from hexgen.scheduler.improve import Partition, make_partition
from hexgen.scheduler.solver import RouteSolver, Solution


def seed_of(plan: Plan, solver: RouteSolver) -> Partition | None:
    """The plan's pipelines, each with the devices that are still there; everything else is spare.

    None where no pipeline is left that holds the model, or routes share stages.
    """
    stages = {stage.name: stage for stage in plan.stages}
    names = [hop.stage for route in plan.routes for hop in route.path]
    if len(set(names)) < len(names):
        return None
    devices = {device.id: device for device in solver.topology.cluster.devices()}
    routes: list[Solution] = []
    spare: list[Group] = []
    for route in plan.routes:
        members = [stages[hop.stage] for hop in route.path]
        groups = [group for stage in members for group in _stage_groups(stage, solver.topology, devices)]
        found = solver.best(groups)
        if found is None:
            spare.extend(groups)
        else:
            routes.append(found)
    held = {device for solution in routes for group in solution.groups for device in group.devices}
    held |= {device for group in spare for device in group.devices}
    spare.extend(unused_groups(solver.topology, held, stages.values()))
    return make_partition(solver, routes, spare) if routes else None


def _stage_groups(stage: Stage, topology: Topology, devices: Mapping[str, Device]) -> list[Group]:
    """The stage's group; where some of its devices are gone, what is left of it on each node."""
    left = [device for device in stage.devices if device in devices and node_of(device) in topology.index]
    if len(left) == stage.width:
        return [Group(stage.devices, group_shape(stage, topology, devices), topology.index[node_of(left[0])])]
    return [
        _on_node(topology, topology.nodes[topology.index[name]], [d for d in left if node_of(d) == name])
        for name in nodes_of(left)
    ]


def unused_groups(topology: Topology, held: set[str], stages: Iterable[Stage] = ()) -> list[Group]:
    """Devices that nobody holds, in groups as wide as the stages on nodes of their kind mostly are."""
    widths: dict[object, Counter[int]] = {}
    for stage in stages:
        place = topology.index.get(node_of(stage.devices[0]))
        if place is not None:
            node = topology.nodes[place]
            widths.setdefault((node.device, node.count), Counter())[stage.width] += 1
    groups: list[Group] = []
    for node in topology.nodes:
        free = [f"{node.name}/{i}" for i in range(node.count) if f"{node.name}/{i}" not in held]
        usual = widths.get((node.device, node.count))
        width = usual.most_common(1)[0][0] if usual else node.count
        start = 0
        for size in even_widths(len(free), width):
            groups.append(_on_node(topology, node, free[start : start + size]))
            start += size
    return groups


def _on_node(topology: Topology, node: Node, devices: Sequence[str]) -> Group:
    shape = GroupShape((node.device,) * len(devices), node.link)
    return Group(tuple(devices), shape, topology.index[node.name])
