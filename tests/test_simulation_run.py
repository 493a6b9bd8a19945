"""The simulator against closed forms, against itself without short cuts, and against what must always hold."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import cluster_of, clusters, device_type
from simulated_plans import MODEL, OPTIONS, WORKLOADS, planned

from hexgen.cluster import Cluster, Link
from hexgen.errors import SpecError
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.scheduler import evaluate
from hexgen.scheduler.simulation import Requests, SimulationResult, requests_of, run, served, simulate
from hexgen.scheduler.simulation.layout import Layout, layout_of
from hexgen.workload import Lengths, Slo, Workload


def row(plan_stages: int, devices: list[str], options: EngineOptions = OPTIONS) -> Plan:
    """One pipeline of equal stages, a device each."""
    each = MODEL.layers // plan_stages
    stages = tuple(Stage(f"s{i}", (i * each, (i + 1) * each), (devices[i],)) for i in range(plan_stages))
    return Plan("tiny", "", stages, (Route(tuple(Hop(s.name, s.layers) for s in stages)),), options)


def gpus(count: int, link: Link | None = None) -> Cluster:
    card = device_type("cuda", 50.0, 1.0)
    return cluster_of(*[(card, 1)] * count, link=link or Link(1e9, 1e-4))


def fixed(prompt: int, output: int, count: int, gap_s: float = 0.0) -> Requests:
    return Requests(
        np.arange(count) * gap_s, np.full(count, prompt, dtype=np.int64), np.full(count, output, dtype=np.int64)
    )


# ---- closed forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("link", [Link(1e9, 1e-4), Link(1e6, 2e-2)])
def test_one_request_alone_is_the_closed_form(stages: int, link: Link) -> None:
    cluster = gpus(4, link)
    made = row(stages, [f"n{i}/0" for i in range(4)])
    workload = Workload(Lengths(120), Lengths(64))  # one chunk: longer prompts are dealt over the stages
    result = simulate(made, cluster, MODEL, fixed(120, 64, 1))
    predicted = evaluate(made, cluster, MODEL, workload)
    assert result.output_tokens[0] / result.latency_s[0] == pytest.approx(predicted.single_tokens_s, rel=0.002)


@pytest.mark.parametrize(("sequences", "tolerance"), [(1, 0.001), (4, 0.03), (8, 0.1)])
def test_saturated_route_of_one_stage_is_the_closed_form(sequences: int, tolerance: float) -> None:
    """Exact for one sequence at a time. With more, prompts meet in steps otherwise than it assumes."""
    cluster = gpus(1)
    made = row(1, ["n0/0"], EngineOptions(token_budget=128, max_sequences=sequences))
    workload = Workload(Lengths(60), Lengths(50))
    result = served(made, cluster, MODEL, workload, lives=80)
    predicted = evaluate(made, cluster, MODEL, workload)
    assert result.tokens_s == pytest.approx(predicted.tokens_s, rel=tolerance)
    assert result.stage_busy["s0"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_at_a_time_waits_as_in_an_m_d_1_queue(load: float) -> None:
    """Pollaczek-Khinchine: Poisson arrivals, one server, equal service s: they wait load * s / (2 (1 - load))."""
    cluster = gpus(1)
    made = row(1, ["n0/0"], EngineOptions(token_budget=128, max_sequences=1))
    service_s = float(simulate(made, cluster, MODEL, fixed(100, 1, 1)).latency_s[0])
    workload = Workload(Lengths(100), Lengths(1), rate=load / service_s)
    result = simulate(made, cluster, MODEL, requests_of(workload, 15_000, seed=3))
    waited_s = result.mean("ttft") - service_s
    assert waited_s == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.1)
    assert result.stage_busy["s0"] == pytest.approx(load, rel=0.03)


def test_a_slow_link_is_the_bottleneck() -> None:
    """Hidden states of 128 x 4 bytes a token over 100 kB/s: what the link carries is what is served."""
    cluster = gpus(2, Link(1e5, 1e-3))
    made = row(2, ["n0/0", "n1/0"])
    result = simulate(made, cluster, MODEL, fixed(64, 32, 200))
    layout = layout_of(made, cluster, MODEL)
    carried = 200 * (64 + 31)  # the last token is never fed back
    assert result.link_busy[0] == pytest.approx(1.0, abs=0.02)
    assert result.ended_s == pytest.approx(carried * layout.routes[0].edges[0].token_s, rel=0.02)


# ---- without short cuts ----------------------------------------------------------------------------------------


def same(one: SimulationResult, other: SimulationResult) -> bool:
    pairs = ((one.ttft_s, other.ttft_s), (one.latency_s, other.latency_s), (one.kv_used, other.kv_used))
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs) and one.steps == other.steps


@settings(max_examples=40, deadline=None)
@given(clusters(), WORKLOADS, st.integers(0, 5))
def test_random_plans_serve_everything(cluster: Cluster, workload: Workload, seed: int) -> None:
    made = planned(cluster)
    if made is None:
        return
    requests = requests_of(workload, 60, seed)
    result = simulate(made, cluster, MODEL, requests, compiled=False)
    assert same(result, simulate(made, cluster, MODEL, requests, exact_steps=True))
    assert result.finished + result.rejected == len(requests)
    done = ~np.isnan(result.latency_s)
    asked = requests.output_tokens[done]
    assert np.all(result.output_tokens[done] <= asked)
    short = result.output_tokens[done] < asked  # only where the context ended
    contexts = [path.limits.context for path in layout_of(made, cluster, MODEL).routes]
    ends = requests.prompt_tokens[done] + result.output_tokens[done]
    assert all(end == contexts[r] for end, r in zip(ends[short], result.route[done][short], strict=True))
    assert np.all(result.ttft_s[done] <= result.latency_s[done] + 1e-12)
    assert result.itl_counts.sum() == (result.output_tokens[done] - 1).sum()
    assert all(0 <= busy <= 1 for busy in result.stage_busy.values())
    assert np.all((result.kv_used >= 0) & (result.kv_used <= 1))


@settings(max_examples=25, deadline=None)
@given(clusters(), WORKLOADS)
def test_the_whole_way_at_once_is_the_way_hop_by_hop(cluster: Cluster, workload: Workload) -> None:
    made = planned(cluster)
    if made is None:
        return
    requests = requests_of(workload, 40)
    expected = simulate(made, cluster, MODEL, requests, compiled=False)

    def in_hops(*arguments: object) -> Layout:
        layout = layout_of(*arguments)  # type: ignore[arg-type]
        routes = (dataclasses.replace(path, waits=(True,) * len(path.stages)) for path in layout.routes)
        return dataclasses.replace(layout, routes=tuple(routes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "layout_of", in_hops)
        found = simulate(made, cluster, MODEL, requests, compiled=False)
    assert np.allclose(found.latency_s, expected.latency_s, rtol=1e-9, equal_nan=True)


def test_a_shared_stage_serves_one_step_at_a_time() -> None:
    """Two routes with a stage of their own each, then one that both use: it can be no busier than always, and two
    routes through it serve no more than it alone can.
    """
    cluster = gpus(3)
    stages = (Stage("a", (0, 1), ("n0/0",)), Stage("b", (0, 1), ("n1/0",)), Stage("both", (1, 4), ("n2/0",)))
    last = Hop("both", (1, 4))
    routes = (Route((Hop("a", (0, 1)), last), 1.0), Route((Hop("b", (0, 1)), last), 1.0))
    made = Plan("tiny", "", stages, routes, OPTIONS)
    result = simulate(made, cluster, MODEL, fixed(60, 50, 300))
    assert result.finished == 300
    assert 0.95 < result.stage_busy["both"] <= 1.0
    assert result.stage_busy["a"] == pytest.approx(result.stage_busy["b"], rel=0.1)
    assert abs(int((result.route == 0).sum()) - 150) < 30


# ---- the rest --------------------------------------------------------------------------------------------------


def test_a_closed_loop_keeps_so_many_running() -> None:
    cluster = gpus(2)
    made = row(2, ["n0/0", "n1/0"])
    result = simulate(made, cluster, MODEL, fixed(40, 30, 100), concurrency=3)
    assert result.finished == 100
    assert result.running.max() == 3
    starts, ends = np.sort(result.arrival_s), np.sort(result.arrival_s + result.latency_s)
    assert np.allclose(starts[3:], ends[:-3])  # each but the first three comes when one leaves


def test_limits_and_the_door() -> None:
    cluster = gpus(1)
    made = row(1, ["n0/0"])
    requests = fixed(40, 30, 200)
    open_door = simulate(made, cluster, MODEL, requests, slo=Slo(ttft_s=1e-9))
    assert open_door.attainment() == 0.0
    assert open_door.attainment(Slo(latency_s=1e9)) == 1.0
    median = float(np.median(open_door.latency_s))
    assert open_door.latency_attainment(median) == pytest.approx(0.5, abs=0.05)
    closed = simulate(made, cluster, MODEL, requests, most_waiting=5)
    assert closed.rejected > 100
    assert closed.finished + closed.rejected == 200
    assert closed.attainment(Slo(latency_s=1e9)) == pytest.approx(closed.finished / 200)


def test_the_window_of_a_run_counts_what_happens_in_it() -> None:
    cluster = gpus(1)
    made = row(1, ["n0/0"])
    whole = simulate(made, cluster, MODEL, fixed(40, 30, 400))
    half = simulate(
        made, cluster, MODEL, fixed(40, 30, 400), warmup_s=whole.ended_s / 4, until_s=whole.ended_s / 2
    )
    assert half.unfinished > 100
    assert half.tokens_s == pytest.approx(whole.tokens_s, rel=0.05)
    assert (half.started_s, half.ended_s) == (whole.ended_s / 4, whole.ended_s / 2)


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"warmup_s": math.nan}, "warmup_s"),
        ({"warmup_s": 5.0, "until_s": 5.0}, "until_s"),
        ({"concurrency": 0}, "concurrency"),
        ({"most_waiting": 0}, "most_waiting"),
    ],
)
def test_impossible_figures_are_refused(changed: dict[str, float], place: str) -> None:
    with pytest.raises(SpecError, match=place):
        simulate(row(1, ["n0/0"]), gpus(1), MODEL, fixed(4, 4, 1), **changed)  # type: ignore[arg-type]
