"""Explanations: they agree with the evaluator, add up, and their what-ifs are what re-planning gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scheduler_clusters import BUS, WORKLOAD, cluster_of, clusters, device_type, tiny_model

from hexgen.cluster import Cluster, DeviceType, Link, NodeLink, RegionLink, load_cluster
from hexgen.errors import InfeasibleError
from hexgen.model import ModelSpec, load_model
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.explain import Explanation, explain
from hexgen.scheduler.explain.changes import Candidate, candidates
from hexgen.scheduler.explain.state import open_plan
from hexgen.scheduler.explain.words import left_out_words, what_if_words
from hexgen.scheduler.planner import plan
from hexgen.scheduler.task import Objective, Task, make_task
from hexgen.validate import check_plan

OPTIONS = EngineOptions(dtype="float32", max_sequences=8, token_budget=64)
SPECS = Path(__file__).parent.parent / "cluster_specs"
FAR = Link(2e5, 5e-2)


def explained(
    cluster: Cluster, model: ModelSpec, objective: Objective = "throughput", what_if_s: float | None = None
) -> tuple[Plan, Task, Explanation]:
    made = plan(cluster, model, WORKLOAD, objective, options=OPTIONS)
    task = make_task(cluster, model, WORKLOAD, objective, None, 0, "auto", made.engine)
    return made, task, explain(made, task, objective, what_if_s=what_if_s)


def by_hand(cluster: Cluster, model: ModelSpec, *stages: tuple[int, str]) -> Plan:
    """One pipeline of (layers, devices joined by spaces), with its prediction."""
    start, made = 0, []
    for i, (layers, devices) in enumerate(stages):
        made.append(Stage(f"s{i}", (start, start + layers), tuple(devices.split())))
        start += layers
    draft = Plan(model.name, cluster, tuple(made), (Route(tuple(Hop(s.name, s.layers) for s in made)),), OPTIONS)
    check_plan(draft, cluster, model)
    return dataclasses.replace(draft, predicted=evaluate(draft, cluster, model, WORKLOAD))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cluster=clusters(), objective=st.sampled_from(["throughput", "latency", "maxflow"]))
def test_explanations_agree_with_the_prediction_and_add_up(cluster: Cluster, objective: Objective) -> None:
    model = tiny_model()
    try:
        made, task, said = explained(cluster, model, objective)
    except InfeasibleError:
        assume(False)
    predicted = made.predicted
    assert predicted is not None
    opened = open_plan(made, task, objective)
    assert sum(opened.rates) * opened.traffic.output == pytest.approx(predicted.tokens_s)
    busy = {stage.stage: stage.utilisation for stage in predicted.stages}
    held = {device.device: device for device in predicted.devices}
    assert [use.device for use in said.devices] == [d for stage in made.stages for d in stage.devices]
    for use in said.devices:
        time, memory = use.time, use.memory
        parts = (time.compute, time.memory, time.link, time.software, time.group, time.idle)
        assert sum(parts) == pytest.approx(1)
        assert min(parts) >= -1e-6
        assert time.busy == pytest.approx(busy[use.stage])
        assert time.prefill + time.decode == pytest.approx(time.busy)
        sizes = (
            memory.weights_bytes, memory.kv_bytes, memory.buffers_bytes, memory.kept_bytes, memory.stranded_bytes,
        )  # fmt: skip
        assert min(sizes) >= 0
        assert sum(sizes) == memory.total_bytes
        assert memory.kv_bytes == held[use.device].kv_bytes
    for split in said.even:
        assert (split.value is None) == bool(split.reason)
    assert all(0 <= use.load <= 1 + 1e-6 for use in said.links) or objective == "maxflow"


# ---- time -----------------------------------------------------------------------------------------------------


def only(device: DeviceType, count: int = 1) -> Explanation:
    return explained(cluster_of((device, count)), tiny_model())[2]


def test_what_limits_a_device_is_what_it_has_little_of() -> None:
    # No software to speak of beside such slow devices.
    usual = device_type("cpu", 40, 1e-4)
    slow_cores = dataclasses.replace(usual, bandwidth_bytes_s=1e15)
    assert only(slow_cores).devices[0].time.limit == "compute"
    assert only(slow_cores).devices[0].time.compute > 0.95
    slow_memory = dataclasses.replace(device_type("cuda", 400, 1e-5), fp16_flops=1e18, fp32_flops=1e18)
    assert only(slow_memory).devices[0].time.limit == "memory bandwidth"
    assert only(slow_memory).devices[0].time.memory > 0.95


def test_the_faster_device_of_a_group_waits_for_the_slower_one() -> None:
    fast, slow = device_type("cuda", 60, 0.02, "fast"), device_type("cuda", 60, 0.01, "slow")
    cluster = cluster_of((fast, 1), (slow, 1), link=Link(1e12, 1e-7))
    model = tiny_model()
    made = by_hand(cluster, model, (4, "n0/0 n1/0"))
    task = make_task(cluster, model, WORKLOAD, "throughput", None, 0, "auto", OPTIONS)
    first, second = explain(made, task, what_if_s=None).devices
    assert first.time.group > 0.5
    assert first.time.limit == "slower ones in its group"
    assert second.time.group == pytest.approx(0, abs=1e-6)
    assert second.time.compute + second.time.memory == pytest.approx(first.time.group, rel=0.05)


def test_shares_of_time_are_derivatives_of_the_step() -> None:
    """Against the cost model with a device ten per cent slower in everything: a roofline is linear there."""
    device = device_type("cuda", 60, 0.01)
    cluster, model = cluster_of((device, 1)), tiny_model()
    made, task, said = explained(cluster, model)
    time = said.devices[0].time
    slower = dataclasses.replace(
        device, bandwidth_bytes_s=device.bandwidth_bytes_s / 1.1, fp32_flops=device.fp32_flops / 1.1,
        fp16_flops=device.fp16_flops / 1.1, bf16_flops=device.bf16_flops / 1.1,
    )  # fmt: skip
    opened = open_plan(made, task, "throughput")
    part, mix = opened.routes[0].parts[0], opened.routes[0].full.mix

    def step(device: DeviceType) -> float:
        profile = opened.cost.profile(GroupShape((device,), BUS))
        return mix.mean_s(lambda load: profile.step_s(part.layers, load, True, True))

    grown = (step(slower) / step(device) - 1) / 0.1
    assert grown == pytest.approx((time.compute + time.memory) / time.busy, rel=1e-3)


# ---- memory ---------------------------------------------------------------------------------------------------


def test_stranded_memory_names_the_device_that_is_full() -> None:
    small, large = device_type("cpu", 5, 0.1, "small"), device_type("cpu", 60, 0.1, "large")
    cluster, model = cluster_of((small, 1), (large, 1)), tiny_model()
    made = by_hand(cluster, model, (2, "n0/0"), (2, "n1/0"))
    task = make_task(cluster, model, WORKLOAD, "throughput", None, 0, "auto", OPTIONS)
    tight, roomy = explain(made, task, what_if_s=None).devices
    assert tight.memory.limited_by == roomy.memory.limited_by == "n0/0"
    assert roomy.memory.stranded_bytes > 40e6
    assert "n0/0" in roomy.memory.why
    assert "would fit" in roomy.memory.why
    assert tight.memory.why == "" or tight.memory.stranded_bytes > 0


# ---- even splits ----------------------------------------------------------------------------------------------


def test_an_even_split_is_priced_as_the_evaluator_would() -> None:
    fast, slow = device_type("cpu", 40, 0.3, "fast"), device_type("cpu", 40, 0.05, "slow")
    cluster, model = cluster_of((fast, 1), (slow, 1)), tiny_model(layers=8)
    made = by_hand(cluster, model, (7, "n0/0"), (1, "n1/0"))
    task = make_task(cluster, model, WORKLOAD, "throughput", None, 0, "auto", OPTIONS)
    (split,) = explain(made, task, what_if_s=None).even
    even = by_hand(cluster, model, (4, "n0/0"), (4, "n1/0"))
    assert even.predicted is not None
    assert made.predicted is not None
    assert split.name == "equal layers"
    assert split.value == pytest.approx(even.predicted.tokens_s)
    assert split.lost == pytest.approx(1 - even.predicted.tokens_s / made.predicted.tokens_s)


# ---- the refusal ----------------------------------------------------------------------------------------------


def test_a_device_that_only_slows_the_others_down_is_left_out_and_forcing_it_in_is_priced() -> None:
    good, poor = device_type("cpu", 4.5, 0.3, "good"), device_type("cpu", 3, 0.003, "poor")
    cluster, model = cluster_of((good, 2), (poor, 1), link=Link(1e8, 2e-3)), tiny_model()
    made, _, said = explained(cluster, model)
    assert made.predicted is not None
    (entry,) = said.left_out
    assert entry.devices == ("n1/0",)
    assert entry.forced_gain is not None
    assert entry.forced_gain < -0.1
    own = [" ".join(stage.devices) for stage in made.stages]
    assert entry.forced_value == pytest.approx(max(with_all_of(cluster, model, [*own, "n1/0"])), rel=1e-6)
    for groups in (["n0/0 n0/1", "n1/0"], ["n0/0", "n0/1", "n1/0"]):  # however they are grouped
        assert max(with_all_of(cluster, model, groups)) < made.predicted.tokens_s
    assert "forced in: -" in left_out_words(entry, said)


def with_all_of(cluster: Cluster, model: ModelSpec, groups: list[str]) -> list[float]:
    """Tokens/s of every pipeline through all of these groups: every order, every division."""
    found: list[float] = []
    for order in permutations(groups):
        for layers in compositions(model.layers, len(order)):
            try:
                predicted = by_hand(cluster, model, *zip(layers, order, strict=True)).predicted
            except InfeasibleError:
                continue
            found.append(predicted.tokens_s if predicted else 0.0)
    return found


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(total,)]
    return [(n, *rest) for n in range(1, total) for rest in compositions(total - n, parts - 1)]


# ---- what-ifs -------------------------------------------------------------------------------------------------


def test_what_ifs_are_what_exact_planning_of_the_changed_cluster_gives() -> None:
    a, b = device_type("cpu", 3.5, 0.2, "a"), device_type("cpu", 3, 0.1, "b")
    cluster, model = cluster_of((a, 1), (b, 2), link=Link(5e6, 1e-3), prices=(2.0, 1.0)), tiny_model()
    made, _task, said = explained(cluster, model, what_if_s=60.0)
    found = said.what_if
    assert found is not None
    assert made.predicted is not None
    assert found.untried == ()
    assert found.missed == 0
    assert found.value == pytest.approx(made.predicted.tokens_s)
    changed = {c.text: c for c in flat(candidates(cluster, said.devices, said.links, said.bottleneck))}
    assert {c.kind for c in found.changes} >= {"add node", "drop node", "link"}
    for change in found.changes:
        other = changed[change.text].cluster
        try:
            exact = plan(other, model, WORKLOAD, engine="exact", options=OPTIONS).predicted
        except InfeasibleError:
            assert change.value is None
            continue
        assert exact is not None
        assert change.value is not None
        assert change.gain is not None
        assert change.value == pytest.approx(exact.tokens_s, rel=0.02), change.text
        assert change.gain == pytest.approx(change.value / found.value - 1)
    gains = [change.gain if change.gain is not None else -1.0 for change in found.changes]
    assert gains == sorted(gains, reverse=True)
    added = {change.price_usd_h for change in found.changes if change.kind == "add node"}
    assert added == {2.0, 1.0}


def test_equal_nodes_are_tried_once() -> None:
    device, other = device_type("cpu", 3, 0.1, "one"), device_type("cpu", 3, 0.2, "two")
    cluster, model = cluster_of(*[(device, 1)] * 4, (other, 2)), tiny_model()
    _, _, said = explained(cluster, model)
    found = candidates(cluster, said.devices, said.links, said.bottleneck)
    assert len([c for c in found if c.kind == "add node"]) <= 2
    assert len([c for c in found if c.kind == "drop node"]) <= 2
    assert len([c for c in found if c.kind == "drop device"]) <= 1
    names = [c.nodes[0] for c in found if c.kind == "add node"]
    assert not set(names) & {node.name for node in cluster.nodes}


def test_a_budget_is_named_as_what_keeps_devices_out_and_using_them_is_a_change() -> None:
    a, b = device_type("cpu", 9, 0.2, "a"), device_type("cpu", 9, 0.1, "b")
    cluster, model = cluster_of((a, 1), (b, 1), prices=(2.0, 1.5), budget=3.0), tiny_model()
    made, _, said = explained(cluster, model, what_if_s=30.0)
    assert made.predicted is not None
    assert made.predicted.price_usd_h == 2.0
    (entry,) = said.left_out
    assert entry.nodes == ("n1",)
    assert entry.price_usd_h == 1.5
    assert "over the budget of 3.00" in left_out_words(entry, said)
    assert said.what_if is not None
    (used,) = [change for change in said.what_if.changes if change.text.startswith("also use n1")]
    both = plan(dataclasses.replace(cluster, budget_usd_h=None), model, WORKLOAD, engine="exact", options=OPTIONS)
    assert both.predicted is not None
    assert used.value == pytest.approx(both.predicted.tokens_s, rel=0.02)
    assert used.price_usd_h == 1.5


def flat(found: list[Candidate]) -> Iterator[Candidate]:
    for candidate in found:
        yield candidate
        if candidate.then is not None:
            yield candidate.then


def test_faster_links_change_that_link_and_no_other() -> None:
    device = device_type("cpu", 40, 0.1)
    cluster = cluster_of(
        *[(device, 1)] * 5,
        regions=("east", "east", "west", "west", "north"),
        region_links=(RegionLink(("east", "west"), FAR), RegionLink(("east", "east"), Link(1e9, 1e-4))),
    )
    cluster = dataclasses.replace(cluster, node_links=(NodeLink(("n2", "n3"), Link(5e8, 1e-4)),))
    model = tiny_model(layers=5)
    made = by_hand(cluster, model, *[(1, f"n{i}/0") for i in range(5)])
    task = make_task(cluster, model, WORKLOAD, "throughput", None, 0, "auto", OPTIONS)
    said = explain(made, task, what_if_s=None)
    links = [c for c in candidates(cluster, said.devices, said.links, said.bottleneck) if c.kind == "link"]
    kinds = set()
    for candidate in links:
        a, b = candidate.nodes
        assert candidate.cluster.link(a, b).bandwidth_bytes_s == 10 * cluster.link(a, b).bandwidth_bytes_s
        changed = {
            (x.name, y.name)
            for i, x in enumerate(cluster.nodes)
            for y in cluster.nodes[i + 1 :]
            if candidate.cluster.link(x.name, y.name) != cluster.link(x.name, y.name)
        }
        kinds.add(frozenset(changed))
    north = {("n0", "n4"), ("n1", "n4"), ("n2", "n4"), ("n3", "n4")}
    assert frozenset({("n2", "n3")}) in kinds
    assert frozenset({("n0", "n1")}) in kinds
    assert frozenset({("n0", "n2"), ("n0", "n3"), ("n1", "n2"), ("n1", "n3")}) in kinds
    # No line of the file joins north to west: a line for this pair of regions alone is what is bought.
    assert any(kind < north for kind in kinds)


def test_without_time_everything_is_named_as_untried_and_nothing_is_claimed() -> None:
    cluster, model = cluster_of((device_type("cpu", 8, 0.1), 2)), tiny_model()
    _, _, said = explained(cluster, model, what_if_s=0.0)
    assert said.what_if is not None
    assert len(said.what_if.changes) <= 1
    words = what_if_words(said)
    assert any("Not tried for lack of time" in note for note in words.notes)


def test_nothing_helps_says_so() -> None:
    """One request alone on the only node: neither more nodes nor links can help it much."""
    device = dataclasses.replace(device_type("cuda", 400, 1.0), name="big")
    cluster, model = cluster_of((device, 1)), tiny_model()
    _, _, said = explained(cluster, model, "latency", what_if_s=30.0)
    words = what_if_words(said)
    assert words.helps == ()
    assert words.notes == ("Nothing that was tried helps by more than 1 %.",)


@pytest.mark.slow
def test_a_published_cluster_is_explained() -> None:
    cluster = load_cluster(SPECS / "helix-single24.yaml")
    model = load_model("llama-2-70b")
    made = plan(cluster, model)
    task = make_task(cluster, model, None, "throughput", None, 0, "auto", made.engine)
    said = explain(made, task, what_if_s=60.0)
    assert said.what_if is not None
    assert said.what_if.untried == ()
    gains = {change.text: change.gain or 0.0 for change in said.what_if.changes}
    assert gains["one more A100-40G-SXM"] > gains["one more L4"] > 0
    assert all(gain > -1e-6 for text, gain in gains.items() if not text.startswith("drop"))
