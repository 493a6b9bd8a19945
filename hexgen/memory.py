"""Exact bytes: what each device of a plan holds, and how much KV room is left.

One arithmetic for the planner and the workers. Weights and KV pages are exact to the byte; buffers are the peak of
one step's activations, counted tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hexgen.cluster_spec import Cluster, DeviceType
from hexgen.errors import InfeasibleError
from hexgen.model_spec import DTYPE_BYTES, DType, ModelSpec
from hexgen.plan_spec import DevicePrediction, EngineOptions, Plan, Stage
from hexgen.split import RankSlice, split_stage
from hexgen.units import format_bytes

# Left alone on a GPU: the CUDA context, the libraries' workspaces and the allocator's fragmentation.
GPU_RESERVE_SHARE = 0.05
GPU_RESERVE_BYTES = 600_000_000
# Attention over pages gathers one layer's keys and values of a step into a contiguous copy. On a GPU, where
# running out of memory ends the process, room for that copy is kept: as if each route used one more layer.
GPU_GATHER_LAYERS = 1


@dataclass(frozen=True, slots=True)
class PlanMemory:
    """What a plan holds. ``devices`` in the order of the plan's stages and ranks; the rest per route."""

    dtype: DType
    devices: tuple[DevicePrediction, ...]
    kv_tokens: tuple[int, ...]  # tokens of KV cache, whole pages, the same on every stage of the route
    max_context: tuple[int, ...]  # tokens of the longest sequence


# ---- one rank ------------------------------------------------------------------------------------------------


def rank_weights_bytes(
    model: ModelSpec, dtype: DType, layers: int, part: RankSlice, embeds: bool, samples: bool
) -> int:
    """Bytes of the weights of one rank that holds ``layers`` layers.

    Norms and the biases after row-parallel products are held whole by every rank. A tied head shares the
    embedding's rows where the rank holds both.
    """
    q, kv = part.n_query_heads * model.head_dim, part.n_kv_heads * model.head_dim
    hidden, columns = model.hidden_size, part.n_columns
    attention = hidden * (q + 2 * kv) + q * hidden
    attention += (q + 2 * kv if model.qkv_bias else 0) + (hidden if model.o_bias else 0)
    attention += 2 * model.head_dim if model.qk_norm else 0
    mlp = 3 * hidden * columns + (2 * columns + hidden if model.mlp_bias else 0)
    elements = layers * (attention + mlp + 2 * hidden)
    rows = part.n_vocab * hidden
    if embeds:
        elements += rows
    if samples:
        elements += hidden + (0 if embeds and model.tie_embeddings else rows)
    return elements * DTYPE_BYTES[dtype]


def rank_kv_bytes_per_token(model: ModelSpec, dtype: DType, layers: int, part: RankSlice) -> int:
    """Bytes of keys and values of one token on one rank, over ``layers`` layers."""
    return 2 * layers * part.n_kv_heads * model.head_dim * DTYPE_BYTES[dtype]


def rank_buffers_bytes(
    model: ModelSpec, dtype: DType, part: RankSlice, token_budget: int, max_sequences: int, samples: bool
) -> int:
    """Bytes of one rank's activations at the peak of a step of ``token_budget`` tokens.

    Per token: the residual stream, its normalised copy and the partial output of a row-parallel product; beside
    them either queries, keys and values, the rotated ones and the attention's output, or the MLP's gate, up and
    their product, whichever is larger. Where the rank samples: its shard of the logits in float32 and one
    scratch copy, for each sequence.
    """
    q, kv = part.n_query_heads * model.head_dim, part.n_kv_heads * model.head_dim
    attention = (q + 2 * kv) + (q + kv) + q
    per_token = 3 * model.hidden_size + max(attention, 3 * part.n_columns)
    activations = token_budget * per_token * DTYPE_BYTES[dtype]
    rows = min(max_sequences, token_budget)
    return activations + (2 * rows * part.n_vocab * 4 if samples else 0)


def usable_bytes(device: DeviceType) -> int:
    """What of a device's memory may be planned with: all that a CPU worker was given, less a reserve on a GPU."""
    if device.kind == "cpu":
        return device.memory_bytes
    return device.memory_bytes - max(int(device.memory_bytes * GPU_RESERVE_SHARE), GPU_RESERVE_BYTES)


def plan_dtype(engine: EngineOptions, model: ModelSpec, devices: Iterable[DeviceType]) -> DType:
    """What a plan computes in: as told; else float32 with any CPU, float16 where a GPU lacks bfloat16."""
    if engine.dtype is not None:
        return engine.dtype
    used = tuple(devices)
    if any(device.kind == "cpu" for device in used):
        return "float32"
    if model.dtype == "bfloat16" and any(device.bf16_flops == 0 for device in used):
        return "float16"
    return model.dtype


# ---- a plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rank:
    """One device of a stage: what it holds whatever the routes do, and what is left."""

    device: str
    stage: str
    weights: int
    buffers: int
    memory: int
    room: int  # for keys and values
    kv_layer_token: int  # bytes of one token and layer
    extra_layers: int


def plan_memory(plan: Plan, cluster: Cluster, model: ModelSpec) -> PlanMemory:
    """Bytes of every device that the plan uses, and tokens of KV cache of every route.

    Where routes share a stage, its room is divided in proportion to weight times layers used; what a route cannot
    use, because another stage of its path is smaller, goes to the others. Raises ``InfeasibleError`` naming the
    device that lacks most, and how many bytes. The plan's names must be valid (``hexgen.validate``).
    """
    types = [cluster.device(device).type for stage in plan.stages for device in stage.devices]
    dtype = plan_dtype(plan.engine, model, types)
    firsts, lasts = ({route.path[i].stage for route in plan.routes} for i in (0, -1))
    ranks = [
        rank for stage in plan.stages for rank in _stage_ranks(stage, plan, cluster, model, dtype, firsts, lasts)
    ]
    _check_fixed(ranks)
    limit = plan.engine.max_context or model.max_context
    pages = _divide(plan, ranks, limit)
    _check_pages(plan, ranks, pages)
    page = plan.engine.page_size
    held = dict(enumerate(pages))
    devices = tuple(
        DevicePrediction(
            device=claim.rank.device,
            weights_bytes=claim.rank.weights,
            kv_bytes=int(claim.taken(held)),
            buffers_bytes=claim.rank.buffers,
            memory_bytes=claim.rank.memory,
        )
        for claim in _claims(plan, ranks, extra=False)
    )
    tokens = tuple(n * page for n in pages)
    return PlanMemory(dtype, devices, tokens, tuple(min(limit, n) for n in tokens))


def _stage_ranks(
    stage: Stage, plan: Plan, cluster: Cluster, model: ModelSpec, dtype: DType, firsts: set[str], lasts: set[str]
) -> Iterable[_Rank]:
    embeds, samples = stage.name in firsts, stage.name in lasts
    layers = stage.layers[1] - stage.layers[0]
    engine = plan.engine
    for device_id, part in zip(stage.devices, split_stage(model, stage.width, stage.shares), strict=True):
        device = cluster.device(device_id).type
        weights = rank_weights_bytes(model, dtype, layers, part, embeds, samples)
        buffers = rank_buffers_bytes(model, dtype, part, engine.token_budget, engine.max_sequences, samples)
        yield _Rank(
            device=device_id,
            stage=stage.name,
            weights=weights,
            buffers=buffers,
            memory=device.memory_bytes,
            room=usable_bytes(device) - weights - buffers,
            kv_layer_token=rank_kv_bytes_per_token(model, dtype, 1, part),
            extra_layers=0 if device.kind == "cpu" else GPU_GATHER_LAYERS,
        )


def _check_fixed(ranks: Sequence[_Rank]) -> None:
    short = min(ranks, key=lambda rank: rank.room)
    if short.room < 0:
        usable = short.room + short.weights + short.buffers
        raise InfeasibleError(
            f"lacks {format_bytes(-short.room)}: weights {format_bytes(short.weights)} and buffers "
            f"{format_bytes(short.buffers)} in {format_bytes(usable)} usable of {format_bytes(short.memory)}",
            where=f"device {short.device}, stage {short.stage}",
            remedy="give the stage fewer layers or more devices, this one a smaller share, or lower token_budget",
        )


@dataclass(frozen=True, slots=True)
class _Claim:
    """What the routes cost on one rank: its room, and bytes of one KV page of each route that passes it."""

    rank: _Rank
    page_bytes: Mapping[int, int]

    def taken(self, pages: Mapping[int, float]) -> float:
        return sum(cost * pages[route] for route, cost in self.page_bytes.items() if route in pages)


def _claims(plan: Plan, ranks: Sequence[_Rank], *, extra: bool) -> list[_Claim]:
    """One claim a rank; with ``extra``, a page also pays for the gathered copy of its layer."""
    layers: dict[str, dict[int, int]] = {stage.name: {} for stage in plan.stages}
    for number, route in enumerate(plan.routes):
        for hop in route.path:
            layers[hop.stage][number] = hop.layers[1] - hop.layers[0]
    page = plan.engine.page_size
    return [
        _Claim(
            rank,
            {
                number: page * rank.kv_layer_token * (used + (rank.extra_layers if extra else 0))
                for number, used in layers[rank.stage].items()
            },
        )
        for rank in ranks
    ]


def _divide(plan: Plan, ranks: Sequence[_Rank], limit: int) -> list[int]:
    """KV pages of each route: its fair share of every rank that it passes, and the least that it can live with."""
    claims = [claim for claim in _claims(plan, ranks, extra=True) if claim.page_bytes]
    caps = {n: _cap(route.kv_tokens, limit, plan.engine) for n, route in enumerate(plan.routes)}
    weight = {n: route.weight for n, route in enumerate(plan.routes)}
    least = _least_pages(plan.engine)
    pinned: dict[int, float] = {}
    while True:
        pages = {n: math.floor(level + 1e-6) for n, level in _fill(claims, caps, weight, pinned).items()}
        poor = {n: float(least) for n in pages if pages[n] < min(least, caps[n]) and n not in pinned}
        if not poor:
            break
        pinned |= poor
    # Levels are floats and pages are whole: give back what does not fit after all, hand out what rounding left.
    for claim in claims:
        while claim.taken(pages) > claim.rank.room and any(pages[n] for n in claim.page_bytes):
            pages[max(claim.page_bytes, key=lambda n: pages[n])] -= 1
    for n in sorted(pages, key=lambda n: -weight[n]):
        mine = [claim for claim in claims if n in claim.page_bytes]
        left = min((claim.rank.room - claim.taken(pages)) // claim.page_bytes[n] for claim in mine)
        pages[n] += max(0, min(caps[n] - pages[n], int(left)))
    return [pages[n] for n in range(len(plan.routes))]


def _fill(
    claims: Sequence[_Claim], caps: Mapping[int, int], weight: Mapping[int, float], pinned: Mapping[int, float]
) -> dict[int, float]:
    """Progressive filling (weighted max-min fairness: Bertsekas and Gallager, Data Networks, 2nd ed., 6.5.2).

    Every route's pages grow in proportion to its weight until one is full: by its own cap, or by a rank that it
    passes. That one is settled, and the others go on. Levels only rise when others settle, so what stops all its
    routes settles them at once. ``pinned`` routes are settled from the start.
    """
    settled = dict(pinned)
    while len(settled) < len(caps):
        # The level (pages per unit of weight) at which each route would have to stop.
        stop = {n: caps[n] / weight[n] for n in caps if n not in settled}
        levels: list[tuple[float, list[int]]] = [(level, [n]) for n, level in stop.items()]
        for claim in claims:
            here = [n for n in claim.page_bytes if n in stop]
            if here:
                slope = sum(weight[n] * claim.page_bytes[n] for n in here)
                level = max(0.0, claim.rank.room - claim.taken(settled)) / slope
                levels.append((level, here))
                stop.update({n: min(stop[n], level) for n in here})
        for level, here in levels:
            if all(stop[n] >= level for n in here):
                settled.update({n: min(float(caps[n]), level * weight[n]) for n in here})
    return settled


def _least_pages(engine: EngineOptions) -> int:
    """A page at least, and two tokens: a prompt and its answer."""
    return max(1, math.ceil(2 / engine.page_size))


def _cap(kv_tokens: int | None, limit: int, engine: EngineOptions) -> int:
    """The most pages a route can use: ``max_sequences`` of the longest, or as the plan says (at least one)."""
    most = engine.max_sequences * math.ceil(limit / engine.page_size)
    return most if kv_tokens is None else min(most, max(1, kv_tokens // engine.page_size))


def _check_pages(plan: Plan, ranks: Sequence[_Rank], pages: Sequence[int]) -> None:
    """Name the device that keeps a route from the least that it needs."""
    least = _least_pages(plan.engine)
    for claim in _claims(plan, ranks, extra=True):
        poor = [n for n in claim.page_bytes if pages[n] < least]
        missing = sum(claim.page_bytes.values()) * least - claim.rank.room
        if poor and missing > 0:
            rank = claim.rank
            raise InfeasibleError(
                f"lacks {format_bytes(missing)} for {least} page of keys and values of each route: weights "
                f"{format_bytes(rank.weights)} and buffers {format_bytes(rank.buffers)} leave "
                f"{format_bytes(rank.room)} of {format_bytes(rank.memory)}",
                where=f"device {rank.device}, stage {rank.stage}",
                remedy="give the stage fewer layers or more devices, or lower page_size or token_budget",
            )
    for number, count in enumerate(pages):
        if count < least:
            raise InfeasibleError(
                f"keeps {count} pages of keys and values, and needs {least}",
                where=f"route {number}",
                remedy="raise its weight or its kv_tokens, or leave out routes that share its stages",
            )
