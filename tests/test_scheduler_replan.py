"""Plans made from plans: what moves is counted exactly, no more moves than must, broken plans are mended soon."""

from __future__ import annotations

import dataclasses
from itertools import permutations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, device_type, tiny_model

from hexgen.catalogue import DEVICE_TYPES
from hexgen.cluster import Cluster, Link, RegionLink, load_cluster
from hexgen.errors import InfeasibleError, SpecError
from hexgen.model import ModelSpec, load_model
from hexgen.plan import EngineOptions, Hop, Plan, Prediction, Route, Stage
from hexgen.scheduler.assignment import assign
from hexgen.scheduler.moves import common_bytes, dealt_to_keep_most, device_moves, holdings, surviving
from hexgen.scheduler.planner import plan
from hexgen.scheduler.reachable import without_nodes
from hexgen.scheduler.replan import EQUAL, Replanned, replan
from hexgen.validate import check_plan
from hexgen.workload import Lengths, Workload

SPECS = Path(__file__).parent.parent / "cluster_specs"
OPTIONS = EngineOptions(token_budget=64, max_sequences=8)
QUICK = settings(deadline=None, max_examples=60)


def predicted(made: Plan) -> Prediction:
    assert made.predicted is not None
    return made.predicted


# ---- who does what ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(data=st.data(), n=st.integers(1, 5))
def test_assignments_equal_brute_force(data: st.DataObject, n: int) -> None:
    costs = [data.draw(st.lists(st.integers(-20, 20), min_size=n, max_size=n)) for _ in range(n)]
    chosen = assign(costs)
    assert sorted(chosen) == list(range(n))
    best = min(sum(costs[i][j] for i, j in enumerate(order)) for order in permutations(range(n)))
    assert sum(costs[i][j] for i, j in enumerate(chosen)) == best


def random_plan(data: st.DataObject, cluster: Cluster, model: ModelSpec) -> Plan:
    """One pipeline through some of the devices, in any order: stages of one or two devices of a node."""
    devices = data.draw(st.permutations([device.id for device in cluster.devices()]))
    stages: list[tuple[str, ...]] = []
    for device in devices[: data.draw(st.integers(1, len(devices)))]:
        same = [i for i, s in enumerate(stages) if len(s) == 1 and s[0].split("/")[0] == device.split("/")[0]]
        if same and data.draw(st.booleans()):
            stages[same[0]] += (device,)
        elif len(stages) < model.layers:
            stages.append((device,))
    cuts = sorted(data.draw(st.permutations(range(1, model.layers)))[: len(stages) - 1])
    edges = [0, *cuts, model.layers]
    made = tuple(
        Stage(
            f"s{i}",
            (edges[i], edges[i + 1]),
            held,
            data.draw(st.sampled_from([None, (3.0, 1.0)])) if len(held) == 2 else None,
        )
        for i, held in enumerate(stages)
    )
    path = tuple(Hop(stage.name, stage.layers) for stage in made)
    return Plan(model.name, cluster, made, (Route(path),), OPTIONS)


def total_loads(held_plan: Plan, new: Plan, cluster: Cluster, model: ModelSpec) -> int:
    held = surviving(held_plan, cluster, model)
    return sum(move.loads_bytes for move in device_moves(held, new, cluster, model))


@QUICK
@given(data=st.data(), tie=st.booleans())
def test_equal_devices_are_dealt_as_brute_force_would(data: st.DataObject, tie: bool) -> None:
    """Three equal nodes of two devices and an odd one: all 3! x 2!^3 ways to deal, times 2 for the odd one."""
    same, other = device_type("cpu", 50, 1), device_type("cpu", 60, 1)
    cluster = cluster_of((same, 2), (same, 2), (same, 2), (other, 2))
    model = tiny_model(layers=8, tie=tie)
    old, new = random_plan(data, cluster, model), random_plan(data, cluster, model)
    dealt = dealt_to_keep_most(surviving(old, cluster, model), new, cluster, model)
    best = None
    for nodes in permutations(range(3)):
        for flips in product((0, 1), repeat=4):
            names = {
                f"n{node}/{i}": f"n{(*nodes, 3)[node]}/{i ^ flips[node]}" for node in range(4) for i in range(2)
            }
            stages = tuple(
                dataclasses.replace(stage, devices=tuple(names[d] for d in stage.devices)) for stage in new.stages
            )
            loads = total_loads(old, dataclasses.replace(new, stages=stages), cluster, model)
            best = loads if best is None else min(best, loads)
    assert total_loads(old, dealt, cluster, model) == best
    check_plan(dealt, cluster, model)


@QUICK
@given(data=st.data(), tie=st.booleans())
def test_what_a_device_holds_is_what_the_engine_counts(data: st.DataObject, tie: bool) -> None:
    cluster = cluster_of((device_type("cpu", 50, 1), 3), (device_type("cpu", 50, 1), 2))
    model = tiny_model(layers=6, tie=tie)
    old, new = random_plan(data, cluster, model), random_plan(data, cluster, model)
    counted = {entry.device: entry.weights_bytes for entry in check_plan(new, cluster, model).devices}
    held = holdings(new, cluster, model)
    assert {device: common_bytes(model, what, what) for device, what in held.items()} == counted
    moves = {move.device: move for move in device_moves(surviving(old, cluster, model), new, cluster, model)}
    for device, weights in counted.items():
        assert moves[device].keeps_bytes + moves[device].loads_bytes == weights
    assert total_loads(new, new, cluster, model) == 0


def test_half_a_stage_keeps_half_its_weights() -> None:
    """From one device to two: the first keeps half of all matrices, and all norms; the second loads the rest."""
    model = tiny_model(layers=4)
    cluster = cluster_of((device_type("cpu", 50, 1), 2))
    path = (Route((Hop("s0", (0, 4)),)),)
    one = Plan("tiny", cluster, (Stage("s0", (0, 4), ("n0/0",)),), path, OPTIONS)
    two = Plan("tiny", cluster, (Stage("s0", (0, 4), ("n0/0", "n0/1")),), path, OPTIONS)
    moves = device_moves(surviving(one, cluster, model), two, cluster, model)
    assert [move.loads_bytes == 0 for move in moves] == [True, False]
    norms = (2 * model.layers + 1) * model.hidden_size * 4
    assert moves[0].frees_bytes == moves[1].loads_bytes - norms


# ---- changed clusters -------------------------------------------------------------------------------------------


def sound(done: Replanned, old: Plan, cluster: Cluster, model: ModelSpec) -> None:
    """A valid plan on what is there, books that add up, and no more moved than a fresh plan as good would move."""
    check_plan(done.plan, cluster, model)
    wanted = {entry.device: entry.weights_bytes for entry in predicted(done.plan).devices}
    assert done.loads_bytes + done.keeps_bytes == sum(wanted.values())
    assert done.loads_bytes == sum(move.loads_bytes for move in done.moves)
    there = {device.id for device in cluster.devices()}
    assert {move.device for move in done.moves} <= there
    assert set(done.gone) == {d for stage in old.stages for d in stage.devices} - there
    value = predicted(done.plan).tokens_s
    for other in done.considered:
        assert value >= other.tokens_s * (1 - EQUAL) * (1 - 1e-6)
        if other.tokens_s >= max(o.tokens_s for o in done.considered) * (1 - EQUAL):
            assert done.loads_bytes <= other.loads_bytes


@pytest.mark.parametrize("name", ["hexgen-half30", "helix-single24", "helix-distributed24"])
def test_an_unchanged_cluster_keeps_its_plan(name: str) -> None:
    cluster, model = load_cluster(SPECS / f"{name}.yaml"), load_model("llama-2-70b")
    old = plan(cluster, model, engine="heuristic")
    done = replan(old, cluster, model)
    assert done.plan.stages == old.stages
    assert done.plan.routes == old.routes
    assert done.loads_bytes == 0
    assert done.gone == ()


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("helix-single24", "a100-2"),
        ("helix-single24", "t4-5"),
        ("helix-distributed24", "l4-b-6"),
        ("hexgen-half30", "norway-1"),
        pytest.param("hexgen-full58", "illinois-a6-1", marks=pytest.mark.slow),
        pytest.param("hexgen-full58", "iceland-1", marks=pytest.mark.slow),
        pytest.param("helix-hetero42", "t4x4-2", marks=pytest.mark.slow),
    ],
)
def test_a_lost_node_is_replanned_soon(name: str, lost: str) -> None:
    whole, model = load_cluster(SPECS / f"{name}.yaml"), load_model("llama-2-70b")
    old = plan(whole, model, engine="heuristic")
    cluster = without_nodes(whole, {lost})
    done = replan(old, cluster, model)
    sound(done, old, cluster, model)
    assert predicted(done.plan).tokens_s <= predicted(old).tokens_s * 1.02
    fresh = [other for other in done.considered if other.name == "fresh"]
    assert fresh
    # Among plans that serve about as much, the one that moves least.
    equals = [other for other in done.considered if other.tokens_s >= 0.99 * predicted(done.plan).tokens_s]
    assert done.loads_bytes == min(other.loads_bytes for other in equals)
    assert done.elapsed_s < 10  # below 2 on a machine that has nothing else to do


def test_a_new_node_is_put_to_use() -> None:
    model = load_model("llama-2-13b")
    kind = (DEVICE_TYPES["L4"], 2)
    before, after = cluster_of(kind, kind), cluster_of(kind, kind, kind)
    old = plan(before, model, WORKLOAD)
    done = replan(old, after, model, WORKLOAD)
    sound(done, old, after, model)
    assert predicted(done.plan).tokens_s > 1.3 * predicted(old).tokens_s
    assert {d.split("/")[0] for stage in done.plan.stages for d in stage.devices} == {"n0", "n1", "n2"}
    # What ran goes on: only the new node loads.
    assert {move.device.split("/")[0] for move in done.moves if move.loads_bytes} == {"n2"}


def test_a_proven_bound_goes_along_where_it_still_holds_and_none_is_made_up() -> None:
    model = load_model("llama-2-13b")
    kind, small = (DEVICE_TYPES["L4"], 2), (DEVICE_TYPES["T4"], 1)
    before = cluster_of(kind, kind, small)
    old = plan(before, model, WORKLOAD)
    bound = predicted(old).upper_bound_tokens_s
    arithmetic = predicted(plan(before, model, WORKLOAD, time_limit_s=0.0)).upper_bound_tokens_s
    assert bound is not None
    assert arithmetic is not None
    assert predicted(old).tokens_s <= bound < 0.99 * arithmetic  # else there would be nothing to lose

    def told(cluster: Cluster, workload: Workload = WORKLOAD, from_plan: Plan = old) -> float | None:
        return predicted(replan(from_plan, cluster, model, workload, time_limit_s=0.3).plan).upper_bound_tokens_s

    assert told(before) == bound
    assert told(without_nodes(before, {"n2"})) == bound  # fewer devices serve no more
    assert told(cluster_of(kind, kind, small, small)) is None
    assert told(cluster_of(kind, kind, small, link=Link(1e12, 1e-9))) is None
    assert told(before, Workload(prompt_tokens=Lengths(50), output_tokens=Lengths(50))) is None
    loose = dataclasses.replace(predicted(old), upper_bound_tokens_s=arithmetic)
    assert told(before, from_plan=dataclasses.replace(old, predicted=loose)) is None


def test_a_link_that_slows_down_splits_a_pipeline_across_it() -> None:
    model = load_model("llama-2-7b")
    kind = (DEVICE_TYPES["RTX3060"], 2)  # the four of a region hold the model
    near = tuple(RegionLink((name, name), Link(12e9, 20e-6)) for name in ("east", "west"))
    regions = ("east", "east", "west", "west")
    fast, slow = (
        cluster_of(kind, kind, kind, kind, link=link, regions=regions, region_links=near)
        for link in (Link(12e9, 20e-6), Link(1e5, 0.3))
    )
    crossing = Plan(
        model.name,
        fast,
        tuple(
            Stage(f"s{n}", ((0, 16), (16, 32))[n % 2], (f"n{a}/{n // 2 % 2}",))
            for n, a in enumerate((0, 2, 0, 2, 1, 3, 1, 3))
        ),
        tuple(Route((Hop(f"s{n}", (0, 16)), Hop(f"s{n + 1}", (16, 32))), 0.25) for n in range(0, 8, 2)),
        EngineOptions(token_budget=64, max_sequences=64),
    )
    check_plan(crossing, fast, model)
    done = replan(crossing, slow, model)
    sound(done, crossing, slow, model)
    region = {f"n{i}": name for i, name in enumerate(regions)}
    stages = {stage.name: stage for stage in done.plan.stages}
    for route in done.plan.routes:
        assert len({region[stages[hop.stage].devices[0].split("/")[0]] for hop in route.path}) == 1
    unbroken = next(other for other in done.considered if other.name == "unbroken")
    assert predicted(done.plan).tokens_s > 2 * unbroken.tokens_s


def test_a_device_of_another_type_is_another_device() -> None:
    model = load_model("llama-2-7b")
    old = plan(cluster_of((DEVICE_TYPES["L4"], 1)), model, WORKLOAD)
    cluster = cluster_of((DEVICE_TYPES["A100-40G-SXM"], 1))
    done = replan(old, cluster, model, WORKLOAD)
    assert done.gone == ("n0/0",)
    assert done.keeps_bytes == 0
    assert done.loads_bytes == predicted(done.plan).devices[0].weights_bytes


def test_routes_that_share_stages_lose_only_what_is_gone() -> None:
    model = load_model("llama-2-7b")
    kind = (DEVICE_TYPES["L4"], 1)
    cluster = cluster_of(kind, kind, kind)
    stages = (Stage("a", (0, 16), ("n0/0",)), Stage("b", (16, 32), ("n1/0",)), Stage("c", (16, 32), ("n2/0",)))
    head, tails = Hop("a", (0, 16)), (Hop("b", (16, 32)), Hop("c", (16, 32)))
    old = Plan(model.name, cluster, stages, tuple(Route((head, tail), 0.5) for tail in tails), OPTIONS)
    left = without_nodes(cluster, {"n2"})
    done = replan(old, left, model, WORKLOAD)
    sound(done, old, left, model)
    unbroken = next(other for other in done.considered if other.name == "unbroken")
    assert unbroken.loads_bytes == 0
    assert unbroken.tokens_s > 0


def test_stages_that_lost_their_partners_are_routed_together() -> None:
    """Each of two pipelines loses one half; the halves that are left make a whole, and nothing is loaded."""
    model = load_model("llama-2-7b")
    kind = (DEVICE_TYPES["RTX3060"], 1)
    cluster = cluster_of(kind, kind, kind, kind, link=Link(12e9, 20e-6))
    halves = ((0, 16), (16, 32), (0, 16), (16, 32))
    stages = tuple(Stage(f"s{i}", halves[i], (f"n{i}/0",)) for i in range(4))
    routes = tuple(Route((Hop(f"s{i}", (0, 16)), Hop(f"s{i + 1}", (16, 32))), 0.5) for i in (0, 2))
    old = Plan(model.name, cluster, stages, routes, OPTIONS)
    done = replan(old, without_nodes(cluster, {"n1", "n2"}), model, objective="maxflow")
    assert done.loads_bytes == 0
    assert [[hop.stage for hop in route.path] for route in done.plan.routes] == [["s0", "s3"]]


@pytest.mark.parametrize("objective", ["latency", "slo", "cost", "maxflow"])
def test_other_objectives_are_replanned_too(objective: str) -> None:
    model = load_model("llama-2-7b")
    kind = (DEVICE_TYPES["RTX3090"], 1)
    cluster = cluster_of(kind, kind, kind, prices=(0.3, 0.3, 0.3))
    workload = Workload(rate=1.0) if objective == "cost" else None
    if objective == "slo":
        workload = dataclasses.replace(Workload(), slo=dataclasses.replace(Workload().slo, tpot_s=0.1, ttft_s=3.0))
    old = plan(cluster, model, workload, objective)  # type: ignore[arg-type]
    used = old.stages[0].devices[0].split("/")[0]
    left = without_nodes(cluster, {used})
    done = replan(old, left, model, workload, objective)  # type: ignore[arg-type]
    check_plan(done.plan, left, model)
    assert predicted(done.plan).objective == objective
    assert used not in {move.device.split("/")[0] for move in done.moves}


def test_what_no_longer_fits_is_refused() -> None:
    model = load_model("llama-2-70b")
    kind = (DEVICE_TYPES["A100-40G-SXM"], 4)
    cluster = cluster_of(kind, kind)
    old = plan(cluster, model)
    small = dataclasses.replace(cluster, nodes=(dataclasses.replace(cluster.nodes[0], count=2),))
    with pytest.raises(InfeasibleError, match="add 2 more devices"):
        replan(old, small, model)
    broken = dataclasses.replace(old, routes=())
    with pytest.raises(SpecError, match="the old plan: routes"):
        replan(broken, cluster, model)
