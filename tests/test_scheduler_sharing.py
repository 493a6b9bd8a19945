"""Stages that several routes share: time and KV room are divided, nothing is counted twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, device_type, tiny_model

from hexgen.cluster import Cluster, Link
from hexgen.memory import plan_memory
from hexgen.plan import EngineOptions, Hop, Plan, Prediction, Route, Stage
from hexgen.scheduler import evaluate
from hexgen.scheduler.cost import CostModel, GroupShape
from hexgen.scheduler.residency import tabled_kv_tokens
from hexgen.scheduler.tables import CostTable, load_table

OPTIONS = EngineOptions(dtype="float16", token_budget=64, max_sequences=32)
MODEL = tiny_model(6)
KIND = device_type("cuda", 30, 1.0, "card")
CLUSTER = cluster_of(*[(KIND, 1)] * 4, link=Link(1e12, 0.0))


def table_of(folder: Path, rate: float, kv_token_layers: int) -> CostTable:
    """A device does ``rate`` layers a second, however many it holds; weights are read in no time."""
    by_layers = {str(n): rate / n for n in range(1, 7)}
    kv = {str(n): kv_token_layers for n in range(1, 7)}
    values = {
        "model": "tiny",
        "layers": 6,
        "activation_bytes_per_token": 1,
        "layer_bytes": 1e-3,
        "types": {"card": {"tokens_per_s_by_layers": by_layers, "kv_token_layers_by_layers": kv}},
    }
    path = folder / "table.json"
    path.write_text(json.dumps(values))
    return load_table(path)


def stage(number: int, start: int, end: int) -> Stage:
    return Stage(f"s{number}", (start, end), (f"n{number}/0",))


def draft(stages: list[Stage], routes: list[tuple[float, list[tuple[int, int, int]]]]) -> Plan:
    """Routes as (weight, [(stage, start, end)])."""
    made = tuple(Route(tuple(Hop(f"s{i}", (a, b)) for i, a, b in path), weight) for weight, path in routes)
    return Plan("tiny", CLUSTER, tuple(stages), made, OPTIONS)


def told(plan: Plan, table: CostTable | None = None, cluster: Cluster = CLUSTER) -> Prediction:
    return evaluate(plan, cluster, MODEL, WORKLOAD, cost_table=table)


@settings(deadline=None, max_examples=20)
@given(weights=st.lists(st.floats(0.5, 2), min_size=2, max_size=4), room=st.integers(4000, 20000))
def test_one_path_as_several_routes_serves_what_it_serves_as_one(
    weights: list[float], room: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Time that goes linearly with tokens is only divided, as long as compute binds and not KV."""
    table = table_of(tmp_path_factory.mktemp("t"), 1000.0, room * 6)
    stages = [stage(0, 0, 3), stage(1, 3, 6)]
    path = [(0, 0, 3), (1, 3, 6)]
    one = told(draft(stages, [(1.0, path)]), table)
    several = told(draft(stages, [(w, path) for w in weights]), table)
    assert several.tokens_s == pytest.approx(one.tokens_s, rel=1e-3)
    for s in several.stages:
        assert s.utilisation == pytest.approx(1.0, rel=1e-3)
    # 40 prompt and 23 decoded tokens of each request on 3 layers at 1000 layers/s.
    assert one.requests_s == pytest.approx(1000 / 3 / 63, rel=1e-3)


def test_a_shared_stage_bounds_the_sum_of_its_routes(tmp_path: Path) -> None:
    """Two first halves feed one second half: half of what two whole routes serve."""
    table = table_of(tmp_path, 1000.0, 60000)
    both = [stage(0, 0, 3), stage(1, 0, 3), stage(2, 3, 6)]
    shared = told(draft(both, [(1, [(0, 0, 3), (2, 3, 6)]), (1, [(1, 0, 3), (2, 3, 6)])]), table)
    apart = [*both, stage(3, 3, 6)]
    alone = told(draft(apart, [(1, [(0, 0, 3), (2, 3, 6)]), (1, [(1, 0, 3), (3, 3, 6)])]), table)
    assert shared.tokens_s == pytest.approx(alone.tokens_s / 2, rel=1e-3)
    assert [round(s.utilisation, 3) for s in shared.stages] == [0.5, 0.5, 1.0]
    assert all(round(s.utilisation, 3) == 1.0 for s in alone.stages)
    # With as much KV and half the pace, whoever waits for the shared stage waits twice as long.
    assert shared.tpot_s > 1.5 * alone.tpot_s


def test_utilisation_is_prompts_and_decodes() -> None:
    plan = draft([stage(0, 0, 2), stage(1, 2, 6)], [(1.0, [(0, 0, 2), (1, 2, 6)])])
    for s in told(plan).stages:
        assert s.prefill_utilisation is not None
        assert s.decode_utilisation is not None
        assert min(s.prefill_utilisation, s.decode_utilisation) > 0
        assert s.prefill_utilisation + s.decode_utilisation == pytest.approx(s.utilisation)


def test_the_bottleneck_s_latency_obeys_little_s_law() -> None:
    """Requests in the system are their rate times their time in it, also where routes slow each other down."""
    both = [stage(0, 0, 3), stage(1, 0, 3), stage(2, 3, 6)]
    routes = [(3.0, [(0, 0, 3), (2, 3, 6)]), (1.0, [(1, 0, 3), (2, 3, 6)])]
    found = told(draft(both, routes))
    held = 2 * OPTIONS.max_sequences
    assert found.requests_s * found.latency_s <= held * 1.2
    assert found.tokens_s < sum(told(draft(both, [route])).tokens_s for route in routes)


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.floats(0.2, 5), min_size=3, max_size=3),
    cut=st.integers(1, 5),
    partial=st.booleans(),
)
def test_tabled_kv_room_is_divided_as_the_engine_divides_it(weights: list[float], cut: int, partial: bool) -> None:
    """The same rooms given as a table: each route gets what `hexgen.memory` gives it, or nearly."""
    first = 2 if partial and cut > 2 else cut
    stages = [stage(0, 0, cut), stage(1, 0, first), stage(2, min(first, cut), 6)]
    routes = [
        (weights[0], [(0, 0, cut), (2, cut, 6)]),
        (weights[1], [(1, 0, first), (2, first, 6)]),
        (weights[2], [(0, 0, cut), (2, cut, 6)]),
    ]
    cpu = device_type("cpu", 30, 1.0)  # without the room that a GPU keeps for gathered keys and values
    cluster = cluster_of(*[(cpu, 1)] * 4)
    plan = dataclasses.replace(draft(stages, routes), engine=dataclasses.replace(OPTIONS, dtype="float32"))
    cost = CostModel(MODEL, "float32", plan.engine)
    profiles = {s.name: cost.profile(GroupShape((cpu,), Link(1e9, 0.0))) for s in stages}
    ours = tabled_kv_tokens(plan, profiles, MODEL)
    theirs = plan_memory(plan, cluster, MODEL).kv_tokens
    page = OPTIONS.page_size
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a - b) <= 4 * page, "whole pages are dealt out one by one there, and rounded down here"
    total = sum(a * (6 - cut if i != 1 else 6 - first) for i, a in enumerate(ours))
    held = 6 - min(first, cut)
    assert total <= profiles["s2"].kv_tokens(held, False, True) * held + 1e-6
