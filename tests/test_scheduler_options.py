"""Chosen token budgets and numbers of sequences; what the closed form makes of both, against the simulator."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.batching.policy import PREFILL_ROUNDS
from hexgen.cluster import load_cluster
from hexgen.model import load_model
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.scheduler import evaluate, plan
from hexgen.scheduler.options import BUDGETS, LEAST_SEQUENCES, MOST_SEQUENCES
from hexgen.scheduler.simulation import requests_of, served, simulate
from hexgen.scheduler.traffic import Mix, best_mix, mix_of, traffic_of
from hexgen.workload import Lengths, Slo, Workload

SPECS = Path(__file__).parents[1] / "cluster_specs"
MODEL = load_model("llama-2-70b")
CONVERSATIONS = Workload(Lengths(763.1, max=2047), Lengths(232.4, max=1000))
CHAT = Workload(Lengths(763.0, p99=2000.0), Lengths(232.0, p99=800.0))


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 4000),
    output=st.integers(1, 2000),
    depth=st.integers(1, 24),
    budget=st.integers(1, 4096),
    fixed=st.floats(0, 100),
    weights=st.floats(0, 300),
    few=st.integers(1, 600),
    more=st.integers(1, 600),
)
def test_more_sequences_never_serve_less(
    prompt: int, output: int, depth: int, budget: int, fixed: float, weights: float, few: int, more: int
) -> None:
    """What column generation's bounds rest on: a step under a roofline, its pace against what it carries."""
    traffic = traffic_of(MODEL, Workload(Lengths(prompt), Lengths(output)), EngineOptions(token_budget=budget))

    def checked(sequences: int) -> Mix:
        mix = mix_of(traffic, float(sequences), depth)
        assert 0 <= mix.mixed_share <= mix.held_share + 1e-12 <= 1 + 2e-12
        assert mix.mixed.tokens <= budget * (1 + 1e-9)
        assert mix.mean_tokens == pytest.approx(
            mix.running / mix.steps_in_flight * (traffic.prompt + traffic.decodes) / mix.cycles
        )
        return mix

    def served_s(mix: Mix, times: Mix) -> float:
        seconds = times.mean_s(lambda load: fixed + max(weights, load.tokens) + load.kv_read / 1000)
        return mix.running / (mix.cycles * mix.steps_in_flight * seconds)

    few, more = sorted((few, more))
    low, high = checked(few), checked(more)
    assert served_s(high, best_mix(traffic, few, more, depth)) >= served_s(low, low) * (1 - 1e-9)
    if few >= depth:
        assert best_mix(traffic, few, more, depth) is high


def test_one_stage_holds_up_nobody_and_pipelines_deal_prompts_out() -> None:
    traffic = traffic_of(MODEL, CHAT, EngineOptions(token_budget=1024))
    alone = mix_of(traffic, 16.0, 1)
    assert alone.held_share == alone.mixed_share
    assert alone.mixed.prefill_tokens == 763
    deep = mix_of(traffic, 16.0, 8)
    assert deep.mixed.prefill_tokens == 128  # the policy's floor: its part of the rounds would be less
    assert deep.held_share == pytest.approx(deep.mixed_share * 8 / (1 + deep.mixed_share * 7))
    long = traffic_of(MODEL, Workload(Lengths(6000), Lengths(232)), EngineOptions(token_budget=1024))
    assert mix_of(long, 16.0, 2).mixed.prefill_tokens == pytest.approx(6000 / 2 / PREFILL_ROUNDS)


@pytest.mark.parametrize("name", ["helix-t4x12", pytest.param("helix-single24", marks=pytest.mark.slow)])
def test_chosen_options_serve_more_than_the_defaults_in_simulation(name: str) -> None:
    """And the prediction is near what is simulated."""
    cluster = load_cluster(SPECS / f"{name}.yaml")
    workload = dataclasses.replace(cluster.workload or CHAT, rate="max", slo=Slo())
    ours = plan(cluster, MODEL, workload, engine="heuristic")
    usual = plan(cluster, MODEL, workload, engine="heuristic", options=EngineOptions(max_sequences=256))
    assert ours.engine.token_budget in BUDGETS
    assert LEAST_SEQUENCES <= ours.engine.max_sequences <= MOST_SEQUENCES
    got, before = (served(p, cluster, MODEL, workload, lives=6).tokens_s for p in (ours, usual))
    assert got >= 0.99 * before
    if name == "helix-single24":
        assert got >= 1.05 * before
    assert got == pytest.approx(evaluate(ours, cluster, MODEL, workload).tokens_s, rel=0.1)


def test_options_that_were_given_are_kept() -> None:
    cluster = load_cluster(SPECS / "helix-t4x12.yaml")
    asked = EngineOptions(token_budget=300, max_sequences=33)
    assert plan(cluster, MODEL, CHAT, engine="heuristic", options=asked).engine == asked


def test_deep_pipelines_serve_and_answer_as_predicted() -> None:
    """Steps that vary in size hold each other up: dealt over a single round, prompts cost this route a seventh.

    First tokens come as predicted where hardly anyone queues: after the policy's chunks, not one large step.
    """
    cluster = load_cluster(SPECS / "hexgen-half30.yaml")
    pairs = [("iceland-1/0", "iceland-1/1"), ("iceland-1/2", "iceland-1/3"), ("iceland-1/4", "iceland-1/5")]
    devices = [*pairs, ("iceland-2/6",), ("iceland-2/7",), ("iceland-2/4", "iceland-2/5")]
    ends = [0, 16, 32, 48, 56, 64, 80]
    stages = [Stage(f"s{i}", (ends[i], ends[i + 1]), group) for i, group in enumerate(devices)]
    route = Route(tuple(Hop(stage.name, stage.layers) for stage in stages))
    options = EngineOptions(max_sequences=704, token_budget=256)
    made = Plan(MODEL.name, cluster, tuple(stages), (route,), options)
    got = served(made, cluster, MODEL, CONVERSATIONS, lives=5).tokens_s
    told = evaluate(made, cluster, MODEL, CONVERSATIONS).tokens_s
    assert got == pytest.approx(told, rel=0.05)
    quiet = dataclasses.replace(CONVERSATIONS, rate=0.9)  # requests/s, of about 3
    run = simulate(made, cluster, MODEL, requests_of(quiet, 150, 0), warmup_s=20.0)
    assert evaluate(made, cluster, MODEL, quiet).ttft_s == pytest.approx(run.mean("ttft"), rel=0.2)
