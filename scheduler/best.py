"""The best plan over a given set of nodes: which search runs, and how its answer becomes a checked plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hexgen.cluster import Node
from hexgen.errors import InfeasibleError
from hexgen.memory import plan_dtype
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.scheduler.cost import CostModel
from hexgen.scheduler.evaluate import predict
from hexgen.scheduler.exact import exact
from hexgen.scheduler.genetic import genetic
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.improve import Partition
from hexgen.scheduler.infeasible import infeasible
from hexgen.scheduler.search import search
from hexgen.scheduler.solver import Goal, RouteSolver, Solution
from hexgen.scheduler.task import Objective, Task
from hexgen.scheduler.traffic import traffic_of
from hexgen.units import format_time
from hexgen.validate import check_plan

_AUTO_EXACT_DEVICES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A partition and what it was found with."""

    partition: Partition

    def emit(self, task: Task, objective: str) -> Plan:
        """The partition as a checked plan with its prediction."""
        return finish(task, emit_plan(self.partition.routes, task), objective)


def best_on_nodes(task: Task, nodes: Sequence[Node], goal: Goal) -> Found | None:
    """The best partition over these nodes; None where the model does not fit.

    A CPU worker on a route makes the whole plan compute in float32, so GPUs are also tried without the CPUs.
    """
    found: Found | None = None
    for subset in computing_alike(nodes, task.options):
        partition = _search(task, solver_for(task, subset, goal))
        if partition is not None and (found is None or partition.value > found.partition.value):
            found = Found(partition)
    return found


def _search(task: Task, solver: RouteSolver) -> Partition | None:
    devices = sum(node.count for node in solver.topology.nodes)
    if task.engine == "exact":
        return exact(solver)
    if task.engine == "genetic":
        return genetic(solver, task.seed, task.deadline)
    routes = 0 if task.quick else routes_to_solve(devices, task.time_limited)
    partition = search(solver, task.seed, task.deadline, routes)
    if task.engine == "auto" and devices <= _AUTO_EXACT_DEVICES:
        complete = exact(solver)  # everything that the search has solved is remembered
        if complete is not None and (partition is None or complete.value > partition.value):
            return complete
    return partition


def routes_to_solve(devices: int, time_limited: bool) -> int:
    """The search's budget. One route takes milliseconds, and longer the more stages it has."""
    routes = 600 if devices <= 64 else max(100, 40_000 // devices)
    return routes * 50 if time_limited else routes


def why_nothing(task: Task, objective: Objective) -> InfeasibleError:
    """The model does not fit; or, where limits were set, not even one request alone keeps them."""
    quickest = best_on_nodes(task, task.cluster.nodes, "latency") if objective in ("slo", "cost") else None
    if quickest is None:
        traffic = traffic_of(task.model, task.workload, task.options)
        return infeasible(
            task.cluster,
            task.model,
            task.options,
            traffic,
            cost_table=task.cost_table,
            unreachable=task.unreachable,
        )
    alone = quickest.partition.routes[0].division.alone
    return InfeasibleError(
        "no plan keeps the limits: the quickest answers one request alone with TTFT "
        f"{format_time(alone.ttft_s)}, TPOT {format_time(alone.tpot_s)}, latency {format_time(alone.latency_s)}",
        where="workload: slo",
        remedy="relax the limits, shorten the requests, or add faster devices",
    )


def solver_for(task: Task, nodes: Sequence[Node], goal: Goal) -> RouteSolver:
    """The solver of routes over these nodes, in the dtype that using all of them means."""
    dtype = plan_dtype(task.options, task.model, [n.device for n in nodes])
    cost = CostModel(task.model, dtype, task.options, task.cost_table)
    traffic = traffic_of(task.model, task.workload, task.options)
    return RouteSolver(Topology(task.cluster, nodes), cost, traffic, goal, exhaustive=task.engine == "exact")


def computing_alike(nodes: Sequence[Node], options: EngineOptions) -> list[tuple[Node, ...]]:
    gpus = tuple(node for node in nodes if node.device.kind != "cpu")
    if options.dtype is not None or not gpus or len(gpus) == len(nodes):
        return [tuple(nodes)]
    return [gpus, tuple(nodes)]


def goal_of(objective: Objective) -> Goal:
    return objective if objective in ("latency", "slo") else "throughput"


def emit_plan(routes: Sequence[Solution], task: Task) -> Plan:
    """Stages s0, s1, ... in the order of the routes; routes in the order of their first devices in the cluster."""
    place = {node.name: i for i, node in enumerate(task.cluster.nodes)}

    def position(solution: Solution) -> tuple[int, int]:
        name, number = solution.groups[0].devices[0].rsplit("/", 1)
        return place[name], int(number)

    ordered = sorted(routes, key=position)
    rates = [solution.division.steady.requests_s for solution in ordered]
    stages: list[Stage] = []
    emitted: list[Route] = []
    for solution, rate in zip(ordered, rates, strict=True):
        start = 0
        path: list[Hop] = []
        for group, layers in zip(solution.groups, solution.division.layers, strict=True):
            name = f"s{len(stages)}"
            stages.append(Stage(name, (start, start + layers), group.devices, group.shape.shares))
            path.append(Hop(name, (start, start + layers)))
            start += layers
        weight = 1.0 if len(ordered) == 1 else round(rate / sum(rates), 6)
        emitted.append(Route(tuple(path), max(weight, 1e-6)))
    return Plan(task.model.name, task.cluster, tuple(stages), tuple(emitted), task.options)


def finish(task: Task, draft: Plan, objective: str) -> Plan:
    """Check the plan as a person's would be, and predict what it does."""
    memory = check_plan(draft, task.cluster, task.model, where="the planner's own plan")
    prediction = predict(
        draft, task.cluster, task.model, task.workload, memory, objective, cost_table=task.cost_table
    )
    return dataclasses.replace(draft, predicted=prediction)
