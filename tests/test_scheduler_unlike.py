"""Large clusters with regions unlike each other: as good as planning each with care, and within the limit."""

from __future__ import annotations

import time

from hexgen.cluster import Cluster
from hexgen.model import load_model
from hexgen.scheduler import plan
from hexgen.scheduler.best import goal_of, solver_for
from hexgen.scheduler.generate import generate
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.regions import kinds_of_regions, regions
from hexgen.scheduler.search import search
from hexgen.scheduler.solver import RouteSolver
from hexgen.scheduler.task import make_task
from hexgen.scheduler.unlike import plan_unlike

MODEL = load_model("llama-1-30b")


def drawn() -> Cluster:
    return generate(112, regions=7, seed=3)


def whole_solver(cluster: Cluster) -> RouteSolver:
    task = make_task(cluster, MODEL, None, "throughput", None, 0, "auto", None)
    return solver_for(task, cluster.nodes, goal_of("throughput"))


def test_what_first_regions_teach_serves_no_less_than_every_start_everywhere() -> None:
    cluster = drawn()
    solver = whole_solver(cluster)
    parts = regions(solver.topology)
    assert kinds_of_regions(solver.topology) == len(parts) == 7
    with_care = []
    for part in parts:
        topology = Topology(cluster, [solver.topology.nodes[place] for place in part])
        started = search(RouteSolver(topology, solver.cost, solver.traffic, solver.goal), 0, None, 0)
        with_care.append(0.0 if started is None else started.value)
    told: list[float] = []
    found = plan_unlike(solver, parts, 0, None, lambda progress: told.append(progress.best_tokens_s))
    served = [0.0 if partition is None else partition.value for partition in found]
    assert sum(served) >= sum(with_care) > 0
    assert all(mine >= 0.98 * theirs for mine, theirs in zip(served, with_care, strict=True))
    assert told == sorted(told)
    assert abs(told[-1] - sum(served)) < 1e-6 * sum(served)


def test_a_passed_deadline_gives_each_region_its_first_start() -> None:
    cluster = drawn()
    solver = whole_solver(cluster)
    parts = regions(solver.topology)
    late = plan_unlike(solver, parts, 0, time.monotonic() - 1, None)
    longer = plan_unlike(solver, parts, 0, None, None)
    assert longer == plan_unlike(solver, parts, 0, None, None)
    assert all(partition is not None for partition in late)
    for first, better in zip(late, longer, strict=True):
        assert first is not None
        assert better is not None
        assert first.value <= better.value * (1 + 1e-9)


def test_regions_that_hold_nothing_alone_are_planned_together() -> None:
    cluster = generate(48, regions=12, seed=1)  # four devices each: too little memory for 65 GB of weights
    made = plan(cluster, MODEL, time_limit_s=0.0, engine="heuristic")
    used = {device.rsplit("/", 1)[0] for stage in made.stages for device in stage.devices}
    assert len({cluster.node(name).region for name in used}) > 1


def test_the_limit_counts_the_whole_command() -> None:
    started = time.monotonic()
    limited = plan(drawn(), MODEL, time_limit_s=1.0)
    assert time.monotonic() - started < 20  # 1.0 s where the machine is free
    assert limited.predicted is not None
