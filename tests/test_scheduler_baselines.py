"""Baselines: sound plans, never above what is possible, and as strong as those who published them say."""

from __future__ import annotations

import dataclasses
import sys
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, clusters, device_type, tiny_model

from hexgen.cluster import Cluster, Link, load_cluster
from hexgen.model import load_model
from hexgen.plan import EngineOptions
from hexgen.scheduler.baselines.helix import helix
from hexgen.scheduler.baselines.helix_milp import best_ranges, compute_bound
from hexgen.scheduler.baselines.homogeneous import homogeneous
from hexgen.scheduler.baselines.petals import petals_ranges
from hexgen.scheduler.baselines.placement import Machines, Range, machines_of, max_flow
from hexgen.scheduler.baselines.segments import segment_starts
from hexgen.scheduler.baselines.shortfall import losses
from hexgen.scheduler.baselines.swarm import swarm_ranges
from hexgen.scheduler.baselines.symmetric import symmetric
from hexgen.scheduler.compare import baselines
from hexgen.scheduler.tables import load_table
from hexgen.scheduler.task import Task, make_task
from hexgen.validate import check_plan

ROOT = Path(__file__).parent.parent
HELIX_TABLE = Path(__file__).parent / "data" / "helix_single24_70b.json"  # Helix's artifact (ASPLOS'25)
OPTIONS = EngineOptions(token_budget=64, max_sequences=8)
FAST, SLOW = device_type("cuda", 5, 0.3), device_type("cuda", 3, 0.1)


def task_of(cluster: Cluster, layers: int = 4, objective: str = "throughput") -> Task:
    return make_task(cluster, tiny_model(layers), WORKLOAD, objective, None, 0, "auto", OPTIONS)


def machines(cluster: Cluster, layers: int = 4) -> Machines:
    """Single devices where that differs from whole nodes."""
    return list(machines_of(task_of(cluster, layers), 1.0))[-1]


def holds(found: Machines, i: int, held: Range) -> bool:
    start, end = held
    return end - start <= found.most_layers(i, start == 0, end == found.layers)


# ---- all of them ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(
    cluster=clusters(most_devices=5),
    layers=st.integers(1, 5),
    objective=st.sampled_from(["throughput", "latency"]),
)
def test_every_plan_is_sound_and_below_the_bound(cluster: Cluster, layers: int, objective: str) -> None:
    task = task_of(cluster, layers, objective)
    for found in baselines(task, objective, seconds=0.2):
        if found.plan is None:
            assert found.reason
            continue
        assert not found.reason
        assert found.shortfall
        check_plan(found.plan, cluster, task.model)
        predicted = found.plan.predicted
        assert predicted is not None
        assert predicted.upper_bound_tokens_s is not None
        assert 0 < predicted.tokens_s <= predicted.upper_bound_tokens_s
        lost = losses(task, found.plan)
        assert all(loss.share >= 0 for loss in lost)
        assert sum(loss.share for loss in lost) <= 1 + 1e-9


def test_the_sentence_names_what_is_lost() -> None:
    model = load_model("llama-2-70b")
    cluster = load_cluster(ROOT / "cluster_specs" / "helix-single24.yaml")
    task = make_task(cluster, model, None, "throughput", None, 0, "auto", None)
    found = {one.name: one for one in baselines(task, "throughput", seconds=0.5)}
    subset = found["best homogeneous subset"]
    assert subset.plan is not None
    used = {device for stage in subset.plan.stages for device in stage.devices}
    assert len({cluster.device(device).type for device in used}) == 1
    assert f"uses {len(used)} of 24 devices" in subset.shortfall
    even = found["equal layers, one stage a device"]
    assert "A100-40G-SXM wait" in even.shortfall
    assert found["best single node"].reason


def test_a_budget_binds_baselines_too() -> None:
    prices = (4.0, 4.0, 1.0, 1.0)
    free = cluster_of((FAST, 2), (FAST, 2), (SLOW, 2), (SLOW, 2), prices=prices)
    bound = cluster_of((FAST, 2), (FAST, 2), (SLOW, 2), (SLOW, 2), prices=prices, budget=5.0)
    for cluster in (free, bound):
        prices_found = [
            one.plan.predicted.price_usd_h or 0.0
            for one in baselines(task_of(cluster), "throughput", seconds=0.2)
            if one.plan is not None and one.plan.predicted is not None
        ]
        assert prices_found
        assert (max(prices_found) <= 5.0) == (cluster is bound)


# ---- regular ones ---------------------------------------------------------------------------------------------


def test_symmetric_is_symmetric_and_may_leave_types_out() -> None:
    cluster = cluster_of((FAST, 4), (device_type("cuda", 1.4, 0.1), 3))
    found = symmetric(task_of(cluster), "throughput").plan
    assert found is not None
    assert len({stage.width for stage in found.stages}) == 1
    assert len({stage.layers[1] - stage.layers[0] for stage in found.stages}) == 1
    assert {device.split("/")[0] for stage in found.stages for device in stage.devices} == {"n0"}


def test_the_homogeneous_subset_is_the_best_type() -> None:
    both = cluster_of((FAST, 2), (SLOW, 2), (FAST, 2))
    values = []
    for cluster in (both, cluster_of((FAST, 2), (FAST, 2)), cluster_of((SLOW, 2))):
        found = homogeneous(task_of(cluster), "throughput", 5.0).plan
        assert found is not None
        assert found.predicted is not None
        values.append(found.predicted.tokens_s)
    assert values[0] == pytest.approx(max(values[1:]), rel=1e-5)


# ---- machines that share routes -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(cluster=clusters(most_devices=6), layers=st.integers(1, 6), seed=st.integers(0, 99))
def test_petals_and_swarm_hold_only_what_fits(cluster: Cluster, layers: int, seed: int) -> None:
    for found in machines_of(task_of(cluster, layers), 1.0):
        swarm = swarm_ranges(found)
        for ranges in (petals_ranges(found, seed), *([swarm] if swarm else []), *segment_starts(found)):
            assert len(ranges) == len(found.groups)
            assert all(holds(found, i, held) for i, held in enumerate(ranges) if held != (0, 0))
            assert max_flow(found, ranges).tokens_s <= compute_bound(found) * (1 + 1e-6)


def halves(count: int) -> Machines:
    """Equal machines that each hold half of eight layers, at any place."""
    cluster = cluster_of(*[(device_type("cuda", 1.8, 0.1), 1)] * count, link=Link(1e12, 1e-6))
    model = dataclasses.replace(tiny_model(8), vocab_size=64)  # embedding and head of no weight
    task = make_task(cluster, model, WORKLOAD, "throughput", None, 0, "auto", OPTIONS)
    found = next(iter(machines_of(task, 1.0)))
    assert {found.most_layers(0, embeds, samples) for embeds in (False, True) for samples in (False, True)} == {4}
    return found


@pytest.mark.parametrize("seed", range(5))
def test_petals_fills_both_halves_alike(seed: int) -> None:
    ranges = petals_ranges(halves(6), seed)
    served = [sum(start <= layer < end for start, end in ranges) for layer in range(8)]
    assert served == [3] * 8


def test_swarm_by_closed_form() -> None:
    """Seven machines on two stages: one has four of them; the slower of the two stages bounds the flow."""
    found = halves(7)
    ranges = swarm_ranges(found)
    assert ranges is not None
    members = [ranges.count((0, 4)), ranges.count((4, 8))]
    assert sorted(members) == [3, 4]
    rates = [found.tokens_s(0, 4, embeds=True), found.tokens_s(0, 4, samples=True)]
    expected = min(count * rate for count, rate in zip(members, rates, strict=True))
    assert max_flow(found, ranges).tokens_s == pytest.approx(expected, rel=1e-3)


def test_published_max_flows_on_helix_24() -> None:
    """Helix's artifact, single cluster, LLaMA 70B: Petals 952.1, Swarm 757.9, Helix 1,289.6 tokens/s."""
    model, table = load_model("llama-2-70b"), load_table(HELIX_TABLE)
    cluster = load_cluster(ROOT / "cluster_specs" / "helix-single24.yaml")
    task = make_task(cluster, model, None, "throughput", None, 0, "auto", None, table)
    found = next(iter(machines_of(task, 0.5)))
    assert max_flow(found, petals_ranges(found, 0)).tokens_s == pytest.approx(952.1, abs=0.1)
    swarm = swarm_ranges(found)
    assert swarm is not None
    assert max_flow(found, swarm).tokens_s == pytest.approx(757.9, abs=0.1)
    start = max(segment_starts(found), key=lambda ranges: max_flow(found, ranges).tokens_s)
    placed = best_ranges(found, start, 1.0)
    assert 1289.6 <= placed.tokens_s <= placed.bound_tokens_s * (1 + 1e-9)
    assert placed.bound_tokens_s <= 2046
    served = helix(task, "throughput", seconds=1.0).plan
    assert served is not None
    check_plan(served, cluster, model)


# ---- Helix's program ------------------------------------------------------------------------------------------


def brute_force(found: Machines) -> float:
    """The largest flow over every interval of every machine."""
    choices = [
        [(0, 0)]
        + [
            (start, end)
            for start in range(found.layers)
            for end in range(start + 1, found.layers + 1)
            if holds(found, i, (start, end))
        ]
        for i in range(len(found.groups))
    ]
    return max(max_flow(found, ranges).tokens_s for ranges in product(*choices))


@settings(deadline=None, max_examples=12)
@given(cluster=clusters(most_devices=3), layers=st.integers(2, 4), fill=st.sampled_from([0.5, 1.0]))
def test_the_program_equals_brute_force(cluster: Cluster, layers: int, fill: float) -> None:
    for found in machines_of(task_of(cluster, layers), fill):
        best = brute_force(found)
        placed = best_ranges(found, petals_ranges(found, 0), None)
        assert placed.proven
        assert placed.tokens_s == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert placed.bound_tokens_s >= best * (1 - 1e-4)


def test_the_program_reaches_one_optimum_from_any_start() -> None:
    found = machines(cluster_of((FAST, 1), (SLOW, 1), (FAST, 1), (SLOW, 1), (SLOW, 1)), layers=5)
    starts = [petals_ranges(found, 0), [(0, 0)] * 5]
    placed = [best_ranges(found, start, None) for start in starts]
    assert all(one.proven for one in placed)
    assert placed[0].tokens_s == pytest.approx(placed[1].tokens_s, rel=1e-4)
    assert placed[0].tokens_s >= max_flow(found, starts[0]).tokens_s


def test_without_a_solver_the_start_is_shown_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pulp", None)
    cluster = cluster_of((FAST, 1), (SLOW, 1), (SLOW, 1), (FAST, 1))
    poor: list[Range] = [(0, 5), (0, 0), (0, 0), (0, 0)]
    placed = best_ranges(machines(cluster, 5), poor, 5.0)
    assert placed.ranges == tuple(poor)
    assert not placed.proven
    assert "not installed" in placed.failed
    assert helix(task_of(cluster, 5), "throughput", 5.0).plan is not None
