"""A plan laid open for explaining: its memory, its routes as the evaluator sees them, who is on which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.cluster import Cluster, Device
from hexgen.memory import PlanMemory, plan_memory
from hexgen.model import ModelSpec
from hexgen.plan import Plan, Route, Stage
from hexgen.scheduler.best import goal_of, solver_for
from hexgen.scheduler.cost import CostModel, EdgeCost
from hexgen.scheduler.evaluate import group_shape
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.pipeline import Part, Steady, concurrency_for, most_within_limits, steady
from hexgen.scheduler.task import Objective, Task
from hexgen.scheduler.traffic import Traffic, traffic_of
from hexgen.workload import Slo


@dataclass(frozen=True, slots=True)
class OpenRoute:
    """One route at the most requests that it takes at once."""

    parts: tuple[Part, ...]
    edges: tuple[EdgeCost, ...]
    steady: Steady

    @property
    def steps_a_request(self) -> float:
        return 1 / (self.steady.requests_s * self.steady.cycle_s)


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
    routes: tuple[OpenRoute, ...]
    rates: tuple[float, ...]  # requests/s of each route when the cluster serves all it can
    busy: dict[str, float]  # share of the time that each stage works then
    stages: dict[str, Stage]
    devices: dict[str, Device]
    places: dict[str, tuple[tuple[int, int], ...]]  # stage -> (number of the route, index on its path)


def open_plan(plan: Plan, task: Task, objective: Objective) -> OpenPlan:
    """Raises ``InfeasibleError`` where the plan does not fit its cluster.

    What is served follows ``evaluate.predict``: routes share the load by weight, shared stages divide their time.
    """
    cluster = task.cluster
    memory = plan_memory(plan, cluster, task.model)
    stages = {stage.name: stage for stage in plan.stages}
    used = set(nodes_of([device for stage in plan.stages for device in stage.devices]))
    # Over the nodes in use only: a CPU that no stage has must not change the dtype.
    solver = solver_for(task, [node for node in cluster.nodes if node.name in used], goal_of(objective))
    topology, traffic = Topology(cluster), traffic_of(task.model, task.workload, plan.engine)
    devices = {device.id: device for device in cluster.devices()}
    limited = objective in ("slo", "cost") and traffic.slo != Slo()
    routes = tuple(
        _open_route(route, kv, stages, topology, solver.cost, devices, traffic, limited)
        for route, kv in zip(plan.routes, memory.kv_tokens, strict=True)
    )
    rates, busy = _loads(plan, routes)
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
        cost=solver.cost,
        routes=routes,
        rates=rates,
        busy=busy,
        stages=stages,
        devices=devices,
        places={name: tuple(found) for name, found in places.items()},
    )


def _open_route(
    route: Route,
    kv_tokens: int,
    stages: dict[str, Stage],
    topology: Topology,
    cost: CostModel,
    devices: dict[str, Device],
    traffic: Traffic,
    limited: bool,
) -> OpenRoute:
    profiles = [cost.profile(group_shape(stages[hop.stage], topology, devices)) for hop in route.path]
    at = [topology.index[node_of(stages[hop.stage].devices[0])] for hop in route.path]
    last = len(profiles) - 1
    parts = tuple(
        Part(profile, hop.layers[1] - hop.layers[0], i == 0, i == last)
        for i, (profile, hop) in enumerate(zip(profiles, route.path, strict=True))
    )
    edges = tuple(cost.edge(profiles[i], profiles[i + 1], topology.link(at[i], at[i + 1])) for i in range(last))
    back = cost.token_edge(profiles[-1], profiles[0], topology.link(at[-1], at[0])) if last else None
    most = max(1, concurrency_for(kv_tokens, traffic))
    if limited:
        most = max(1, most_within_limits(parts, edges, back, traffic, most))
    return OpenRoute(parts, edges, steady(parts, edges, back, traffic, float(most)))


def _loads(plan: Plan, routes: Sequence[OpenRoute]) -> tuple[tuple[float, ...], dict[str, float]]:
    """Requests/s of each route, and the share of the time that each stage works, at the most that is served."""
    total = sum(route.weight for route in plan.routes)
    shares = [route.weight / total for route in plan.routes]
    a_request = {stage.name: 0.0 for stage in plan.stages}  # seconds of the stage for one request of the cluster
    for route, opened, share in zip(plan.routes, routes, shares, strict=True):
        for hop, seconds in zip(route.path, opened.steady.busy_s, strict=True):
            a_request[hop.stage] += share * opened.steps_a_request * seconds
    limit = min(opened.steady.requests_s / share for opened, share in zip(routes, shares, strict=True))
    limit = min([limit, *(1 / seconds for seconds in a_request.values() if seconds > 0)])
    busy = {name: min(1.0, limit * seconds) for name, seconds in a_request.items()}
    return tuple(limit * share for share in shares), busy


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
