"""The search against brute force: every division of layers, every plan of small clusters, one evaluator."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, clusters, device_type, tiny_model

from hexgen.cluster import Cluster, Link, load_cluster
from hexgen.errors import InfeasibleError
from hexgen.model import ModelSpec, load_model
from hexgen.plan import EngineOptions, Hop, Plan, Prediction, Route, Stage
from hexgen.scheduler import evaluate, plan
from hexgen.scheduler.best import solver_for
from hexgen.scheduler.groups import Group, even_widths, islands, node_groups, spanning_groups
from hexgen.scheduler.layers import EXHAUSTIVE, NORMAL, measure
from hexgen.scheduler.solver import Goal
from hexgen.scheduler.task import Objective, make_task
from hexgen.validate import check_plan
from hexgen.workload import Lengths, Workload

SPECS = Path(__file__).parents[1] / "cluster_specs"
CONVERSATIONS = Workload(Lengths(763.1, max=2047), Lengths(232.4, max=1000))
OPTIONS = EngineOptions(token_budget=64, max_sequences=8)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


# ---- orders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 4, 5])
@pytest.mark.parametrize("sequences", [256, 384])
def test_more_groups_than_are_permuted_keep_nodes_together(first: int, sequences: int) -> None:
    """Four single A6000s, a pair each of A5000 and A4000: among the best orders, whatever was looked at before,
    and the best of all where it is looked for in earnest.
    """
    cluster = load_cluster(SPECS / "hexgen-asym-example8.yaml")
    model = load_model("llama-2-70b")
    options = EngineOptions(token_budget=160, max_sequences=sequences)
    task = make_task(cluster, model, CONVERSATIONS, "throughput", None, 0, "auto", options)
    solver = solver_for(task, cluster.nodes, "throughput")
    groups = [
        group
        for place, width in enumerate((1, 2, 2))
        for group in node_groups(solver.topology, place, even_widths(cluster.nodes[place].count, width))
    ]
    solver.cost.profile(groups[first].shape)  # known first, and so numbered
    orders = {tuple(groups.index(g) if g.width > 1 else 0 for g in order): order for order in permutations(groups)}
    divisions = [solver.divide(solver.chain(order), NORMAL) for order in orders.values()]
    best = max(division.steady.tokens_s for division in divisions if division is not None)
    found = solver.best(groups)
    assert len(orders) == 30
    assert found is not None
    assert found.value >= 0.99 * best
    assert solver.thorough(found).value == pytest.approx(best, rel=1e-9)


# ---- a fixed order ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    cluster=clusters(most_devices=5),
    layers=st.integers(2, 8),
    goal=st.sampled_from(["throughput", "latency"]),
    budget=st.sampled_from([16, 64]),
)
def test_layers_of_a_fixed_order_equal_brute_force(cluster: Cluster, layers: int, goal: Goal, budget: int) -> None:
    model = tiny_model(layers)
    options = EngineOptions(token_budget=budget, max_sequences=8)
    task = make_task(cluster, model, WORKLOAD, goal, None, 0, "auto", options)
    solver = solver_for(task, cluster.nodes, goal)
    groups = [
        group
        for place, node in enumerate(cluster.nodes)
        for group in node_groups(solver.topology, place, even_widths(node.count, 1))
    ]
    assume(len(groups) <= layers)
    chain = solver.chain(groups)
    best: float | None = None
    for division in compositions(layers, len(groups)):
        found = measure(chain, division, solver.traffic)
        if found is not None:
            value = solver.value(found)
            best = value if best is None else max(best, value)
    exact = solver.divide(chain, EXHAUSTIVE)
    assert (exact is None) == (best is None)
    if exact is not None and best is not None:
        assert solver.value(exact) == pytest.approx(best, rel=1e-9)
        normal = solver.divide(chain, NORMAL)
        assert normal is not None
        assert solver.value(normal) >= best - 0.05 * abs(best)


# ---- whole plans ------------------------------------------------------------------------------------------------


def partitions(items: tuple[str, ...]) -> Iterator[list[list[str]]]:
    """Set partitions."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for i, block in enumerate(smaller):
            yield [*smaller[:i], [first, *block], *smaller[i + 1 :]]


def node_of(device: str) -> str:
    return device.rsplit("/", 1)[0]


def best_pipelines(cluster: Cluster, model: ModelSpec, objective: Objective) -> dict[frozenset[str], float]:
    """The best single route of every set of devices, each evaluated as a plan."""
    ids = tuple(device.id for device in cluster.devices())
    best: dict[frozenset[str], float] = {}
    for size in range(1, 1 << len(ids)):
        members = tuple(ids[i] for i in range(len(ids)) if size >> i & 1)
        for blocks in partitions(members):
            if any(len({node_of(d) for d in block}) > 1 for block in blocks) or len(blocks) > model.layers:
                continue
            if any(len(block) > model.heads for block in blocks):
                continue
            for order in permutations(blocks):
                for division in compositions(model.layers, len(order)):
                    value = value_of(cluster, model, [list(zip(order, division, strict=True))], objective)
                    if value is not None:
                        key = frozenset(members)
                        best[key] = max(best.get(key, value), value)
    return best


def value_of(
    cluster: Cluster, model: ModelSpec, routes: list[list[tuple[list[str], int]]], objective: Objective
) -> float | None:
    stages: list[Stage] = []
    paths: list[Route] = []
    for route in routes:
        start = 0
        hops: list[Hop] = []
        for devices, layers in route:
            stages.append(Stage(f"s{len(stages)}", (start, start + layers), tuple(devices)))
            hops.append(Hop(stages[-1].name, (start, start + layers)))
            start += layers
        paths.append(Route(tuple(hops)))
    draft = Plan(model.name, cluster, tuple(stages), tuple(paths), OPTIONS)
    try:
        memory = check_plan(draft, cluster, model)
    except InfeasibleError:
        return None
    if memory.kv_tokens[0] < 64:  # 40 prompt and 24 output tokens: the planner's least room
        return None
    predicted = evaluate(draft, cluster, model, WORKLOAD, objective)
    return predicted.single_tokens_s if objective == "latency" else predicted.tokens_s


def best_partition(values: dict[frozenset[str], float], left: frozenset[str]) -> float:
    """Rates of pipelines on disjoint devices add up."""
    return max(
        (value + best_partition(values, left - used) for used, value in values.items() if used <= left),
        default=0.0,
    )


@settings(deadline=None, max_examples=25)
@given(cluster=clusters(most_devices=4), layers=st.integers(1, 5), latency=st.booleans())
def test_plans_of_small_clusters_equal_brute_force(cluster: Cluster, layers: int, latency: bool) -> None:
    model = tiny_model(layers)
    objective: Objective = "latency" if latency else "throughput"
    values = best_pipelines(cluster, model, objective)
    ids = frozenset(device.id for device in cluster.devices())
    if not values:
        with pytest.raises(InfeasibleError):
            plan(cluster, model, WORKLOAD, objective, options=OPTIONS)
        return
    best = max(values.values()) if latency else best_partition(values, ids)
    found = {
        engine: plan(cluster, model, WORKLOAD, objective, engine=engine, options=OPTIONS).predicted
        for engine in ("exact", "auto", "heuristic")
    }
    got = {engine: (p.single_tokens_s if latency else p.tokens_s) for engine, p in found.items() if p is not None}
    assert got["exact"] == pytest.approx(best, rel=1e-5)
    assert got["auto"] >= best * 0.98
    assert got["heuristic"] >= best * 0.95


@settings(deadline=None, max_examples=20)
@given(cluster=clusters(most_devices=6), layers=st.integers(1, 6), seed=st.integers(0, 3))
def test_emitted_plans_are_valid_repeatable_and_below_the_bound(cluster: Cluster, layers: int, seed: int) -> None:
    model = tiny_model(layers)
    try:
        made = plan(cluster, model, WORKLOAD, options=OPTIONS, seed=seed)
    except InfeasibleError:
        assume(False)
        return
    memory = check_plan(made, cluster, model)
    assert min(memory.kv_tokens) >= 64
    assert made.predicted is not None
    assert made.predicted.upper_bound_tokens_s is not None
    assert made.predicted.tokens_s <= made.predicted.upper_bound_tokens_s
    assert made == plan(cluster, model, WORKLOAD, options=OPTIONS, seed=seed)
    assert [stage.name for stage in made.stages] == [f"s{i}" for i in range(len(made.stages))]


# ---- by hand ----------------------------------------------------------------------------------------------------


def evaluated(made: Plan) -> Prediction:
    assert made.predicted is not None
    return made.predicted


def test_exact_packs_what_is_too_much_to_enumerate() -> None:
    cluster = cluster_of((device_type("cuda", 4, 1), 7), (device_type("cuda", 6, 2), 2))
    usual = evaluated(plan(cluster, tiny_model(), WORKLOAD, options=OPTIONS))
    proven = evaluated(plan(cluster, tiny_model(), WORKLOAD, engine="exact", options=OPTIONS))
    assert proven.tokens_s >= usual.tokens_s * (1 - 1e-9)
    assert proven.upper_bound_tokens_s is not None
    assert usual.upper_bound_tokens_s is not None
    assert proven.tokens_s <= proven.upper_bound_tokens_s <= usual.upper_bound_tokens_s * (1 + 1e-9)


def test_a_slow_device_far_away_is_left_out() -> None:
    fast, slow = device_type("cuda", 50, 10), device_type("cuda", 50, 0.01)
    cluster = cluster_of((fast, 1), (slow, 1))
    made = plan(cluster, tiny_model(), WORKLOAD, "latency", options=OPTIONS)
    assert [stage.devices for stage in made.stages] == [("n0/0",)]


def test_unequal_devices_get_unequal_layers() -> None:
    fast, slow = device_type("cpu", 4.5, 1.5), device_type("cpu", 4.5, 0.5)
    model = tiny_model(8)
    made = plan(cluster_of((fast, 1), (slow, 1), (fast, 1)), model, WORKLOAD, options=OPTIONS)
    assert len(made.stages) == 3
    layers = {stage.devices[0]: stage.layers[1] - stage.layers[0] for stage in made.stages}
    assert layers["n1/0"] < max(layers.values())


def test_nodes_on_a_fast_link_form_a_group_with_shares_by_speed() -> None:
    fast = device_type("cuda", 3, 100, "fast")
    slow = device_type("cuda", 3, 50, "slow")
    nvlink = Link(300e9, 2e-6)
    cluster = cluster_of((fast, 1), (slow, 1), link=nvlink, inside=nvlink)
    model = tiny_model(2, heads=6, kv_heads=6)
    found = plan(cluster, model, WORKLOAD, "latency", engine="exact", options=OPTIONS)
    solver = solver_for(
        make_task(cluster, model, WORKLOAD, "latency", None, 0, "auto", OPTIONS), cluster.nodes, "latency"
    )
    assert islands(solver.topology) == [(0, 1)]
    groups: list[Group] = spanning_groups(solver.topology, [(0, 0), (1, 0)], model.heads)
    assert (4.0, 2.0) in [group.shape.shares for group in groups]
    assert found.predicted is not None
    for stage in found.stages:
        check_plan(found, cluster, model)
        assert stage.width >= 1
