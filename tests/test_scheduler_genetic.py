"""HexGen's genetic search: nothing lost in mutation, nothing above the optimum, nothing left to chance."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import BUS, WORKLOAD, cluster_of, clusters, device_type, tiny_model

from hexgen.cluster import Cluster, Link, RegionLink
from hexgen.plan import EngineOptions
from hexgen.scheduler.best import best_on_nodes, solver_for
from hexgen.scheduler.exact import exact
from hexgen.scheduler.genetic import Genome, _Breeder, genetic, k_means
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.solver import Goal, RouteSolver
from hexgen.scheduler.task import make_task
from hexgen.validate import check_plan

OPTIONS = EngineOptions(token_budget=64, max_sequences=8)
goals = st.sampled_from(["throughput", "latency"])


def solver_of(cluster: Cluster, layers: int = 4, goal: Goal = "throughput", engine: str = "auto") -> RouteSolver:
    task = make_task(cluster, tiny_model(layers), WORKLOAD, goal, None, 0, engine, OPTIONS)
    return solver_for(task, cluster.nodes, goal)


def two_regions() -> Cluster:
    fast, slow = device_type("cuda", 4, 0.3), device_type("cuda", 3, 0.1)
    near, far = Link(1e9, 1e-4), Link(1e6, 5e-2)
    return cluster_of(
        (fast, 4), (slow, 4), (fast, 2), (slow, 2), (slow, 1), (fast, 1),
        link=far,
        regions=("east", "west", "east", "west", "west", "east"),
        region_links=(RegionLink(("east", "east"), near), RegionLink(("west", "west"), near)),
    )  # fmt: skip


def devices_of(genome: Genome) -> tuple[int, ...]:
    return tuple(map(sum, zip(*genome, strict=True)))


@settings(deadline=None, max_examples=30)
@given(cluster=clusters(most_devices=4), layers=st.integers(1, 5), goal=goals, seed=st.integers(0, 99))
def test_never_above_the_optimum(cluster: Cluster, layers: int, goal: Goal, seed: int) -> None:
    best = exact(solver_of(cluster, layers, goal, "exact"))
    found = genetic(solver_of(cluster, layers, goal), seed, None, population=4, generations=10)
    if best is None:
        assert found is None
    elif found is not None:
        assert found.value <= best.value + 1e-9 * abs(best.value)


@settings(deadline=None, max_examples=30)
@given(cluster=clusters(most_devices=8), seed=st.integers(0, 99), steps=st.integers(1, 30))
def test_mutations_keep_every_device(cluster: Cluster, seed: int, steps: int) -> None:
    breeder, rng = _Breeder(solver_of(cluster)), random.Random(seed)
    whole = tuple(node.count for node in cluster.nodes)
    for genome in breeder.starts(rng, 3):
        for _ in range(steps):
            assert devices_of(genome) == whole
            assert all(any(counts) and min(counts) >= 0 for counts in genome)
            genome = breeder.mutated(genome, rng)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_the_start_is_never_lost_and_more_generations_never_lose(seed: int) -> None:
    values: list[float] = []
    for generations in (0, 3, 30):
        found = genetic(solver_of(two_regions()), seed, None, population=5, generations=generations)
        assert found is not None
        values.append(found.value)
    assert values == sorted(values)
    breeder, rng = _Breeder(solver_of(two_regions())), random.Random(seed)
    assert values[0] == pytest.approx(max(breeder.fitness(genome) for genome in breeder.starts(rng, 5)))


def test_it_finds_what_its_start_has_not() -> None:
    start = genetic(solver_of(two_regions()), 0, None, generations=0)
    found = genetic(solver_of(two_regions()), 0, None)
    assert start is not None
    assert found is not None
    assert found.value > start.value * 1.01


def test_one_seed_one_partition_of_all_devices() -> None:
    cluster = two_regions()
    first, again = (genetic(solver_of(cluster), 7, None, generations=20) for _ in range(2))
    assert first is not None
    assert first == again
    used = [d for route in first.routes for group in route.groups for d in group.devices]
    used += [d for group in first.spare for d in group.devices]
    assert sorted(used) == sorted(device.id for device in cluster.devices())


def test_a_deadline_that_is_past_still_gives_the_first_that_serves() -> None:
    found = genetic(solver_of(two_regions()), 0, time.monotonic() - 1)
    assert found is not None
    assert found.value > 0


def test_what_cannot_hold_the_model_gives_nothing() -> None:
    tiny = cluster_of((device_type("cuda", 0.5, 0.1), 2))
    assert genetic(solver_of(tiny), 0, None, population=3, generations=3) is None


def test_clusters_follow_the_links() -> None:
    topology = Topology(two_regions())
    east = [i for i, node in enumerate(topology.nodes) if node.region == "east"]
    for seed in range(10):
        labels = k_means(topology, 2, random.Random(seed))
        assert len(set(labels)) == 2
        assert len({labels[i] for i in east}) == 1
    alike = Topology(cluster_of(*[(device_type("cuda", 4, 0.3), 1)] * 12, inside=BUS))
    assert {len(set(k_means(alike, 3, random.Random(seed)))) for seed in range(10)} == {3}


def test_as_an_engine() -> None:
    cluster = two_regions()
    task = make_task(cluster, tiny_model(), WORKLOAD, "throughput", None, 0, "auto", OPTIONS)
    found = best_on_nodes(dataclasses.replace(task, engine="genetic"), cluster.nodes, "throughput")
    assert found is not None
    made = found.emit(task, "throughput")
    check_plan(made, cluster, tiny_model())
    assert made.predicted is not None
    assert made.predicted.tokens_s > 0
