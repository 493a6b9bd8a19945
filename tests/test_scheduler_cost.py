"""The cost model's arithmetic: bytes as the engine counts them, seconds that behave as hardware does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.catalogue import DEVICE_TYPES, LINKS
from hexgen.cluster import Cluster, Link, Node
from hexgen.errors import InfeasibleError
from hexgen.memory import plan_memory
from hexgen.model import ModelSpec, load_model
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.scheduler.cost import CostModel, GroupShape, StageProfile
from hexgen.scheduler.figures import figures_of
from hexgen.scheduler.pipeline import Part, alone, concurrency_for, steady
from hexgen.scheduler.traffic import Traffic, mix_of, traffic_of
from hexgen.workload import Lengths, Workload

LINK = Link(10e9, 1e-4)
WORKLOAD = Workload(prompt_tokens=Lengths(mean=300), output_tokens=Lengths(mean=100))


def profile_of(
    device: str, width: int, model: ModelSpec, engine: EngineOptions, shares: tuple[float, ...] | None = None
) -> StageProfile:
    kind = DEVICE_TYPES[device]
    cost = CostModel(model, "float32" if kind.kind == "cpu" else "float16", engine)
    return cost.profile(GroupShape((kind,) * width, LINKS["pcie4"], shares))


def traffic(model: ModelSpec, workload: Workload = WORKLOAD, **options: int) -> Traffic:
    return traffic_of(model, workload, EngineOptions(**options))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=30)
@given(
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 31), min_size=2, max_size=2, unique=True),
    device=st.sampled_from(["A100-40G-SXM", "T4", "cpu"]),
    max_sequences=st.sampled_from([8, 64]),
)
def test_kv_room_is_what_the_engine_will_have(
    widths: list[int], cuts: list[int], device: str, max_sequences: int
) -> None:
    model = load_model("llama-2-7b")
    kind = DEVICE_TYPES[device]
    if kind.kind == "cpu":
        kind = type(kind)(**{f: getattr(kind, f) for f in kind.__slots__} | {"memory_bytes": 64 * 10**9})
    engine = EngineOptions(dtype="float32" if kind.kind == "cpu" else "float16", max_sequences=max_sequences)
    bounds = [0, *sorted(cuts)[: len(widths) - 1], 32]
    nodes = tuple(Node(f"n{i}", kind, w, LINKS["pcie4"], kind.name) for i, w in enumerate(widths))
    stages = tuple(
        Stage(f"s{i}", (bounds[i], bounds[i + 1]), tuple(f"n{i}/{r}" for r in range(w)))
        for i, w in enumerate(widths)
    )
    plan = Plan(
        "m",
        Cluster("c", nodes, LINK),
        stages,
        (Route(tuple(Hop(s.name, s.layers) for s in stages)),),
        engine,
    )
    cost = CostModel(model, engine.dtype or "float16", engine)
    ours = min(
        cost.profile(GroupShape((kind,) * w, LINKS["pcie4"])).kv_tokens(
            bounds[i + 1] - bounds[i], i == 0, i == len(widths) - 1
        )
        for i, w in enumerate(widths)
    )
    most = max_sequences * model.max_context
    try:
        theirs = plan_memory(plan, Cluster("c", nodes, LINK), model).kv_tokens[0]
    except InfeasibleError:
        theirs = 0
    assert theirs == min(ours, most)


@settings(deadline=None, max_examples=40)
@given(
    kv_tokens=st.integers(0, 5000),
    width=st.integers(1, 8),
    embeds=st.booleans(),
    samples=st.booleans(),
)
def test_most_layers_is_the_inverse_of_kv_room(kv_tokens: int, width: int, embeds: bool, samples: bool) -> None:
    profile = profile_of("RTX3090", width, load_model("llama-2-13b"), EngineOptions())
    kv_tokens = kv_tokens // 16 * 16
    layers = profile.max_layers(kv_tokens, embeds, samples)
    if layers:
        assert profile.kv_tokens(layers, embeds, samples) >= kv_tokens
        assert profile.missing_bytes(layers, kv_tokens, embeds, samples) <= 0
    assert profile.missing_bytes(layers + 1, kv_tokens, embeds, samples) > 0


def test_decode_is_bound_by_memory_and_prefill_by_compute() -> None:
    model = load_model("llama-2-13b")
    load = traffic(model)
    profile = profile_of("A100-40G-SXM", 1, model, EngineOptions())
    device = DEVICE_TYPES["A100-40G-SXM"]
    one = 40 * profile.layer_s(load.decode_load(1))
    eight = 40 * profile.layer_s(load.decode_load(8))
    assert eight < 1.2 * one, "eight sequences read the same weights"
    read = 40 * model.layer_parameters * 2 / device.bandwidth_bytes_s
    assert read < one < 2 * read
    long = 40 * profile.layer_s(load.prefill_load(4096))
    flops = 2 * 40 * model.layer_parameters * 4096
    share = flops / long / device.fp16_flops
    assert 0.3 < share <= figures_of(device).compute_share


def test_the_slowest_rank_decides() -> None:
    model = load_model("llama-2-13b")
    load = traffic(model).decode_load(4)
    equal = profile_of("A6000", 2, model, EngineOptions())
    uneven = profile_of("A6000", 2, model, EngineOptions(), (3.0, 1.0))
    alone_ = profile_of("A6000", 1, model, EngineOptions())
    assert equal.layer_s(load) < uneven.layer_s(load) < alone_.layer_s(load)


def test_all_reduce_costs_grow_with_width_bytes_and_latency() -> None:
    model = load_model("llama-2-70b")
    profile = profile_of("A100-40G-SXM", 4, model, EngineOptions())
    assert profile_of("A100-40G-SXM", 1, model, EngineOptions()).all_reduce_s(100) == 0
    assert profile.all_reduce_s(1) < profile.all_reduce_s(4096)
    wide = profile_of("A100-40G-SXM", 8, model, EngineOptions())
    assert profile.all_reduce_s(1) < wide.all_reduce_s(1)
    size = 4096 * model.hidden_size * 2
    assert profile.all_reduce_s(4096) >= 2 * 3 / 4 * size / LINKS["pcie4"].bandwidth_bytes_s


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.integers(1, 4000),
    output=st.integers(1, 2000),
    concurrency=st.floats(0.1, 256),
    depth=st.integers(1, 12),
    budget=st.sampled_from([64, 512, 2048]),
)
def test_steps_stay_within_the_token_budget(
    prompt: int, output: int, concurrency: float, depth: int, budget: int
) -> None:
    model = load_model("llama-2-7b")
    workload = Workload(prompt_tokens=Lengths(mean=prompt), output_tokens=Lengths(mean=output))
    mix = mix_of(traffic(model, workload, token_budget=budget), concurrency, depth)
    assert 0 <= mix.mixed_share <= 1
    assert mix.mean_tokens <= budget * (1 + 1e-9)
    assert mix.running <= concurrency


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.integers(1, 3000),
    output=st.integers(1, 1000),
    depth=st.integers(1, 6),
    latency_ms=st.floats(0, 100),
    few=st.integers(1, 100),
    more=st.integers(1, 100),
    device=st.sampled_from(["A100-40G-SXM", "T4", "cpu"]),
)
def test_more_sequences_never_serve_less(
    prompt: int, output: int, depth: int, latency_ms: float, few: int, more: int, device: str
) -> None:
    model = load_model("llama-2-7b")
    workload = Workload(prompt_tokens=Lengths(mean=prompt), output_tokens=Lengths(mean=output))
    asked = traffic(model, workload)
    kind = DEVICE_TYPES[device]
    cost = CostModel(model, "float32" if kind.kind == "cpu" else "float16", EngineOptions())
    profile = cost.profile(GroupShape((kind,), LINKS["none"]))
    parts = tuple(Part(profile, 5, i == 0, i == depth - 1) for i in range(depth))
    link = Link(1e9, latency_ms / 1000)
    edges = tuple(cost.edge(profile, profile, link) for _ in range(depth - 1))
    back = cost.token_edge(profile, profile, link) if depth > 1 else None
    small = steady(parts, edges, back, asked, float(few))
    large = steady(parts, edges, back, asked, float(few + more))
    assert large.tokens_s >= small.tokens_s * 0.97, "chunks that share a step differ a little"
    # Little's law holds within the route's own figures.
    for state in (small, large):
        assert state.tokens_s == pytest.approx(state.requests_s * asked.output)
        assert state.requests_s * state.mix.cycles * state.tpot_s <= state.concurrency * (1 + 1e-9)


def test_one_request_alone_is_the_sum_of_its_steps() -> None:
    model = load_model("llama-2-7b")
    asked = traffic(model)
    profile = profile_of("A100-40G-SXM", 1, model, EngineOptions())
    cost = CostModel(model, "float16", EngineOptions())
    parts = (Part(profile, 20, True, False), Part(profile, 12, False, True))
    edge = cost.edge(profile, profile, LINK)
    back = cost.token_edge(profile, profile, LINK)
    found = alone(parts, (edge,), back, asked)
    decode = asked.decode_load(1)
    assert found.tpot_s == pytest.approx(
        profile.step_s(20, decode, True, False)
        + profile.step_s(12, decode, False, True)
        + edge.delay_s
        + edge.token_s
        + back.delay_s
    )
    assert found.latency_s == pytest.approx(found.ttft_s + 99 * found.tpot_s)
    crowd = steady(parts, (edge,), back, asked, 32.0)
    assert crowd.tpot_s >= found.tpot_s
    assert crowd.tokens_s > found.tokens_s


def test_concurrency_follows_the_room() -> None:
    asked = traffic(load_model("llama-2-7b"))
    assert concurrency_for(asked.peak_tokens - 1, asked) == 0
    assert concurrency_for(asked.peak_tokens, asked) == 1
    assert concurrency_for(10**9, asked) == asked.max_sequences


def test_prompts_and_decodes_pay_for_their_own_attention() -> None:
    """In one step they share the weights' reading, and nothing else: each part may be bound by something else."""
    model = load_model("llama-2-70b")
    load = traffic(model, Workload(prompt_tokens=Lengths(mean=2000), output_tokens=Lengths(mean=500)))
    profile = profile_of("A100-80G-SXM", 4, model, EngineOptions())
    decode, prefill = load.decode_load(64), load.prefill_load(2000)
    both = profile.layer_s(decode.plus(prefill))
    assert max(profile.layer_s(decode), profile.layer_s(prefill)) < both
    assert both < profile.layer_s(decode) + profile.layer_s(prefill)
    # 64 decodes read keys and values of 2,250 tokens each, on top of whatever the prompt computes.
    share = figures_of(DEVICE_TYPES["A100-80G-SXM"]).attention_bandwidth_share
    keys_and_values = 64 * 2250 * 2 * model.kv_heads * model.head_dim * 2 / 4
    read = keys_and_values / (DEVICE_TYPES["A100-80G-SXM"].bandwidth_bytes_s * share)
    assert both - profile.layer_s(prefill) > read


def test_elementwise_traffic_is_there_and_small() -> None:
    """Between matrix products a layer moves a few hundred kilobytes a token: percents of a large prefill."""
    model = load_model("llama-2-70b")
    load = traffic(model).prefill_load(4096)
    device = DEVICE_TYPES["A100-80G-SXM"]
    seconds = profile_of("A100-80G-SXM", 1, model, EngineOptions()).layer_s(load)
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    flops = 2 * model.layer_parameters * 4096 / (device.fp16_flops * figures_of(device).compute_share)
    attention = 4 * q * load.attended / (device.fp16_flops * figures_of(device).attention_compute_share)
    moved = (10 * model.hidden_size + 2 * (q + kv) + 3 * model.intermediate_size) * 2 * 4096
    rest = seconds - flops - attention
    assert moved / device.bandwidth_bytes_s < rest < 0.1 * seconds
