"""A plan laid open for explaining: its memory, its routes as the evaluator sees them, who is on which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.cluster import Cluster, Device
from hexgen.memory import PlanMemory, plan_memory
from hexgen.model import ModelSpec
from hexgen.plan import Plan, Stage
from hexgen.scheduler.best import goal_of, solver_for
from hexgen.scheduler.cost import CostModel
from hexgen.scheduler.evaluate import group_shape, route_state
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.residency import tabled_kv_tokens
from hexgen.scheduler.sharing import RouteState, StageLoad, stage_loads, sustained
from hexgen.scheduler.task import Objective, Task
from hexgen.scheduler.traffic import Traffic, traffic_of
from hexgen.workload import Slo


@dataclass(frozen=True, slots=True)
class OpenPlan:
    """A valid plan and everything that its explanation asks for."""

    plan: Plan
    cluster: Cluster
    model: ModelSpec
    traffic: Traffic
    memory: PlanMemory
    topology: Topology
    cost: CostModel
    kv_tokens: tuple[int, ...]  # of each route: as the bytes say, or as a cost table does
    routes: tuple[RouteState, ...]
    rates: tuple[float, ...]  # requests/s of each route when the cluster serves all it can
    loads: dict[str, StageLoad]  # how each stage spends its time then
    stages: dict[str, Stage]
    devices: dict[str, Device]
    measured: bool  # times come from a table, which does not say what a step consists of
    places: dict[str, tuple[tuple[int, int], ...]]  # stage -> (number of the route, index on its path)


def open_plan(plan: Plan, task: Task, objective: Objective) -> OpenPlan:
    """Raises ``InfeasibleError`` where the plan does not fit its cluster.

    Routes are opened as ``evaluate.predict`` does it, so that what is said fits what is predicted.
    """
    cluster = task.cluster
    memory = plan_memory(plan, cluster, task.model)
    stages = {stage.name: stage for stage in plan.stages}
    used = set(nodes_of([device for stage in plan.stages for device in stage.devices]))
    # Over the nodes in use only: a CPU that no stage has must not change the dtype.
    cost = solver_for(task, [node for node in cluster.nodes if node.name in used], goal_of(objective)).cost
    topology, traffic = Topology(cluster), traffic_of(task.model, task.workload, plan.engine)
    devices = {device.id: device for device in cluster.devices()}
    profiles = {name: cost.profile(group_shape(stage, topology, devices)) for name, stage in stages.items()}
    kv_tokens = memory.kv_tokens
    merges = task.cost_table is not None and task.cost_table.holds_kv
    if merges:
        kv_tokens = tabled_kv_tokens(plan, profiles, task.model)
    limited = objective in ("slo", "cost") and traffic.slo != Slo() and not merges
    routes = tuple(
        route_state(plan, route, kv, topology, cost, profiles, devices, traffic, limited)
        for route, kv in zip(plan.routes, kv_tokens, strict=True)
    )
    rates = tuple(sustained(plan, routes, traffic))
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in stages}
    for number, route in enumerate(plan.routes):
        for index, hop in enumerate(route.path):
            places[hop.stage].append((number, index))
    return OpenPlan(
        plan=plan,
        cluster=cluster,
        model=task.model,
        traffic=traffic,
        memory=memory,
        topology=topology,
        cost=cost,
        kv_tokens=kv_tokens,
        routes=routes,
        rates=rates,
        loads=stage_loads(plan, routes, rates),
        stages=stages,
        devices=devices,
        measured=task.cost_table is not None,
        places={name: tuple(found) for name, found in places.items()},
    )


def busy_share(opened: OpenPlan, stage: str) -> float:
    """Of the time, while the cluster serves all it can."""
    load = opened.loads[stage]
    return min(1.0, load.prefill + load.decode)


def steps_a_request(state: RouteState) -> float:
    return 1 / (state.full.requests_s * state.full.cycle_s)


def pipelines(plan: Plan) -> bool:
    """Whether no stage is on two routes (or twice on one), and every route uses all layers of its stages."""
    layers = {stage.name: stage.layers for stage in plan.stages}
    hops = [hop for route in plan.routes for hop in route.path]
    return len({hop.stage for hop in hops}) == len(hops) and all(layers[hop.stage] == hop.layers for hop in hops)


def node_of(device: str) -> str:
    return device.rsplit("/", 1)[0]


def nodes_of(devices: Sequence[str]) -> tuple[str, ...]:
    """The nodes of these devices, each once, in order."""
    return tuple(dict.fromkeys(node_of(device) for device in devices))
