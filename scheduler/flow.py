"""Max-flow placement: the plan whose stages and links together let most tokens through (Helix, ASPLOS'25).

Stages are nodes of a graph; a stage feeds any other that holds the next layer, also when their ranges overlap
(the second then uses only its later layers). The flow, decomposed into paths, gives routes and weights. A flow
counts compute and links, not KV residency; the prediction, which does, is made by the usual evaluator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from hexgen.errors import InfeasibleError
from hexgen.plan import Hop, Plan, Route, Stage
from hexgen.scheduler.best import computing_alike, finish, routes_to_solve, solver_for
from hexgen.scheduler.cost import CostModel, StageProfile
from hexgen.scheduler.groups import Group
from hexgen.scheduler.improve import Partition
from hexgen.scheduler.infeasible import infeasible
from hexgen.scheduler.search import candidates
from hexgen.scheduler.solver import RouteSolver
from hexgen.scheduler.task import Task
from hexgen.scheduler.times import end_index
from hexgen.scheduler.traffic import mix_of, traffic_of

_CANDIDATES = 8
_SCALE = 1e6  # capacities become whole numbers (micro-tokens/s): preflow-push on floats may not end
_LEAST_SHARE = 1e-3  # of the flow: thinner paths are not worth a route
_MAX_ROUTES = 64


@dataclass(frozen=True, slots=True)
class _Placed:
    """A stage with what it lets through."""

    stage: Stage
    group: Group
    tokens_s: float


def plan_for_flow(task: Task) -> Plan:
    """The plan with the largest max-flow among the planner's candidate placements."""
    best: tuple[float, list[_Placed], list[tuple[float, list[int]]]] | None = None
    for nodes in computing_alike(task.cluster.nodes, task.options):
        solver = solver_for(task, nodes, "throughput")
        devices = sum(node.count for node in nodes)
        routes = routes_to_solve(devices, task.time_limited)
        for partition in candidates(solver, task.seed, task.deadline, routes)[:_CANDIDATES]:
            placed = _placed(solver, partition)
            value, paths = _max_flow(solver, placed)
            if best is None or value > best[0] * (1 + 1e-9):
                best = (value, placed, paths)
    if best is None:
        traffic = traffic_of(task.model, task.workload, task.options)
        raise infeasible(task.cluster, task.model, task.options, traffic)
    value, placed, paths = best
    if not paths:
        raise InfeasibleError("no path carries any flow", where=f"cluster {task.cluster.name}")
    used = sorted({i for _, path in paths for i in path})
    names = {i: f"s{n}" for n, i in enumerate(used)}
    stages = tuple(
        Stage(names[i], placed[i].stage.layers, placed[i].stage.devices, placed[i].stage.shares) for i in used
    )
    emitted: list[Route] = []
    for flow, path in paths:
        start = 0
        hops: list[Hop] = []
        for i in path:
            end = placed[i].stage.layers[1]
            hops.append(Hop(names[i], (start, end)))
            start = end
        emitted.append(Route(tuple(hops), round(flow / value, 6)))
    return finish(task, Plan(task.model.name, task.cluster, stages, tuple(emitted), task.options), "maxflow")


def _placed(solver: RouteSolver, partition: Partition) -> list[_Placed]:
    placed: list[_Placed] = []
    for solution in partition.routes:
        start = 0
        depth = len(solution.groups)
        for i, (group, layers) in enumerate(zip(solution.groups, solution.division.layers, strict=True)):
            profile = solver.cost.profile(group.shape)
            rate = _stage_tokens_s(solver, profile, layers, depth, i == 0, i == depth - 1)
            stage = Stage(f"c{len(placed)}", (start, start + layers), group.devices, group.shape.shares)
            placed.append(_Placed(stage, group, rate))
            start += layers
    return placed


def _stage_tokens_s(
    solver: RouteSolver, profile: StageProfile, layers: int, depth: int, embeds: bool, samples: bool
) -> float:
    """Output tokens/s of a stage that is never short of work."""
    traffic = solver.traffic
    mix = mix_of(traffic, float(traffic.max_sequences), depth)
    step = profile.times(mix).busy_s(layers, end_index(embeds, samples))
    return mix.running / mix.steps_in_flight / mix.cycles / step * traffic.output


def _link_tokens_s(solver: RouteSolver, cost: CostModel, a: Group, b: Group) -> float:
    """Output tokens/s that the edge between two stages could carry, prompts included."""
    link = solver.topology.link(a.place, b.place)
    edge = cost.edge(cost.profile(a.shape), cost.profile(b.shape), link)
    traffic = solver.traffic
    return traffic.output / ((traffic.prompt + traffic.decodes) * edge.token_s)


def _max_flow(solver: RouteSolver, placed: Sequence[_Placed]) -> tuple[float, list[tuple[float, list[int]]]]:
    layers = solver.cost.model.layers
    graph = nx.DiGraph()
    for i, a in enumerate(placed):
        graph.add_edge(("in", i), ("out", i), capacity=int(a.tokens_s * _SCALE))
        start, end = a.stage.layers
        if start == 0:
            graph.add_edge("source", ("in", i))
        if end == layers:
            graph.add_edge(("out", i), "sink")
        for j, b in enumerate(placed):
            if i != j and b.stage.layers[0] <= end < b.stage.layers[1]:
                capacity = int(_link_tokens_s(solver, solver.cost, a.group, b.group) * _SCALE)
                graph.add_edge(("out", i), ("in", j), capacity=capacity)
    if "source" not in graph or "sink" not in graph:
        return 0.0, []
    value, flow = nx.maximum_flow(graph, "source", "sink")
    paths = _paths(flow, float(value))
    carried = sum(amount for amount, _ in paths)
    return carried / _SCALE, [(amount / _SCALE, path) for amount, path in paths]


def _paths(flow: dict[object, dict[object, int]], value: float) -> list[tuple[float, list[int]]]:
    """The flow as paths, widest first; what is thinner than a share of it is left out."""
    left = {a: {b: amount for b, amount in targets.items() if amount > 0} for a, targets in flow.items()}
    paths: list[tuple[float, list[int]]] = []
    while len(paths) < _MAX_ROUTES:
        here: object = "source"
        walk: list[object] = ["source"]
        while here != "sink":
            targets = left.get(here, {})
            if not targets:
                break
            here = max(targets, key=lambda b: (targets[b], str(b)))
            walk.append(here)
        if here != "sink":
            break
        amount = min(left[a][b] for a, b in pairwise(walk))
        for a, b in pairwise(walk):
            left[a][b] -= amount
            if left[a][b] == 0:
                del left[a][b]
        if amount >= _LEAST_SHARE * value:
            stages = [point[1] for point in walk if isinstance(point, tuple) and point[0] == "in"]
            paths.append((float(amount), stages))
        elif paths:
            break
    return paths
