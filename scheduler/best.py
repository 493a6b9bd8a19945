"""The best plan over a given set of nodes: which search runs, and how its answer becomes a checked plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from hexgen.cluster import Node
from hexgen.errors import InfeasibleError
from hexgen.memory import plan_dtype
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.scheduler.combine import combined, heuristic
from hexgen.scheduler.cost import CostModel
from hexgen.scheduler.evaluate import predict
from hexgen.scheduler.exact import MAX_DEVICES, exact
from hexgen.scheduler.genetic import genetic
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.improve import Partition
from hexgen.scheduler.infeasible import infeasible
from hexgen.scheduler.solver import Goal, RouteSolver, Solution
from hexgen.scheduler.task import Objective, Task
from hexgen.scheduler.traffic import traffic_of
from hexgen.units import format_time
from hexgen.validate import check_plan

_AUTO_EXACT_DEVICES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A partition, and tokens/s that none over the same nodes exceeds (``inf`` where that is not known)."""

    partition: Partition
    bound: float = math.inf

    def emit(self, task: Task, objective: str) -> Plan:
        """The partition as a checked plan with its prediction; ``bound`` must be one of the whole cluster."""
        made = finish(task, emit_plan(self.partition.routes, task), objective)
        return bounded(made, self.bound)


def bounded(made: Plan, bound: float) -> Plan:
    """The plan with the tighter of its prediction's bound and ``bound``."""
    predicted = made.predicted
    if predicted is None or not math.isfinite(bound):
        return made
    known = predicted.upper_bound_tokens_s
    # The evaluator rounds otherwise than the search: a bound must not fall below the plan it bounds.
    least = max(bound, predicted.tokens_s)
    tighter = least if known is None else min(known, least)
    return dataclasses.replace(made, predicted=dataclasses.replace(predicted, upper_bound_tokens_s=tighter))


def best_on_nodes(task: Task, nodes: Sequence[Node], goal: Goal) -> Found | None:
    """The best partition over these nodes; None where the model does not fit.

    A CPU worker on a route makes the whole plan compute in float32, so GPUs are also tried without the CPUs.
    """
    best: Partition | None = None
    bound = 0.0
    for subset in computing_alike(nodes, task.options):
        found = _search(task, solver_for(task, subset, goal))
        bound = max(bound, math.inf if found is None else found.bound)
        if found is not None and (best is None or found.partition.value > best.value):
            best = found.partition
    return None if best is None else Found(best, bound)


def _search(task: Task, solver: RouteSolver) -> Found | None:
    devices = sum(node.count for node in solver.topology.nodes)
    if task.engine == "genetic":
        return _found(genetic(solver, task.seed, task.deadline))
    if task.engine == "exact" and devices <= MAX_DEVICES:
        complete = exact(solver)
        return None if complete is None else Found(complete, _proven(solver, complete))
    routes = 0 if task.quick else routes_to_solve(devices, task.time_limited and task.engine == "heuristic")
    if task.engine == "auto" and devices <= _AUTO_EXACT_DEVICES:
        complete = exact(solver)
        if complete is not None:
            return Found(complete, _proven(solver, complete))
    if task.quick or task.engine == "heuristic" or solver.goal == "latency":
        return _found(heuristic(task, solver, routes))
    found = combined(task, solver, routes)
    if found is None:
        return None
    # A table's stages serve whatever waits as one batch, across routes: the bound on disjoint pipelines says less.
    return Found(found[0], found[1] if task.cost_table is None else math.inf)


def _found(partition: Partition | None) -> Found | None:
    return None if partition is None else Found(partition)


def _proven(solver: RouteSolver, best: Partition) -> float:
    """Enumeration is a proof of itself; latency is not counted in tokens/s of a loaded cluster."""
    return math.inf if solver.goal == "latency" else best.value


def routes_to_solve(devices: int, time_limited: bool) -> int:
    """The search's budget. One route takes milliseconds, and longer the more stages it has."""
    routes = 600 if devices <= 64 else max(100, 40_000 // devices)
    return routes * 50 if time_limited else routes


def does_not_fit(task: Task) -> InfeasibleError:
    traffic = traffic_of(task.model, task.workload, task.options)
    return infeasible(
        task.cluster,
        task.model,
        task.options,
        traffic,
        cost_table=task.cost_table,
        unreachable=task.unreachable,
    )


def why_nothing(task: Task, objective: Objective) -> InfeasibleError:
    """The model does not fit; or, where limits were set, not even one request alone keeps them."""
    quickest = best_on_nodes(task, task.cluster.nodes, "latency") if objective in ("slo", "cost") else None
    if quickest is None:
        return does_not_fit(task)
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
    # Every order of every set of groups: for as few devices as are enumerated.
    every = task.engine == "exact" and sum(node.count for node in nodes) <= MAX_DEVICES
    return RouteSolver(Topology(task.cluster, nodes), cost, traffic, goal, exhaustive=every)


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
