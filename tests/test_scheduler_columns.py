"""Packing by column generation: its knapsacks against brute force, its bound against every plan there is."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from scheduler_clusters import WORKLOAD, clusters, tiny_model

from hexgen.cluster import Cluster, load_cluster
from hexgen.model import load_model
from hexgen.scheduler.best import solver_for
from hexgen.scheduler.columns import Effort, pack
from hexgen.scheduler.columns.classes import Classes
from hexgen.scheduler.columns.knapsack import FIRST, LAST, MIDDLE, Kind, Room, cheapest, have_room
from hexgen.scheduler.columns.place import typical
from hexgen.scheduler.columns.pricing import Pricer
from hexgen.scheduler.columns.small import cheapest_few
from hexgen.scheduler.exact import exact
from hexgen.scheduler.groups import islands
from hexgen.scheduler.planner import plan
from hexgen.scheduler.search import search
from hexgen.scheduler.task import make_task

SPECS = Path(__file__).parents[1] / "cluster_specs"
THOROUGH = Effort(rounds=60, looks=5000, work=1e9)


def drawn_kinds(rng: random.Random) -> list[Kind]:
    kinds: list[Kind] = []
    for node_class in range(rng.randint(1, 3)):
        count, nodes = rng.randint(1, 4), rng.randint(1, 2)
        kinds += [
            Kind(node_class, width, nodes * (count // width), nodes * count, count)
            for width in range(1, count + 1)
        ]
    return kinds


def fit(widths: Sequence[int], free: tuple[int, ...]) -> bool:
    """Whether nodes with so many free devices have room for groups so wide, by trying every node for each."""
    if not widths:
        return True
    return any(
        fit(widths[1:], (*free[:i], room - widths[0], *free[i + 1 :]))
        for i, room in enumerate(free)
        if room >= widths[0]
    )


def by_brute_force(
    holds: np.ndarray, cost: np.ndarray, kinds: Sequence[Kind], depth: int, layers: int
) -> dict[Room, float]:
    """The least price over every sequence of types."""
    best: dict[Room, float] = {"devices": math.inf, "nodes": math.inf}
    for types in itertools.product(range(len(kinds)), repeat=depth):
        places = [FIRST, *[MIDDLE] * (depth - 2), LAST]
        held = [holds[place, t] for place, t in zip(places, types, strict=True)]
        price = float(sum(cost[t] for t in types))
        if price >= best["nodes"] or min(held) == 0 or sum(held) < layers:
            continue
        classes = {kinds[t].node_class: kinds[t] for t in types}
        widths = {k: [kinds[t].width for t in types if kinds[t].node_class == k] for k in classes}
        if all(types.count(t) <= kinds[t].available for t in types) and all(
            sum(widths[k]) <= kind.devices for k, kind in classes.items()
        ):
            best["devices"] = min(best["devices"], price)
            if all(
                fit(widths[k], (kind.node_devices,) * (kind.devices // kind.node_devices))
                for k, kind in classes.items()
            ):
                best["nodes"] = price
    return best


@pytest.mark.parametrize("seed", range(120))
def test_knapsacks_equal_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    kinds = drawn_kinds(rng)
    depth, layers = rng.randint(2, 4), rng.randint(3, 9)
    middle = [rng.randint(0, 4) for _ in kinds]
    ends = [[max(0, n - rng.randint(0, 1)) for n in middle] for _ in range(2)]
    holds = np.array([middle, *ends])
    cost = np.array([rng.random() + 0.1 for _ in kinds])
    prices = by_brute_force(holds, cost, kinds, depth, layers)
    for room, expected in prices.items():
        found = cheapest(holds, cost, kinds, depth, layers, math.inf, room=room)
        assert (math.inf if found is None else found[0]) == pytest.approx(expected)
        if found is not None:
            assert len(found[1]) == depth
            assert sum(cost[t] for t in found[1]) == pytest.approx(expected)
            assert have_room([kinds[t] for t in found[1]]) or room != "nodes"
            assert cheapest(holds, cost, kinds, depth, layers, found[0] * 0.99, room=room) is None
    if depth <= 3:
        few, types = cheapest_few(holds[:, :, None], cost, kinds, depth, layers)
        assert few[0] == pytest.approx(prices["nodes"])
        assert math.isinf(few[0]) or sum(cost[t] for t in types[0]) == pytest.approx(few[0])


@settings(max_examples=25, deadline=None)
@given(clusters())
def test_the_bound_holds_for_the_best_of_all_plans(cluster: Cluster) -> None:
    task = make_task(cluster, tiny_model(), WORKLOAD, "throughput", None, 0, "exact", None)
    solver = solver_for(task, cluster.nodes, "throughput")
    best = exact(solver)
    packed = pack(solver, THOROUGH)
    if best is None:
        assert packed.partition is None
        return
    assert packed.partition is not None
    # Packing chooses among everything that enumeration has seen.
    if not islands(solver.topology):
        assert packed.partition.value == pytest.approx(best.value, rel=5e-3)
        assert packed.bound >= best.value * (1 - 1e-9)


def test_pricing_finds_pipelines_that_local_search_did_not_propose() -> None:
    cluster, model = load_cluster(SPECS / "helix-distributed24.yaml"), load_model("llama-2-70b")
    task = make_task(cluster, model, None, "throughput", None, 0, "auto", None)
    solver = solver_for(task, cluster.nodes, "throughput")
    first = search(solver, 0, None, 0)
    assert first is not None
    packed = pack(solver, THOROUGH)
    assert packed.partition is not None
    assert packed.partition.value >= first.value
    assert first.value < packed.bound < math.inf
    assert packed.rounds > 1


@pytest.mark.parametrize(("name", "gap"), [("helix-single24", 0.06), ("helix-a100x4", 0.01), ("helix-l4x8", 0.01)])
def test_published_clusters_are_planned_close_to_their_bound(name: str, gap: float) -> None:
    made = plan(load_cluster(SPECS / f"{name}.yaml"), load_model("llama-2-70b"))
    assert made.predicted is not None
    assert made.predicted.upper_bound_tokens_s is not None
    assert made.predicted.tokens_s >= made.predicted.upper_bound_tokens_s * (1 - gap)


def test_listed_pipelines_serve_no_more_than_listed() -> None:
    """Their bounds hold, and are close."""
    cluster = load_cluster(SPECS / "hexgen-asym-example8.yaml")
    task = make_task(cluster, load_model("llama-2-70b"), None, "throughput", None, 0, "auto", None)
    solver = solver_for(task, cluster.nodes, "throughput")
    classes = Classes(solver.topology, solver.cost)
    pricer = Pricer(classes, solver.traffic, solver.cost.model.layers, limited=False, looks=0, work=1e9)
    listed = pricer.listed(np.full(len(classes.types), 1e-3), 0.0)
    assert {len(found.types) for found in listed} >= {2, 3, 4}
    over: list[float] = []
    for found in random.Random(0).sample(listed, 100):
        groups = typical(classes, found.types, found.pool)
        solution = solver.best(groups) if groups else None
        if solution is not None:
            price = 1e-3 * len(found.types)
            assert solution.value <= found.ratio * price * (1 + 1e-9), found.types
            over.append(found.ratio * price / solution.value)
    assert len(over) > 50
    assert sorted(over)[len(over) // 2] < 1.05
