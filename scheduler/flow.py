"""Max-flow placement: the plan whose stages and links together let most tokens through (Helix, ASPLOS'25).

Placements come from chains of one rate each, from the planner's own candidates, and, where it is small enough,
from an integer program over intervals of layers; each is measured as a graph with its links, and the best becomes
routes with weights. A flow counts compute and links, not KV residency; the prediction, which does, is made by the
usual evaluator. `flow_bound` says what no placement exceeds, and ends the search where it is reached.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence

from hexgen.plan import Hop, Plan, Route, Stage
from hexgen.scheduler.best import computing_alike, does_not_fit, finish, routes_to_solve, solver_for
from hexgen.scheduler.flow_bound import flow_bound_tokens_s
from hexgen.scheduler.flow_chains import FlowChain, chain_placements, placed_of
from hexgen.scheduler.flow_graph import Flow, FlowSpace, Placed, max_flow
from hexgen.scheduler.flow_program import program_placement
from hexgen.scheduler.groups import islands
from hexgen.scheduler.improve import Partition
from hexgen.scheduler.search import candidates
from hexgen.scheduler.solver import RouteSolver
from hexgen.scheduler.task import Task

_CANDIDATES = 8
_REACHED = 1e-3  # relative: a placement this near to the bound is not improved
_MANY_DEVICES = 128  # improving takes long with more: without a time limit the chains are the answer
_ACROSS = 5e-3  # relative: a flow across chains that carries this little more is not worth its many routes
_MANY_STAGES = 250  # of a placement: flow across chains is not looked for
_PROGRAM_DEVICES = 12  # with more, the program is only tried where a time limit is given: it may need all of it
_PROGRAM_S = 20.0

Found = tuple[Flow, list[Placed]]


def plan_for_flow(task: Task) -> Plan:
    """The plan with the largest max-flow of those found, and the bound on it."""
    best: Found | None = None
    bound = 0.0
    for nodes in computing_alike(task.cluster.nodes, task.options):
        solver = solver_for(task, nodes, "throughput")
        limit = flow_bound_tokens_s(solver.cost, nodes, solver.traffic)
        if islands(solver.topology):
            limit = math.inf  # groups may span nodes, which the bound does not count
        bound = max(bound, limit)
        for found in _placements(task, solver, limit):
            if best is None or found[0].tokens_s > best[0].tokens_s * (1 + 1e-9):
                best = found
    if best is None or not best[0].paths:
        raise does_not_fit(task)
    flow, placed = best
    made = finish(task, _emit(task, flow, placed), "maxflow")
    if made.predicted is None:
        return made
    told = dataclasses.replace(
        made.predicted,
        max_flow_tokens_s=flow.tokens_s,
        max_flow_bound_tokens_s=bound if math.isfinite(bound) else None,
    )
    return dataclasses.replace(made, predicted=told)


def _placements(task: Task, solver: RouteSolver, bound: float) -> Iterator[Found]:
    """Chains first: they cost least, and often reach the bound."""
    space = FlowSpace(solver)
    best = 0.0
    for chains in chain_placements(space):
        found = _as_chains(space, chains)
        best = max(best, found[0].tokens_s)
        yield found
    devices = sum(node.count for node in solver.topology.nodes)
    if best >= bound * (1 - _REACHED) or (best > 0 and devices > _MANY_DEVICES and not task.time_limited):
        return
    routes = routes_to_solve(devices, True) if task.time_limited else 0  # the search improves something else
    for partition in candidates(solver, task.seed, task.deadline, routes)[:_CANDIDATES]:
        placed = _placed(partition)
        flow = max_flow(space, placed)
        best = max(best, flow.tokens_s)
        yield flow, placed
    left = _PROGRAM_S if task.deadline is None else task.deadline - time.monotonic()
    small = task.time_limited or devices <= _PROGRAM_DEVICES
    if small and best < bound * (1 - _REACHED) and left > 0:
        placed = program_placement(space, left)
        yield max_flow(space, placed), placed


def _as_chains(space: FlowSpace, chains: Sequence[FlowChain]) -> Found:
    """The flow along the chains; across them where that carries more."""
    placed = placed_of(chains)
    carried = sum(chain.tokens_s for chain in chains)
    if len(placed) <= _MANY_STAGES:
        flow = max_flow(space, placed)
        if carried < flow.tokens_s * (1 - _ACROSS):
            return flow, placed
    paths: list[tuple[float, tuple[int, ...]]] = []
    first = 0
    for chain in chains:
        paths.append((chain.tokens_s, tuple(range(first, first + len(chain.groups)))))
        first += len(chain.groups)
    return Flow(carried, tuple(paths)), placed


def _placed(partition: Partition) -> list[Placed]:
    placed: list[Placed] = []
    for solution in partition.routes:
        start = 0
        for group, layers in zip(solution.groups, solution.division.layers, strict=True):
            placed.append(Placed(group, start, start + layers))
            start += layers
    return placed


def _emit(task: Task, flow: Flow, placed: Sequence[Placed]) -> Plan:
    """Stages that carry something, in the order of their layers; a route for each path."""
    used = sorted({i for _, path in flow.paths for i in path}, key=lambda i: (placed[i].start, i))
    names = {i: f"s{n}" for n, i in enumerate(used)}
    stages = tuple(
        Stage(names[i], (placed[i].start, placed[i].end), placed[i].group.devices, placed[i].group.shape.shares)
        for i in used
    )
    routes: list[Route] = []
    for tokens_s, path in flow.paths:
        start = 0
        hops: list[Hop] = []
        for i in path:
            hops.append(Hop(names[i], (start, placed[i].end)))
            start = placed[i].end
        routes.append(Route(tuple(hops), max(1e-6, round(tokens_s / flow.tokens_s, 6))))
    return Plan(task.model.name, task.cluster, stages, tuple(routes), task.options)
