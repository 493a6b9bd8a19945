"""The compiled loop against the engine's own batcher and the loop in Python: the same times, to the last bit."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import cluster_of, clusters, device_type
from simulated_plans import MODEL, OPTIONS, WORKLOADS, planned

from hexgen.cluster import Cluster, Link
from hexgen.errors import SpecError
from hexgen.plan import Hop, Plan, Route, Stage
from hexgen.scheduler.cost import StageProfile
from hexgen.scheduler.simulation import (
    SimulationResult,
    largest_rate,
    native,
    native_build,
    rates,
    requests_of,
    run,
    simulate,
)
from hexgen.scheduler.simulation.layout import Layout, layout_of
from hexgen.scheduler.simulation.translate import TranslationError, Translator
from hexgen.scheduler.traffic import StepLoad
from hexgen.workload import Lengths, Slo, Workload

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="there is no C++ compiler"
)


@pytest.fixture(autouse=True, scope="module")
def _compiled_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """From the sources as they are, and not into the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(native_build, "_found", {})
        yield


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The compiled runs that a test makes."""
    found: list[object] = []
    plain = native.native_run

    def noted(*arguments: object) -> object:
        made = plain(*arguments)  # type: ignore[arg-type]
        found.extend([made] if made is not None else [])
        return made

    monkeypatch.setattr(run, "native_run", noted)
    return found


def same(one: SimulationResult, other: SimulationResult) -> None:
    for name in ("arrival_s", "ttft_s", "latency_s", "output_tokens", "route", "sample_s", "kv_used", "running"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True), name
    for name in ("steps", "preemptions", "finished", "rejected", "tokens_s", "requests_s", "started_s", "ended_s"):
        assert getattr(one, name) == getattr(other, name), name
    assert np.array_equal(one.itl_counts, other.itl_counts)
    # Summed up in another order.
    assert one.itl_mean_s == pytest.approx(other.itl_mean_s, rel=1e-9)
    assert one.stage_busy == pytest.approx(other.stage_busy, rel=1e-9)
    assert one.link_busy == pytest.approx(other.link_busy, rel=1e-9)


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(clusters(), WORKLOADS, st.integers(0, 5))
def test_random_plans_are_served_as_by_the_engine(cluster: Cluster, workload: Workload, seed: int) -> None:
    made = planned(cluster)
    if made is None:
        return
    requests = requests_of(workload, 60, seed)
    found = simulate(made, cluster, MODEL, requests, compiled=True)
    same(found, simulate(made, cluster, MODEL, requests, exact_steps=True))


@needs_compiler
@settings(max_examples=50, deadline=None)
@given(
    clusters(),
    WORKLOADS,
    st.sampled_from([4, 9, 30]),
    st.sampled_from([1, 2, 16, 64]),
    st.integers(1, 12),
    st.sampled_from([{}, {"concurrency": 5}, {"most_waiting": 3}, {"warmup_s": 0.05, "until_s": 0.4}]),
)
def test_short_pools_small_budgets_and_other_ways_to_run(
    cluster: Cluster, workload: Workload, pages: int, budget: int, sequences: int, asked: dict[str, float]
) -> None:
    """Where pages are short older sequences take those of younger ones; requests that never fit are refused."""
    made = planned(cluster)
    if made is None:
        return
    requests = requests_of(workload, 40)

    def short(*arguments: object) -> Layout:
        layout = layout_of(*arguments)  # type: ignore[arg-type]
        small = {"pages": pages, "token_budget": budget, "max_sequences": sequences}
        routes = (
            dataclasses.replace(path, limits=dataclasses.replace(path.limits, **small)) for path in layout.routes
        )
        return dataclasses.replace(layout, routes=tuple(routes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "layout_of", short)
        expected = simulate(made, cluster, MODEL, requests, compiled=False, **asked)  # type: ignore[arg-type]
        found = simulate(made, cluster, MODEL, requests, compiled=True, **asked)  # type: ignore[arg-type]
    same(found, expected)


@needs_compiler
@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([None, 8, 30, 100]), min_size=4, max_size=4), st.sampled_from([20.0, "max"]))
def test_sliding_windows(windows: list[int | None], rate: float | str) -> None:
    """Layers that attend to few positions: means over layers are no whole numbers, and their sums are rounded."""
    made, cluster = shared_stage()
    model = dataclasses.replace(MODEL, sliding_windows=tuple(windows))
    requests = requests_of(Workload(Lengths(60, max=240), Lengths(20, max=80), rate=rate), 60)  # type: ignore[arg-type]
    found = simulate(made, cluster, model, requests, compiled=True)
    expected = simulate(made, cluster, model, requests, exact_steps=True)
    assert np.allclose(found.latency_s, expected.latency_s, rtol=1e-9)
    assert found.steps == expected.steps


def shared_stage() -> tuple[Plan, Cluster]:
    """Two routes that meet in a stage."""
    card = device_type("cuda", 50.0, 1.0)
    cluster = cluster_of(*[(card, 1)] * 3, link=Link(1e9, 1e-4))
    stages = (Stage("a", (0, 1), ("n0/0",)), Stage("b", (0, 1), ("n1/0",)), Stage("both", (1, 4), ("n2/0",)))
    last = Hop("both", (1, 4))
    routes = (Route((Hop("a", (0, 1)), last), 1.0), Route((Hop("b", (0, 1)), last), 1.0))
    return Plan("tiny", "", stages, routes, OPTIONS), cluster


@needs_compiler
def test_preempted_and_sampled_runs_agree(ran: list[object]) -> None:
    """Long enough that samples are thinned out, and sequences preempted."""
    made, cluster = shared_stage()
    workload = Workload(Lengths(60, max=240), Lengths(50, max=200), rate=60.0)

    def short(*arguments: object) -> Layout:
        layout = layout_of(*arguments)  # type: ignore[arg-type]
        routes = (
            dataclasses.replace(path, limits=dataclasses.replace(path.limits, pages=40)) for path in layout.routes
        )
        return dataclasses.replace(layout, routes=tuple(routes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "layout_of", short)
        requests = requests_of(workload, 1500)
        expected = simulate(made, cluster, MODEL, requests, compiled=False)
        found = simulate(made, cluster, MODEL, requests, compiled=True)
    assert len(ran) == 1
    assert found.preemptions > 50
    assert found.ended_s > 21  # 2048 samples of 10 ms
    same(found, expected)


@needs_compiler
@pytest.mark.parametrize("slo", [Slo(ttft_s=0.05), Slo(tpot_s=0.01), Slo(latency_s=0.4, ttft_s=0.2)])
def test_the_largest_rate_is_the_same(slo: Slo, monkeypatch: pytest.MonkeyPatch, ran: list[object]) -> None:
    """Trials that end when too many have missed their limits, in either loop."""
    made, cluster = shared_stage()
    requests = requests_of(Workload(Lengths(60, max=200), Lengths(40, max=120), rate=1.0), 200)
    found = []
    for compiled in (True, False):
        asked = (None, None, compiled)
        monkeypatch.setattr(
            rates, "native_run", lambda *arguments, asked=asked: run.native_run(*arguments, *asked)
        )
        found.append(largest_rate(made, cluster, MODEL, requests, slo, attainment=0.95))
    assert len(ran) > 5
    assert found[0] == found[1] > 1
    past = time.monotonic() - 1
    monkeypatch.setattr(rates, "native_run", lambda *arguments: run.native_run(*arguments, None, None, True))
    assert largest_rate(made, cluster, MODEL, requests, slo, deadline=past) == 0.0


class _Slower(StageProfile):
    """A profile that is not the roofline, as tables of figures have them."""

    __slots__ = ()

    def step_s(self, layers: int, load: StepLoad, embeds: bool, samples: bool) -> float:
        if load.prefill_tokens > 100:
            raise SpecError("the table ends at 100 tokens")
        return 1.5 * super().step_s(layers, load, embeds, samples)


@needs_compiler
def test_other_profiles_are_asked_in_python(monkeypatch: pytest.MonkeyPatch, ran: list[object]) -> None:
    made, cluster = shared_stage()
    requests = requests_of(Workload(Lengths(60, max=90), Lengths(20), rate=50.0), 200)
    plain = simulate(made, cluster, MODEL, requests, compiled=True)
    monkeypatch.setattr("hexgen.scheduler.cost.StageProfile", _Slower)
    found = simulate(made, cluster, MODEL, requests, compiled=True)
    same(found, simulate(made, cluster, MODEL, requests, compiled=False))
    assert len(ran) == 2
    assert np.median(found.latency_s) > 1.2 * np.median(plain.latency_s)
    with pytest.raises(SpecError, match="the table ends"):
        simulate(made, cluster, MODEL, requests_of(Workload(Lengths(120), Lengths(9)), 9), compiled=True)


def test_without_a_compiler_python_does_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ran: list[object]
) -> None:
    made, cluster = shared_stage()
    requests = requests_of(Workload(Lengths(20), Lengths(5), rate=50.0), 20)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setattr(native_build, "_found", {})
    found = simulate(made, cluster, MODEL, requests, compiled=True)
    assert ran == []
    same(found, simulate(made, cluster, MODEL, requests, compiled=False))


def test_policy_and_cost_model_say_only_what_is_translated() -> None:
    """Else the compiled loop would be gone, and nobody would hear of it."""
    text = native_build.sources().files["translated.inc"]
    for expected in ("_squeeze(", "_prefill_tokens(", "layer_s(", "all_reduce_s("):
        assert expected in text


def of_source(text: str, folder: Path) -> tuple[Translator, ModuleType]:
    path = folder / "told.py"
    path.write_text(f"LIMIT = 7\n{text}")
    module = ModuleType("told")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return Translator(module), module


@pytest.mark.parametrize(
    "body",
    [
        "return [x for x in (1, 2)][0]",
        "return (a or b)",
        "return a ** b",
        "return a if a < b < 3 else b",
        "return unknown + a",
        "try:\n        return a\n    finally:\n        pass",
        "for i in a:\n        pass\n    else:\n        return b",
        "a.known = b\n    return a",
    ],
)
def test_what_is_not_translated_is_refused(body: str, tmp_path: Path) -> None:
    translator, module = of_source(f"def told(a: int, b: int) -> int:\n    {body}\n", tmp_path)
    with pytest.raises(TranslationError):
        translator.function(module.told)


def test_numbers_keep_their_meaning(tmp_path: Path) -> None:
    body = "c = -a // b % LIMIT\n    d = 0.1\n    a, c = c, a\n    return int(c / b * d)"
    translator, module = of_source(f"def told(a: int, b: int) -> int:\n    {body}\n", tmp_path)
    text = translator.function(module.told)
    assert translator.constants == {"LIMIT": 7}
    for expected in (
        "i64 told(i64 a, i64 b)",
        "modulo(floordiv((-a), b), LIMIT)",
        "auto d = 0x1.999999999999ap-4",
        "auto a_1 = c;",
        "a = a_1;",
        "whole((truediv(c, b) * d))",
    ):
        assert expected in text
