"""``plan``: from what is there and what is asked, to who holds which layers."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Literal, get_args

from hexgen.cluster import Cluster, Node
from hexgen.errors import InfeasibleError, SpecError
from hexgen.memory import plan_dtype
from hexgen.model import ModelSpec
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.scheduler.cost import CostModel
from hexgen.scheduler.evaluate import predict
from hexgen.scheduler.exact import exact
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.improve import Partition
from hexgen.scheduler.infeasible import infeasible
from hexgen.scheduler.search import search
from hexgen.scheduler.solver import Goal, RouteSolver, Solution
from hexgen.scheduler.traffic import traffic_of
from hexgen.units import format_time
from hexgen.validate import check_plan
from hexgen.workload import Lengths, Workload

Objective = Literal["throughput", "latency", "slo", "cost", "maxflow"]
Engine = Literal["auto", "exact", "heuristic", "genetic"]

_AUTO_EXACT_DEVICES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What is planned, with every default filled in."""

    cluster: Cluster
    model: ModelSpec
    workload: Workload
    options: EngineOptions
    engine: Engine
    seed: int
    deadline: float | None  # of time.monotonic()
    time_limited: bool
    quick: bool = False  # regular partitions only, for planners that compare many sets of nodes


def plan(
    cluster: Cluster,
    model: ModelSpec,
    workload: Workload | None = None,
    objective: Objective = "throughput",
    *,
    time_limit_s: float | None = None,
    seed: int = 0,
    engine: Engine = "auto",
    options: EngineOptions | None = None,
) -> Plan:
    """The best plan found for serving ``model`` on ``cluster``, with its prediction and the cluster inline.

    ``workload``: given, else the cluster's own, else the built-in chat default. ``options``: how the engine will
    run it; without, chosen for the cluster. The same input and seed give the same plan unless ``time_limit_s``
    cuts the search short. Raises ``SpecError`` for impossible requests, ``InfeasibleError`` where nothing fits.
    """
    task = make_task(cluster, model, workload, objective, time_limit_s, seed, engine, options)
    if objective == "maxflow":
        from hexgen.scheduler.flow import plan_for_flow

        return plan_for_flow(task)
    if objective == "cost" or (
        cluster.budget_usd_h is not None and total_price(cluster.nodes) > cluster.budget_usd_h
    ):
        from hexgen.scheduler.subsets import plan_within_price

        return plan_within_price(task, objective)
    found = best_on_nodes(task, cluster.nodes, goal_of(objective))
    if found is None:
        raise why_nothing(task, objective)
    return found.emit(task, objective)


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
        return infeasible(task.cluster, task.model, task.options, traffic)
    alone = quickest.partition.routes[0].division.alone
    return InfeasibleError(
        "no plan keeps the limits: the quickest answers one request alone with TTFT "
        f"{format_time(alone.ttft_s)}, TPOT {format_time(alone.tpot_s)}, latency {format_time(alone.latency_s)}",
        where="workload: slo",
        remedy="relax the limits, shorten the requests, or add faster devices",
    )


def solver_for(task: Task, nodes: Sequence[Node], goal: Goal) -> RouteSolver:
    """The solver of routes over these nodes, in the dtype that using all of them means."""
    cost = CostModel(task.model, plan_dtype(task.options, task.model, [n.device for n in nodes]), task.options)
    traffic = traffic_of(task.model, task.workload, task.options)
    return RouteSolver(Topology(task.cluster, nodes), cost, traffic, goal, exhaustive=task.engine == "exact")


def computing_alike(nodes: Sequence[Node], options: EngineOptions) -> list[tuple[Node, ...]]:
    gpus = tuple(node for node in nodes if node.device.kind != "cpu")
    if options.dtype is not None or not gpus or len(gpus) == len(nodes):
        return [tuple(nodes)]
    return [gpus, tuple(nodes)]


# ---- input ----------------------------------------------------------------------------------------------------


def make_task(
    cluster: Cluster,
    model: ModelSpec,
    workload: Workload | None,
    objective: str,
    time_limit_s: float | None,
    seed: int,
    engine: str,
    options: EngineOptions | None,
) -> Task:
    """Check what was asked, and fill in what was not. Raises ``SpecError``."""
    if objective not in get_args(Objective):
        raise SpecError(f"unknown objective {objective!r}", remedy=f"one of {', '.join(get_args(Objective))}")
    if engine not in get_args(Engine):
        raise SpecError(f"unknown engine {engine!r}", remedy=f"one of {', '.join(get_args(Engine))}")
    if engine == "genetic":
        raise SpecError("the genetic engine is not part of this version", remedy="use --engine auto")
    if time_limit_s is not None and not (math.isfinite(time_limit_s) and time_limit_s > 0):
        raise SpecError(
            f"a time limit of {time_limit_s} s leaves no time to plan", remedy="give it a positive number"
        )
    if not any(node.count for node in cluster.nodes):
        raise SpecError("there are no devices", where=cluster.name, remedy="add a node under `nodes:`")
    check_links(cluster)
    asked = workload or cluster.workload
    engine_options = options or default_options(cluster)
    limit = min(engine_options.max_context or model.max_context, model.max_context)
    filled = asked or default_workload(limit)
    needed = filled.prompt_tokens.mean + filled.output_tokens.mean
    if needed > limit:
        raise SpecError(
            f"the workload's mean request has {needed:g} tokens, and {model.name} takes at most {limit}",
            where="workload",
            remedy="lower prompt_tokens or output_tokens",
        )
    if (
        objective == "slo"
        and filled.slo.ttft_s is None
        and filled.slo.tpot_s is None
        and filled.slo.latency_s is None
    ):
        raise SpecError(
            "the objective slo needs limits, and the workload names none",
            where="workload: slo",
            remedy="add slo: {ttft: 2s, tpot: 100ms}",
        )
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    return Task(
        cluster,
        model,
        filled,
        engine_options,
        engine,  # type: ignore[arg-type]
        seed,
        deadline,
        time_limit_s is not None,
    )


def default_workload(max_context: int) -> Workload:
    """The built-in chat workload, shortened where a model's context is."""
    usual = Workload()
    longest = usual.prompt_tokens.mean + usual.output_tokens.mean
    if longest <= max_context:
        return usual
    share = max_context / longest
    return Workload(
        prompt_tokens=Lengths(mean=max(1, int(usual.prompt_tokens.mean * share))),
        output_tokens=Lengths(mean=max(1, int(usual.output_tokens.mean * share))),
    )


def default_options(cluster: Cluster) -> EngineOptions:
    """GPUs gain from larger batches; a CPU worker is busy with a few sequences."""
    only_gpus = all(node.device.kind != "cpu" for node in cluster.nodes)
    return EngineOptions(max_sequences=256) if only_gpus else EngineOptions()


def check_links(cluster: Cluster) -> None:
    links = [node.link for node in cluster.nodes] + [cluster.default_link]
    links += [entry.link for entry in cluster.region_links] + [entry.link for entry in cluster.node_links]
    if any(not link.bandwidth_bytes_s > 0 or not link.latency_s >= 0 for link in links):
        raise SpecError(
            "a link has no bandwidth",
            where=cluster.name,
            remedy="give it a positive bandwidth, or leave out the nodes that cannot be reached",
        )


def total_price(nodes: Sequence[Node]) -> float:
    return sum(node.price_usd_h or 0.0 for node in nodes)


def goal_of(objective: Objective) -> Goal:
    return objective if objective in ("latency", "slo") else "throughput"


# ---- output ---------------------------------------------------------------------------------------------------


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
    prediction = predict(draft, task.cluster, task.model, task.workload, memory, objective)
    return dataclasses.replace(draft, predicted=prediction)
