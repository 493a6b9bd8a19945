"""Weights of a plan's routes by max-flow, for any plan: also one that a person wrote, or what is left of one.

What a stage computes and what a link carries, in tokens/s, prompt and output alike, bounds the flow (Helix,
ASPLOS'25, section 4). `routed` finds the routes too; `weighted` keeps the plan's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

from hexgen.errors import InfeasibleError
from hexgen.plan import Hop, Plan, Route, Stage
from hexgen.scheduler.best import finish, solver_for
from hexgen.scheduler.evaluate import evaluate, group_shape
from hexgen.scheduler.flow_graph import FlowSpace, Placed, max_flow
from hexgen.scheduler.groups import Group
from hexgen.scheduler.programs import pulp_or_none, solved
from hexgen.scheduler.task import Task

LEAST_WEIGHT = 1e-6  # of a route that carries nothing: a plan's weights are positive


def routed(plan: Plan, task: Task) -> Plan:
    """The plan's stages with the routes, and their weights, that carry most; the plan's own routes are not read.

    A route may pass from any stage to any that holds the next layer, and use only the later layers of it. Stages
    that nothing flows through are left out. Raises ``InfeasibleError`` where no chain of stages covers the layers.
    """
    space, placed = _space(plan, task)
    flow = max_flow(space, placed)
    if not flow.paths:
        raise InfeasibleError(
            "no chain of these stages covers every layer",
            where="stages",
            remedy=f"some stage must begin at 0, one end at {task.model.layers}, and each layer between be held",
        )
    total = sum(tokens_s for tokens_s, _ in flow.paths)
    routes: list[Route] = []
    for tokens_s, path in flow.paths:
        start = 0
        hops: list[Hop] = []
        for i in path:
            hops.append(Hop(plan.stages[i].name, (start, placed[i].end)))
            start = placed[i].end
        routes.append(Route(tuple(hops), max(LEAST_WEIGHT, round(tokens_s / total, 6))))
    used = {hop.stage for route in routes for hop in route.path}
    stages = tuple(stage for stage in plan.stages if stage.name in used)
    return finish(task, dataclasses.replace(plan, stages=stages, routes=tuple(routes)), "maxflow")


def flow_tokens_s(plan: Plan, task: Task) -> float:
    """The max-flow through the plan's stages, whatever its routes: tokens/s, prompt and output alike."""
    return max_flow(*_space(plan, task)).tokens_s


def weighted(plan: Plan, task: Task, objective: str = "throughput") -> Plan:
    """The plan with its own routes at the weights that serve most.

    Tried are what a flow through its stages carries, the same with what each route serves by itself as its limit
    (which counts KV residency, as a flow does not), and the weights that it had; the prediction decides. Routes
    over one stage share it as a linear program finds best; without a solver they keep their proportions.
    """
    draft = dataclasses.replace(plan, cluster=task.cluster)
    found = [finish(task, draft, objective)]
    for loads, limits in (_flow_limits(draft, task), _served_limits(draft, task, objective)):
        flows = _flows(loads, limits)
        if flows is None:
            break
        total = sum(flows)
        if total > 0:
            routes = tuple(
                dataclasses.replace(route, weight=max(LEAST_WEIGHT, round(flow / total, 6)))
                for route, flow in zip(plan.routes, flows, strict=True)
            )
            found.append(finish(task, dataclasses.replace(draft, routes=routes), objective))
    return max(found, key=lambda made: 0.0 if made.predicted is None else made.predicted.tokens_s)


def _space(plan: Plan, task: Task) -> tuple[FlowSpace, list[Placed]]:
    names = {device.rsplit("/", 1)[0] for stage in plan.stages for device in stage.devices}
    solver = solver_for(task, [node for node in task.cluster.nodes if node.name in names], "throughput")
    devices = {device.id: device for device in task.cluster.devices()}

    def placed(stage: Stage) -> Placed:
        place = solver.topology.index[stage.devices[0].rsplit("/", 1)[0]]
        return Placed(Group(stage.devices, group_shape(stage, solver.topology, devices), place), *stage.layers)

    return FlowSpace(solver), [placed(stage) for stage in plan.stages]


_Loads = list[dict[str, float]]  # of each route: the share of each stage's time that one unit a second takes
_Limits = list[float]  # of each route by itself, in units a second


def _flow_limits(plan: Plan, task: Task) -> tuple[_Loads, _Limits]:
    """In tokens/s. A hop that uses a part of its stage's layers takes that part of its time."""
    space, every = _space(plan, task)
    placed = {stage.name: place for stage, place in zip(plan.stages, every, strict=True)}
    capacity = {name: space.tokens_s(place) for name, place in placed.items()}
    loads: _Loads = []
    limits: _Limits = []
    for route in plan.routes:
        load: dict[str, float] = {}
        for hop in route.path:
            place = placed[hop.stage]
            part = (hop.layers[1] - hop.layers[0]) / (place.end - place.start)
            load[hop.stage] = part / capacity[hop.stage] if capacity[hop.stage] > 0 else math.inf
        links = [
            space.link_tokens_s(placed[a.stage].group, placed[b.stage].group) for a, b in pairwise(route.path)
        ]
        loads.append(load)
        limits.append(min([1 / max(load.values()), *links]))
    return loads, limits


def _served_limits(plan: Plan, task: Task, objective: str) -> tuple[_Loads, _Limits]:
    """In requests/s: what the evaluator says of each route with its stages to itself."""
    workload = dataclasses.replace(task.workload, rate="max")
    loads: _Loads = []
    limits: _Limits = []
    for route in plan.routes:
        used = {hop.stage for hop in route.path}
        stages = tuple(stage for stage in plan.stages if stage.name in used)
        alone = dataclasses.replace(plan, stages=stages, routes=(dataclasses.replace(route, weight=1.0),))
        found = evaluate(alone, task.cluster, task.model, workload, objective, cost_table=task.cost_table)
        loads.append({stage.stage: stage.utilisation / found.requests_s for stage in found.stages})
        limits.append(found.requests_s)
    return loads, limits


def _flows(loads: _Loads, limits: _Limits) -> list[float] | None:
    """What each route carries when all together carry most; None without a solver where one is needed."""
    if any(limit <= 0 for limit in limits):
        return [0.0] * len(limits)
    used = [stage for load in loads for stage in load]
    if len(set(used)) == len(used):
        return list(limits)
    return _shared_flows(loads, limits)


def _shared_flows(loads: Sequence[dict[str, float]], limits: Sequence[float]) -> list[float] | None:
    """Maximise the sum of flows; each within its own limit, and no stage busier than all the time."""
    pulp = pulp_or_none()
    if pulp is None:
        return None
    problem = pulp.LpProblem("flows", pulp.LpMaximize)
    flows = [pulp.LpVariable(f"f_{i}", 0, limit) for i, limit in enumerate(limits)]
    problem += pulp.lpSum(flows)
    for stage in sorted({stage for load in loads for stage in load}):
        problem += pulp.lpSum(load[stage] * f for load, f in zip(loads, flows, strict=True) if stage in load) <= 1
    if not solved(problem):
        return None
    return [max(0.0, float(flow.value() or 0.0)) for flow in flows]
