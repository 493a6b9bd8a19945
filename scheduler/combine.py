"""How the engines work together: local search proposes pipelines, packing chooses among all that were ever seen,
prices from packing lead to pipelines that nobody has seen, and local search goes on from what was chosen."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from hexgen.scheduler.columns import Effort, SolverError, merged, pack
from hexgen.scheduler.deadline import part_until, passed
from hexgen.scheduler.genetic import genetic
from hexgen.scheduler.groups import Topology, islands
from hexgen.scheduler.improve import Budget, Partition, improve, make_partition
from hexgen.scheduler.polish import polished
from hexgen.scheduler.progress import Progress
from hexgen.scheduler.regions import Places, kinds_of_regions, region_by_region, several
from hexgen.scheduler.search import search
from hexgen.scheduler.solver import RouteSolver
from hexgen.scheduler.task import Task
from hexgen.scheduler.unlike import plan_unlike

_GAIN = 1e-6  # relative: less is rounding
_TURNS = 4  # of packing and improving, while they gain
_ROUTES = 300  # that improving may work out in one turn
_USUAL = Effort(rounds=30, looks=500, work=1e7)
_PROOF = Effort(rounds=300, looks=20_000, work=4e9)
_PACK_ONLY = Effort(rounds=0, looks=0, work=0.0)
_MANY_DEVICES = 160  # beyond this many, pricing only where time was given for it
# Of the time that is left each takes so much at most, one after the other; the rest is for the proof.
_FOR_LOCAL_SEARCH = 0.15
_FOR_BREEDING = 0.1
_FOR_POLISH = 0.3
_GENES, _MORE_GENES = (20, 20), (100, 300)  # population and generations: usually, and where time was given
_GENES_DEVICES, _FEW_DEVICES = 24, 8  # the most, one and several a node, unless time was given
_FEW = 6  # kinds of regions: where there are more, each gets little (`hexgen.scheduler.unlike`)
_FOR_REGIONS, _FOR_UNLIKE = 0.3, 0.8  # of the time that is left: where kinds are few, and where they are many
_WHOLE_DEVICES = 96  # up to this many, local search looks at all of them together


def heuristic(task: Task, solver: RouteSolver, routes: int) -> Partition | None:
    """Local search alone; region by region where there are many devices. ``routes``: that it may work out."""
    if solver.goal == "latency" or not several(solver.topology, _WHOLE_DEVICES):
        return search(solver, task.seed, task.deadline, routes)

    def plan_part(places: Places, until: float | None) -> Partition | None:
        return search(_part(solver, places), task.seed, until, routes)

    return _region_by_region(task, solver, plan_part)


def combined(task: Task, solver: RouteSolver, routes: int) -> tuple[Partition, float] | None:
    """The best partition, and a bound on all (``inf`` where none was proven); None where nothing fits.

    ``routes``: that local search may work out at first.
    """
    if several(solver.topology, _MANY_DEVICES):
        return _by_regions(task, solver, routes)
    started = time.monotonic()
    first = _proposed(task, solver, routes)
    if first is None:
        return None
    if passed(task.deadline):
        return first, math.inf  # even to set packing up takes seconds
    devices = sum(node.count for node in solver.topology.nodes)
    best, bound = first, math.inf

    def tell(proven: float, phase: str) -> None:
        if task.progress is not None:
            known = None if math.isinf(proven) else proven
            task.progress(Progress(best.value, known, time.monotonic() - started, phase))

    until = part_until(task.deadline, _FOR_POLISH)
    if until is not None and task.engine != "exact":
        tell(bound, "improving")
        best = polished(solver, best, task.seed, until)
    effort = _effort(task, devices)
    joined = bool(islands(solver.topology))  # then pricing is for the relaxed cluster, below
    try:
        for turn in range(_TURNS):
            tell(bound, "packing")
            now = effort if turn == 0 and not joined else replace(_PACK_ONLY, deadline=task.deadline)
            found = pack(solver, now, lambda proven: tell(proven, "proving"))
            bound = min(bound, found.bound)
            before = best.value
            if found.partition is not None and found.partition.value > best.value:
                best = found.partition
            if best.value >= bound * (1 - _GAIN):
                break
            budget = Budget(solver, solver.solved + _ROUTES, task.deadline)
            best = improve(solver, best, random.Random(task.seed + turn), budget)
            if passed(task.deadline) or best.value <= before * (1 + _GAIN):
                break
        if joined:
            bound = _island_bound(task, solver, effort)
    except SolverError:
        pass  # said once where it was noticed; what local search found stands
    best = make_partition(solver, [solver.thorough(route) for route in best.routes], best.spare)
    tell(bound, "done")
    return best, bound


def _island_bound(task: Task, solver: RouteSolver, effort: Effort) -> float:
    topology = merged(solver.topology)
    if topology is None:
        return math.inf
    relaxed = RouteSolver(topology, solver.cost, solver.traffic, solver.goal)
    search(relaxed, task.seed, task.deadline, 0)
    return pack(relaxed, effort, whole=False).bound


def _proposed(task: Task, solver: RouteSolver, routes: int) -> Partition | None:
    """What local search finds, or the published genetic search: both leave all they saw to packing."""
    first = search(solver, task.seed, part_until(task.deadline, _FOR_LOCAL_SEARCH), routes)
    devices = sum(node.count for node in solver.topology.nodes)
    # With one device a node there are no widths to try, and breeding costs little.
    cheap = devices <= _GENES_DEVICES and all(node.count == 1 for node in solver.topology.nodes)
    if first is None or passed(task.deadline) or not (cheap or devices <= _FEW_DEVICES or task.time_limited):
        return first
    population, generations = _MORE_GENES if task.time_limited or cheap else _GENES
    late = part_until(task.deadline, _FOR_BREEDING)
    bred = genetic(solver, task.seed, late, population=population, generations=generations)
    return bred if bred is not None and bred.value > first.value else first


def _by_regions(task: Task, solver: RouteSolver, routes: int) -> tuple[Partition, float] | None:
    """Each kind of region by itself; the bound is one on the whole."""
    few = kinds_of_regions(solver.topology) <= _FEW
    inside = replace(task, deadline=part_until(task.deadline, _FOR_REGIONS if few else _FOR_UNLIKE))

    def plan_part(places: Places, until: float | None) -> Partition | None:
        if len(places) == len(solver.topology.nodes):
            return None
        found = combined(replace(inside, deadline=until), _part(solver, places), routes)
        return found[0] if found is not None else None

    best = _region_by_region(inside, solver, plan_part) or search(solver, task.seed, task.deadline, 0)
    if best is None:
        return None
    if not task.time_limited or passed(task.deadline):
        return best, math.inf
    solver.found.extend(dict.fromkeys(best.routes))
    try:
        return best, pack(solver, replace(_PROOF, deadline=task.deadline), whole=False).bound
    except SolverError:
        return best, math.inf


def _region_by_region(
    task: Task, solver: RouteSolver, plan_part: Callable[[Places, float | None], Partition | None]
) -> Partition | None:
    """Each kind of region by ``plan_part``, with an equal share of the time left; where they are many, with
    little for each.
    """

    def plan_parts(parts: Sequence[Places]) -> list[Partition | None]:
        if len(parts) > _FEW:
            return plan_unlike(solver, parts, task.seed, task.deadline, task.progress)
        return [
            plan_part(places, part_until(task.deadline, 1 / (len(parts) - i))) for i, places in enumerate(parts)
        ]

    return region_by_region(solver, plan_parts)


def _part(solver: RouteSolver, places: Places) -> RouteSolver:
    topology = Topology(solver.topology.cluster, [solver.topology.nodes[place] for place in places])
    return RouteSolver(topology, solver.cost, solver.traffic, solver.goal, exhaustive=solver.exhaustive)


def _effort(task: Task, devices: int) -> Effort:
    if task.engine == "exact" or task.time_limited:
        return replace(_PROOF, deadline=task.deadline)
    return _USUAL if devices <= _MANY_DEVICES else _PACK_ONLY
