"""Packing and local search in turn, from shaken plans: never worse, every device once, better than its start."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, clusters, tiny_model

from hexgen.cluster import Cluster, load_cluster
from hexgen.model import load_model
from hexgen.plan import EngineOptions
from hexgen.scheduler.best import solver_for
from hexgen.scheduler.exact import exact
from hexgen.scheduler.improve import Partition
from hexgen.scheduler.polish import _shaken, polished
from hexgen.scheduler.search import search
from hexgen.scheduler.solver import RouteSolver
from hexgen.scheduler.task import make_task
from hexgen.workload import Lengths, Workload

SPECS = Path(__file__).parents[1] / "cluster_specs"
CONVERSATIONS = Workload(Lengths(763.1, max=2047), Lengths(232.4, max=1000))


def solver_of(name: str) -> RouteSolver:
    cluster = load_cluster(SPECS / f"{name}.yaml")
    options = EngineOptions(token_budget=128, max_sequences=768)
    model = load_model("llama-2-70b")
    task = make_task(cluster, model, CONVERSATIONS, "throughput", None, 0, "auto", options)
    return solver_for(task, cluster.nodes, "throughput")


def devices_of(partition: Partition) -> list[str]:
    groups = [*(g for route in partition.routes for g in route.groups), *partition.spare]
    return sorted(device for group in groups for device in group.devices)


def test_shaken_plans_keep_every_device_once() -> None:
    solver = solver_of("hexgen-half30")
    start = search(solver, 0, None, 0)
    assert start is not None
    rng = random.Random(0)
    shaken = [found for _ in range(12) if (found := _shaken(solver, start, rng)) is not None]
    assert all(devices_of(found) == devices_of(start) for found in shaken)
    assert len({tuple(route.groups for route in found.routes) for found in shaken}) > 6
    assert start.routes
    for found in shaken:
        assert found.value == pytest.approx(sum(route.value for route in found.routes))


@settings(deadline=None, max_examples=8)
@given(cluster=clusters(most_devices=5), seed=st.integers(0, 3))
def test_between_its_start_and_the_best_of_all(cluster: Cluster, seed: int) -> None:
    options = EngineOptions(token_budget=64, max_sequences=8)
    task = make_task(cluster, tiny_model(5), WORKLOAD, "throughput", None, 0, "auto", options)
    complete = exact(solver_for(task, cluster.nodes, "throughput"))
    runs = []
    for _ in range(2):
        solver = solver_for(task, cluster.nodes, "throughput")
        start = search(solver, 0, None, 0)
        assert (start is None) == (complete is None)
        if start is None or complete is None:
            return
        runs.append(polished(solver, start, seed, None))
        assert devices_of(runs[-1]) == devices_of(start)
        assert start.value <= runs[-1].value <= complete.value * (1 + 1e-9)
    assert runs[0].value == runs[1].value
    assert runs[0].value >= 0.9 * complete.value
