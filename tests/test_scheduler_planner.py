"""``plan``: objectives, monotone sanity, honest refusals, scale; and the demo cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, clusters, device_type, tiny_model

from hexgen.catalogue import DEVICE_TYPES, LINKS
from hexgen.cluster import Cluster, DeviceType, Link, Node, RegionLink, load_cluster
from hexgen.errors import InfeasibleError, SpecError
from hexgen.model import load_model
from hexgen.plan import EngineOptions, Hop, Plan, Prediction, dump_plan, load_plan
from hexgen.scheduler import evaluate, plan
from hexgen.scheduler.best import solver_for
from hexgen.scheduler.compare import baselines
from hexgen.scheduler.search import candidates
from hexgen.scheduler.task import make_task
from hexgen.validate import check_plan
from hexgen.workload import Lengths, Slo, Workload

ROOT = Path(__file__).parent.parent
OPTIONS = EngineOptions(token_budget=64, max_sequences=8)


def prediction(made: Plan) -> Prediction:
    assert made.predicted is not None
    return made.predicted


def helix_like(fast: int, middle: int, slow: int) -> Cluster:
    """Single-GPU nodes as in Helix's clusters."""
    kinds = ["A100-40G-SXM"] * fast + ["L4"] * middle + ["T4"] * slow
    nodes = tuple(
        Node(f"n{i}", DEVICE_TYPES[kind], 1, LINKS["none"], kind, region="r0") for i, kind in enumerate(kinds)
    )
    return Cluster("helix", nodes, Link(1e9, 1e-3))


# ---- more is never worse --------------------------------------------------------------------------------------


def _better_links(cluster: Cluster) -> Cluster:
    def faster(link: Link) -> Link:
        return Link(link.bandwidth_bytes_s * 10, link.latency_s / 10)

    return dataclasses.replace(
        cluster,
        default_link=faster(cluster.default_link),
        region_links=tuple(RegionLink(r.regions, faster(r.link)) for r in cluster.region_links),
    )


def _more_memory(cluster: Cluster) -> Cluster:
    def larger(device: DeviceType) -> DeviceType:
        return dataclasses.replace(device, memory_bytes=device.memory_bytes + 3_000_000)

    return dataclasses.replace(
        cluster, nodes=tuple(dataclasses.replace(node, device=larger(node.device)) for node in cluster.nodes)
    )


@settings(deadline=None, max_examples=30)
@given(
    cluster=clusters(most_devices=4),
    layers=st.integers(1, 5),
    latency=st.booleans(),
    memory=st.booleans(),
)
def test_a_faster_link_or_more_memory_never_predicts_worse(
    cluster: Cluster, layers: int, latency: bool, memory: bool
) -> None:
    model = tiny_model(layers)
    objective = "latency" if latency else "throughput"
    better = _more_memory(cluster) if memory else _better_links(cluster)
    try:
        before = prediction(plan(cluster, model, WORKLOAD, objective, options=OPTIONS))
    except InfeasibleError:
        assume(False)
        return
    after = prediction(plan(better, model, WORKLOAD, objective, options=OPTIONS))
    if latency:
        assert after.single_tokens_s >= before.single_tokens_s * (1 - 1e-6)
    else:
        # Weights are written with six digits.
        assert after.tokens_s >= before.tokens_s * (1 - 2e-5)


# ---- objectives -----------------------------------------------------------------------------------------------


def test_throughput_and_latency_pull_apart() -> None:
    model = load_model("llama-2-13b")
    cluster = cluster_of((DEVICE_TYPES["RTX3090"], 4), (DEVICE_TYPES["RTX3090"], 4), link=Link(1e9, 1e-3))
    many = prediction(plan(cluster, model))
    soon = prediction(plan(cluster, model, objective="latency"))
    assert many.tokens_s > soon.tokens_s
    assert soon.single_tokens_s > many.single_tokens_s
    assert many.objective == "throughput"
    assert soon.objective == "latency"


def test_slo_holds_its_limits_and_tighter_limits_cost_throughput() -> None:
    model = load_model("llama-2-13b")
    cluster = cluster_of((DEVICE_TYPES["RTX3090"], 8), inside=LINKS["pcie4"])
    free = prediction(plan(cluster, model))
    served: list[float] = []
    for tpot in (0.2, 0.05, 0.03):
        workload = Workload(slo=Slo(ttft_s=2.0, tpot_s=tpot))
        found = prediction(plan(cluster, model, workload, "slo"))
        assert found.tpot_s <= tpot * 1.001
        assert found.ttft_s <= 2.0 * 1.001
        served.append(found.tokens_s)
    assert free.tokens_s * (1 + 1e-6) >= served[0] >= served[1] >= served[2]
    with pytest.raises(InfeasibleError, match="no plan keeps the limits"):
        plan(cluster, model, Workload(slo=Slo(tpot_s=1e-4)), "slo")
    with pytest.raises(SpecError, match="needs limits"):
        plan(cluster, model, Workload(), "slo")


def priced(budget: float | None = None) -> Cluster:
    a100, t4 = DEVICE_TYPES["A100-40G-SXM"], DEVICE_TYPES["T4"]
    return cluster_of(
        (a100, 1), (a100, 1), (t4, 1), (t4, 1), (t4, 1), prices=(4.0, 4.0, 0.5, 0.5, 0.5), budget=budget
    )


def test_cost_takes_the_cheapest_nodes_that_carry_the_rate() -> None:
    model = load_model("llama-2-7b")
    lengths = {"prompt_tokens": Lengths(mean=200), "output_tokens": Lengths(mean=100)}
    slow = prediction(plan(priced(), model, Workload(**lengths, rate=0.5), "cost"))
    fast = prediction(plan(priced(), model, Workload(**lengths, rate=10.0), "cost"))
    assert slow.price_usd_h is not None
    assert fast.price_usd_h is not None
    assert slow.price_usd_h <= 1.0
    assert slow.requests_s >= 0.5
    assert fast.price_usd_h > slow.price_usd_h
    assert fast.requests_s >= 10
    with pytest.raises(InfeasibleError, match="asks for 1000"):
        plan(priced(), model, Workload(**lengths, rate=1000.0), "cost")
    with pytest.raises(InfeasibleError, match="budget"):
        plan(priced(budget=1.0), model, Workload(**lengths, rate=15.0), "cost")


def test_a_budget_bounds_every_objective() -> None:
    model = load_model("llama-2-7b")
    free = prediction(plan(priced(), model))
    bound = prediction(plan(priced(budget=5.0), model))
    assert bound.price_usd_h is not None
    assert bound.price_usd_h <= 5.0
    assert bound.tokens_s < free.tokens_s
    with pytest.raises(InfeasibleError, match="budget"):
        plan(priced(budget=0.1), model)


def test_maxflow_routes_carry_the_model_and_may_share_stages() -> None:
    model = load_model("llama-2-70b")
    cluster = helix_like(4, 8, 12)
    made = plan(cluster, model, objective="maxflow")
    check_plan(made, cluster, model)
    for route in made.routes:
        assert route.path[0].layers[0] == 0
        assert route.path[-1].layers[1] == model.layers
    assert sum(route.weight for route in made.routes) == pytest.approx(1, abs=1e-3)


def test_budgets_of_time_and_seeds() -> None:
    model = load_model("llama-2-70b")
    cluster = helix_like(4, 8, 12)
    first = plan(cluster, model, seed=3)
    assert first == plan(cluster, model, seed=3)
    hurried = plan(cluster, model, time_limit_s=0.01)
    assert prediction(hurried).tokens_s > 0
    with pytest.raises(SpecError, match="time limit"):
        plan(cluster, model, time_limit_s=-1)


# ---- what is planned --------------------------------------------------------------------------------------------


def test_a_published_example_uses_every_device_it_can() -> None:
    """HexGen's example: 4 A6000, 2 A5000, 2 A4000 for Llama-2 70B; its own plan is TP 4, 2, 2 with 44, 20, 16."""
    model = load_model("llama-2-70b")
    cluster = load_cluster(ROOT / "cluster_specs" / "hexgen-asym-example8.yaml")
    made = plan(cluster, model)
    theirs = Plan(
        model.name,
        cluster,
        tuple(
            dataclasses.replace(made.stages[0], name=name, layers=layers, devices=devices, shares=None)
            for name, layers, devices in _hexgen_stages(cluster)
        ),
        (dataclasses.replace(made.routes[0], path=tuple(_hops(cluster)), weight=1.0),),
        made.engine,
    )
    check_plan(theirs, cluster, model)
    assert prediction(made).tokens_s >= evaluate(theirs, cluster, model, Workload()).tokens_s


def _hexgen_stages(cluster: Cluster) -> list[tuple[str, tuple[int, int], tuple[str, ...]]]:
    bounds = [(0, 44), (44, 64), (64, 80)]
    return [
        (f"s{i}", bounds[i], tuple(f"{node.name}/{k}" for k in range(node.count)))
        for i, node in enumerate(cluster.nodes)
    ]


def _hops(cluster: Cluster) -> list[Hop]:
    return [Hop(name, layers) for name, layers, _ in _hexgen_stages(cluster)]


def test_the_demo_cluster_needs_an_asymmetric_plan() -> None:
    model = load_model("demo")
    cluster = load_cluster(ROOT / "cluster_specs" / "demo.yaml")
    made = plan(cluster, model)
    assert [stage.width for stage in made.stages] == [2, 1, 1]
    layers = [stage.layers[1] - stage.layers[0] for stage in made.stages]
    assert len(set(layers)) > 1
    assert {device.rsplit("/", 1)[0] for stage in made.stages for device in stage.devices} == {
        "big",
        "mid",
        "small",
    }
    task = make_task(cluster, model, None, "throughput", None, 0, "auto", made.engine)
    symmetric = ("best single", "best homogeneous", "equal layers", "symmetric")
    fits = {other.name: other.plan is not None for other in baselines(task, "throughput", seconds=2.0)}
    assert not any(fit for name, fit in fits.items() if name.startswith(symmetric))
    assert fits["HexGen"], "its groups may be as unlike as ours"


def test_the_plan_round_trips_through_a_file(tmp_path: Path) -> None:
    cluster = cluster_of((device_type("cpu", 5, 0.1), 2), (device_type("cpu", 3, 0.1), 1))
    made = plan(cluster, tiny_model(), WORKLOAD, options=OPTIONS)
    dump_plan(made, tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == made


def test_cards_without_bfloat16_make_the_plan_half_precision() -> None:
    model = load_model("llama-3.1-8b")
    assert model.dtype == "bfloat16"
    made = plan(cluster_of((DEVICE_TYPES["T4"], 2)), model)
    assert made.engine.dtype is None, "left to the engine, which decides alike"
    assert prediction(made).tokens_s > 0


def test_gpus_do_not_slow_down_for_a_cpu_beside_them() -> None:
    model = load_model("llama-2-7b")
    cpu = dataclasses.replace(DEVICE_TYPES["cpu"], memory_bytes=64 * 10**9)
    alone = plan(cluster_of((DEVICE_TYPES["A100-40G-SXM"], 1)), model)
    beside = plan(cluster_of((DEVICE_TYPES["A100-40G-SXM"], 1), (cpu, 1)), model)
    assert [stage.devices for stage in beside.stages] == [("n0/0",)]
    assert prediction(beside).tokens_s >= 0.99 * prediction(alone).tokens_s


def test_baselines_never_beat_the_plan() -> None:
    model = load_model("llama-2-70b")
    cluster = load_cluster(ROOT / "cluster_specs" / "hexgen-homogeneous16.yaml")
    made = plan(cluster, model)
    task = make_task(cluster, model, None, "throughput", None, 0, "auto", made.engine)
    found = {other.name: other.plan for other in baselines(task, "throughput", seconds=2.0)}
    assert found["symmetric TP x PP"] is not None
    for other in found.values():
        if other is not None:
            assert prediction(other).tokens_s <= prediction(made).tokens_s * (1 + 1e-5)


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_infeasible_says_what_is_missing_and_what_helps() -> None:
    model = load_model("llama-2-70b")
    with pytest.raises(InfeasibleError) as caught:
        plan(cluster_of((DEVICE_TYPES["T4"], 4)), model)
    text = str(caught.value)
    assert "138 GB" in text
    assert "are missing" in text
    count = int(text.split("add ")[1].split()[0])
    plan(cluster_of((DEVICE_TYPES["T4"], 4), *((DEVICE_TYPES["T4"], 1),) * count), model)
    with pytest.raises(InfeasibleError, match="no device alone holds one layer"):
        plan(cluster_of((dataclasses.replace(DEVICE_TYPES["T4"], memory_bytes=10**9), 1)), model)


def test_impossible_requests_are_refused() -> None:
    model = tiny_model()
    cluster = cluster_of((device_type("cpu", 50, 1), 1))
    with pytest.raises(SpecError, match="takes at most 512"):
        plan(cluster, model, Workload(prompt_tokens=Lengths(mean=600)))
    dead = cluster_of((device_type("cpu", 50, 1), 2), inside=Link(0.0, 0.0))
    with pytest.raises(SpecError, match="no bandwidth"):
        plan(dead, model, WORKLOAD)
    with pytest.raises(SpecError, match="unknown objective"):
        plan(cluster, model, WORKLOAD, "beauty")  # type: ignore[arg-type]
    # The built-in workload shrinks to a short context.
    assert prediction(plan(cluster, dataclasses.replace(model, max_context=96))).tokens_s > 0


# ---- scale ------------------------------------------------------------------------------------------------------


def test_many_devices_are_planned_with_few_routes_worked_out() -> None:
    """The work is what is asserted, not the seconds: equal nodes cost no symmetry."""
    model = load_model("llama-2-70b")
    cluster = cluster_of(*((DEVICE_TYPES["A100-40G-SXM"], 8),) * 8)
    task = make_task(cluster, model, None, "throughput", None, 0, "auto", None)
    solver = solver_for(task, cluster.nodes, "throughput")
    assert candidates(solver, 0, None, 0)
    assert solver.solved < 400
