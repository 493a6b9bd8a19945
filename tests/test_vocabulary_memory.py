"""Bytes of a plan: exact by construction, divided fairly, and never more than there is."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabulary_strategies import MODEL

from hexgen.catalogue import DEVICE_TYPES
from hexgen.cluster import Cluster, parse_cluster
from hexgen.errors import InfeasibleError
from hexgen.memory import (
    plan_dtype,
    plan_memory,
    rank_buffers_bytes,
    rank_kv_bytes_per_token,
    rank_weights_bytes,
    usable_bytes,
)
from hexgen.model import DTYPE_BYTES, ModelSpec, load_model
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.split import split_stage

ENGINE = EngineOptions(token_budget=32, max_sequences=4)


def cpu_cluster(*memories: int) -> Cluster:
    nodes = [{"name": f"n{i}", "device": "cpu", "memory": f"{m}B"} for i, m in enumerate(memories)]
    return parse_cluster({"nodes": nodes}, "x")


def chain(*parts: tuple[int, int], devices: int = 1, engine: EngineOptions = ENGINE) -> Plan:
    """One route over stages of ``devices`` nodes each, with these layers."""
    stages = tuple(
        Stage(f"s{i}", layers, tuple(f"n{i * devices + k}/0" for k in range(devices)))
        for i, layers in enumerate(parts)
    )
    hops = tuple(Hop(stage.name, stage.layers) for stage in stages)
    return Plan("tiny", "c.yaml", stages, (Route(hops),), engine)


@settings(deadline=None, max_examples=100)
@given(
    width=st.integers(1, 8),
    tied=st.booleans(),
    qkv_bias=st.booleans(),
    cut=st.integers(1, 7),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_the_parts_add_up_to_the_model(width: int, tied: bool, qkv_bias: bool, cut: int, dtype: str) -> None:
    """Over all ranks of two stages: the model's parameters, plus what is held by several on purpose."""
    model = dataclasses.replace(MODEL, tie_embeddings=tied, qkv_bias=qkv_bias)
    bytes_each = DTYPE_BYTES[dtype]  # type: ignore[index]
    total = 0
    parts = split_stage(model, width)
    for part in parts:
        total += rank_weights_bytes(model, dtype, cut, part, True, False)  # type: ignore[arg-type]
        total += rank_weights_bytes(model, dtype, model.layers - cut, part, False, True)  # type: ignore[arg-type]
    twice_kv = (sum(part.n_kv_heads for part in parts) - model.kv_heads) * model.head_dim
    again = model.layers * twice_kv * 2 * (model.hidden_size + int(qkv_bias))
    norms = (width - 1) * (2 * model.layers + 1) * model.hidden_size
    head = model.embedding_parameters if tied else 0
    assert total == (model.parameters + again + norms + head) * bytes_each


def test_a_tied_head_is_held_once_where_both_are() -> None:
    model = dataclasses.replace(MODEL, tie_embeddings=True)
    (whole,) = split_stage(model, 1)
    assert rank_weights_bytes(model, "float16", 8, whole, True, True) == 2 * model.parameters
    assert rank_kv_bytes_per_token(model, "float16", 8, whole) == model.kv_bytes_per_token("float16")


def test_a_known_model() -> None:
    model = load_model("llama-2-70b")
    parts = split_stage(model, 8)
    assert len({(p.n_query_heads, p.n_kv_heads, p.n_columns, p.n_vocab) for p in parts}) == 1
    total = sum(rank_weights_bytes(model, "float16", 80, part, True, True) for part in parts)
    assert total == 2 * (model.parameters + 7 * (2 * 80 + 1) * 8192)
    assert rank_kv_bytes_per_token(model, "float16", 80, parts[0]) == 2 * 80 * 128 * 2


def test_reserves_and_dtypes() -> None:
    cpu, t4, a100 = DEVICE_TYPES["cpu"], DEVICE_TYPES["T4"], DEVICE_TYPES["A100-80G-SXM"]
    assert usable_bytes(cpu) == cpu.memory_bytes
    assert usable_bytes(a100) == 76 * 10**9
    assert usable_bytes(DEVICE_TYPES["RTX2060"]) == 6 * 10**9 - 600 * 10**6
    bf16 = dataclasses.replace(MODEL, dtype="bfloat16")
    assert plan_dtype(ENGINE, bf16, [a100, cpu]) == "float32"
    assert plan_dtype(ENGINE, bf16, [a100]) == "bfloat16"
    assert plan_dtype(ENGINE, bf16, [a100, t4]) == "float16"
    assert plan_dtype(EngineOptions(dtype="bfloat16"), MODEL, [t4, cpu]) == "bfloat16"


def fixed_bytes(model: ModelSpec, layers: int, embeds: bool, samples: bool) -> int:
    (part,) = split_stage(model, 1)
    return rank_weights_bytes(model, "float32", layers, part, embeds, samples) + rank_buffers_bytes(
        model, "float32", part, ENGINE.token_budget, ENGINE.max_sequences, samples
    )


def test_one_route_fills_the_tightest_stage_exactly() -> None:
    page = 16 * 1 * 2 * 4 * 8 * 4  # tokens x layers x (k, v) x heads x head_dim x float32
    first = fixed_bytes(MODEL, 5, True, False) + 7 * 5 * page
    second = fixed_bytes(MODEL, 3, False, True) + 9 * 3 * page + 5
    memory = plan_memory(chain((0, 5), (5, 8)), cpu_cluster(first, second), MODEL)
    assert memory.kv_tokens == (7 * 16,)
    assert memory.max_context == (7 * 16,)
    assert memory.dtype == "float32"
    assert [d.kv_bytes for d in memory.devices] == [7 * 5 * page, 7 * 3 * page]
    assert [d.memory_bytes for d in memory.devices] == [first, second]
    one_less = plan_memory(chain((0, 5), (5, 8)), cpu_cluster(first - 1, second), MODEL)
    assert one_less.kv_tokens == (6 * 16,)


def test_what_could_never_be_used_is_left_alone() -> None:
    plan = chain((0, 8))
    memory = plan_memory(plan, cpu_cluster(10**10), MODEL)
    assert memory.kv_tokens == (4 * 512,)
    assert memory.max_context == (512,)
    shorter = dataclasses.replace(plan, engine=dataclasses.replace(ENGINE, max_context=100))
    assert plan_memory(shorter, cpu_cluster(10**10), MODEL).kv_tokens == (4 * 112,)
    assert plan_memory(shorter, cpu_cluster(10**10), MODEL).max_context == (100,)
    capped = dataclasses.replace(plan, routes=(dataclasses.replace(plan.routes[0], kv_tokens=100),))
    assert plan_memory(capped, cpu_cluster(10**10), MODEL).kv_tokens == (96,)


def shared(weights: tuple[float, float], kv_tokens: int | None = None) -> Plan:
    """Two routes: a whole one over s0 and s1; another that enters at s2 and uses half of s1."""
    stages = (Stage("s0", (0, 4), ("n0/0",)), Stage("s1", (4, 8), ("n1/0",)), Stage("s2", (0, 6), ("n2/0",)))
    routes = (
        Route((Hop("s0", (0, 4)), Hop("s1", (4, 8))), weights[0], kv_tokens),
        Route((Hop("s2", (0, 6)), Hop("s1", (6, 8))), weights[1]),
    )
    return Plan("tiny", "c.yaml", stages, routes, ENGINE)


def test_routes_share_a_stage_by_weight_and_layers() -> None:
    layer_page = 16 * 2 * 4 * 8 * 4
    room = 60 * layer_page
    cluster = cpu_cluster(10**8, fixed_bytes(MODEL, 4, False, True) + room, 10**8)
    # Tokens in proportion to weight: (4 x 2w + 2 x w) layer pages a unit of weight.
    assert plan_memory(shared((2.0, 1.0)), cluster, MODEL).kv_tokens == (16 * 12, 16 * 6)
    # What the first cannot use, by its cap, the other gets.
    assert plan_memory(shared((2.0, 1.0), kv_tokens=16 * 5), cluster, MODEL).kv_tokens == (16 * 5, 16 * 20)


@settings(deadline=None, max_examples=100)
@given(
    st.tuples(*[st.floats(1e-3, 1e3)] * 2),
    st.tuples(st.integers(4, 60), st.integers(0, 60), st.integers(6, 60)),
    st.none() | st.integers(1, 2000),
)
def test_no_device_ever_holds_more_than_it_has(
    weights: tuple[float, float], spare_pages: tuple[int, int, int], cap: int | None
) -> None:
    layer_page = 16 * 2 * 4 * 8 * 4
    flags = ((4, True, False), (4, False, True), (6, True, False))
    cluster = cpu_cluster(
        *(fixed_bytes(MODEL, *f) + n * layer_page for f, n in zip(flags, spare_pages, strict=True))
    )
    plan = shared(weights, cap)
    if spare_pages[1] < 6:  # one page of each route does not fit
        with pytest.raises(InfeasibleError, match=r"device n1/0, stage s1: lacks"):
            plan_memory(plan, cluster, MODEL)
        return
    memory = plan_memory(plan, cluster, MODEL)
    assert min(memory.kv_tokens) >= 16
    for device in memory.devices:
        assert device.weights_bytes + device.kv_bytes + device.buffers_bytes <= device.memory_bytes
    a, b = (tokens // 16 for tokens in memory.kv_tokens)
    used = [4 * a, 4 * a + 2 * b, 6 * b]
    assert all(u <= n for u, n in zip(used, spare_pages, strict=True))
    # Neither could have one page more.
    most = 4 * 32 if cap is None else min(4 * 32, max(1, cap // 16))
    assert a == most or used[0] + 4 > spare_pages[0] or used[1] + 4 > spare_pages[1]
    assert b == 4 * 32 or used[2] + 6 > spare_pages[2] or used[1] + 2 > spare_pages[1]


def test_too_little_memory_says_who_lacks_how_much() -> None:
    need = fixed_bytes(MODEL, 8, True, True)
    with pytest.raises(InfeasibleError, match=r"device n0/0, stage s0: lacks 1 KB: weights .* and buffers"):
        plan_memory(chain((0, 8)), cpu_cluster(need - 1000), MODEL)
    with pytest.raises(InfeasibleError, match=r"device n0/0, stage s0: lacks .* for 1 page of keys and values"):
        plan_memory(chain((0, 8)), cpu_cluster(need + 100), MODEL)


def test_gpus_keep_room_for_the_gathered_layer() -> None:
    cluster = parse_cluster({"nodes": [{"name": "n0", "device": "T4", "memory": "1GB"}]}, "x")
    plan = chain((0, 8), engine=EngineOptions(token_budget=32, max_sequences=10**4))
    memory = plan_memory(plan, cluster, MODEL)
    (device,) = memory.devices
    free = 400_000_000 - device.weights_bytes - device.buffers_bytes
    assert device.kv_bytes <= free * 8 / 9 < device.kv_bytes + 9 * 16 * 2 * 4 * 8 * 2
    assert math.isclose(memory.kv_tokens[0] * 8 * 2 * 4 * 8 * 2, device.kv_bytes)
