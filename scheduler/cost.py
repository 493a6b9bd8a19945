"""What a step costs: one model, called by search, evaluation, explanation and (later) simulation.

A stage is a `GroupShape`; `CostModel.profile` turns it into a `StageProfile` that knows two things: seconds of a
step (roofline of each rank, collectives, software), and bytes (by `hexgen.memory`, the engine's own arithmetic).
The time of a stage is linear in its layers, `fixed_s + layers * layer_s`, which the search uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.cluster import DeviceType, Link
from hexgen.memory import (
    GPU_GATHER_LAYERS,
    rank_buffers_bytes,
    rank_kv_bytes_per_token,
    rank_weights_bytes,
    usable_bytes,
)
from hexgen.model import DTYPE_BYTES, DType, ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.figures import figures_of, flops_of
from hexgen.scheduler.traffic import Mix, StepLoad
from hexgen.split import RankSlice, split_stage

_CANDIDATE_BYTES = 256 * 8  # per row of logits, what ranks exchange to sample: top candidates, not the vocabulary


@dataclass(frozen=True, slots=True)
class GroupShape:
    """A tensor-parallel group as the cost model sees it: which devices, joined by what, sharing how."""

    devices: tuple[DeviceType, ...]  # rank order
    link: Link  # the slowest among its ranks
    shares: tuple[float, ...] | None = None

    @property
    def width(self) -> int:
        return len(self.devices)


@dataclass(frozen=True, slots=True)
class EdgeCost:
    """A message from one stage to the next: ``delay_s + tokens * token_s``; the link is busy for the latter."""

    delay_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class _RankWork:
    """One rank's arithmetic of one layer: seconds per unit of load."""

    attn_gemm_s_token: float
    attn_weights_s: float
    core_s_attended: float
    core_s_kv_read: float
    mlp_gemm_s_token: float
    mlp_weights_s: float
    head_gemm_s_row: float
    head_weights_s: float


@dataclass(frozen=True, slots=True)
class MixTimes:
    """A stage's seconds of a mean step and of a mixed one: ``fixed[end_index(...)] + layers * layer``."""

    layer_s: float
    mixed_layer_s: float
    fixed_s: tuple[float, float, float, float]
    mixed_fixed_s: tuple[float, float, float, float]


_ENDS = ((False, False), (False, True), (True, False), (True, True))


def end_index(embeds: bool, samples: bool) -> int:
    return 2 * embeds + samples


class CostModel:
    """Figures from the catalogue. Another source (measured, published) replaces `profile` and `edge`."""

    def __init__(self, model: ModelSpec, dtype: DType, engine: EngineOptions) -> None:
        self.model = model
        self.dtype: DType = dtype
        self.engine = engine
        self._profiles: dict[GroupShape, StageProfile] = {}

    def profile(self, shape: GroupShape) -> StageProfile:
        """The stage that ``shape`` makes; equal shapes give the same object. Raises `SpecError` past the heads."""
        found = self._profiles.get(shape)
        if found is None:
            found = StageProfile(len(self._profiles), shape, self.model, self.dtype, self.engine)
            self._profiles[shape] = found
        return found

    def edge(self, sender: StageProfile, receiver: StageProfile, link: Link) -> EdgeCost:
        """Hidden states from ``sender`` to ``receiver`` over ``link``."""
        a, b = figures_of(sender.shape.devices[0]), figures_of(receiver.shape.devices[0])
        row_bytes = self.model.hidden_size * DTYPE_BYTES[self.dtype]
        share = min(a.link_share, b.link_share)
        return EdgeCost(link.latency_s + max(a.hop_s, b.hop_s), row_bytes / (link.bandwidth_bytes_s * share))

    def token_edge(self, sender: StageProfile, receiver: StageProfile, link: Link) -> EdgeCost:
        """Sampled tokens from the last stage back to the first: a few bytes each."""
        a, b = figures_of(sender.shape.devices[0]), figures_of(receiver.shape.devices[0])
        return EdgeCost(link.latency_s + max(a.hop_s, b.hop_s), 0.0)


class StageProfile:
    """Seconds and bytes of one group shape. Immutable but for its caches."""

    __slots__ = (
        "_bytes", "_dtype", "_engine", "_model", "_most", "_times", "_work", "figures", "id", "shape", "slices",
    )  # fmt: skip

    def __init__(
        self, number: int, shape: GroupShape, model: ModelSpec, dtype: DType, engine: EngineOptions
    ) -> None:
        self.id = number
        self.shape = shape
        self.slices = split_stage(model, shape.width, shape.shares)
        self.figures = figures_of(shape.devices[0])
        self._model, self._dtype, self._engine = model, dtype, engine
        ranks = sorted(set(zip(shape.devices, self.slices, strict=True)), key=repr)
        self._work = tuple(_rank_work(model, dtype, device, part) for device, part in ranks)
        self._bytes = _distinct_bytes(model, dtype, engine, shape.devices, self.slices)
        self._times: dict[Mix, MixTimes] = {}
        self._most: dict[tuple[int, bool, bool], int] = {}

    # ---- time ------------------------------------------------------------------------------------------------

    def layer_s(self, load: StepLoad) -> float:
        """Seconds of one layer: its slowest rank, before each of its two all-reduces."""
        attention = mlp = 0.0
        for work in self._work:
            gemm = max(load.tokens * work.attn_gemm_s_token, work.attn_weights_s)
            core = max(load.attended * work.core_s_attended, load.kv_read * work.core_s_kv_read)
            attention = max(attention, gemm + core)
            mlp = max(mlp, load.tokens * work.mlp_gemm_s_token, work.mlp_weights_s)
        figures = self.figures
        device = max(attention + mlp, figures.layer_launch_s)
        software = figures.layer_overhead_s + load.sequences * figures.sequence_layer_s
        return device + software + 2 * self.all_reduce_s(load.tokens)

    def fixed_s(self, load: StepLoad, embeds: bool, samples: bool) -> float:
        """Seconds of a step beside its layers: software, embedding, output head and sampling."""
        figures = self.figures
        seconds = figures.step_s
        if embeds:
            seconds += figures.batching_s + self.all_reduce_s(load.tokens)
        if samples and load.samples > 0:
            head = max(max(load.samples * w.head_gemm_s_row, w.head_weights_s) for w in self._work)
            seconds += head + load.samples * figures.sample_row_s
            if self.shape.width > 1:
                link = self.shape.link
                exchanged = load.samples * _CANDIDATE_BYTES * (self.shape.width - 1)
                seconds += (self.shape.width - 1) * link.latency_s + exchanged / link.bandwidth_bytes_s
        return seconds

    def step_s(self, layers: int, load: StepLoad, embeds: bool, samples: bool) -> float:
        return self.fixed_s(load, embeds, samples) + layers * self.layer_s(load)

    def times(self, mix: Mix) -> MixTimes:
        """The stage under a route's steady mix of steps; remembered."""
        found = self._times.get(mix)
        if found is None:
            mixed = [self.fixed_s(mix.mixed, embeds, samples) for embeds, samples in _ENDS]
            plain = [self.fixed_s(mix.plain, embeds, samples) for embeds, samples in _ENDS]
            mean = [p + mix.mixed_share * (m - p) for p, m in zip(plain, mixed, strict=True)]
            found = self._times[mix] = MixTimes(
                mix.mean_s(self.layer_s),
                self.layer_s(mix.mixed),
                (mean[0], mean[1], mean[2], mean[3]),
                (mixed[0], mixed[1], mixed[2], mixed[3]),
            )
        return found

    def all_reduce_s(self, tokens: float) -> float:
        """The faster of ring (2(w-1) steps, 2(w-1)/w of the bytes: Patarasuk & Yuan 2009, section 3) and tree."""
        width = self.shape.width
        if width == 1 or tokens <= 0:
            return 0.0
        link = self.shape.link
        bandwidth = link.bandwidth_bytes_s * self.figures.link_share
        size = tokens * self._model.hidden_size * DTYPE_BYTES[self._dtype]
        ring = 2 * (width - 1) * link.latency_s + 2 * (width - 1) / width * size / bandwidth
        depth = math.ceil(math.log2(width))
        tree = 2 * depth * link.latency_s + 2 * size / bandwidth
        return self.figures.all_reduce_s + min(ring, tree)

    # ---- bytes -----------------------------------------------------------------------------------------------

    def kv_tokens(self, layers: int, embeds: bool, samples: bool) -> int:
        """Tokens of KV that fit beside ``layers`` layers, in whole pages; 0 where the weights alone do not fit."""
        page = self._engine.page_size
        tokens = min(rank.room(layers, embeds, samples) // rank.kv_token(layers) for rank in self._bytes)
        return max(0, tokens // page * page)

    def max_layers(self, kv_tokens: int, embeds: bool, samples: bool) -> int:
        """The most layers that fit with room for ``kv_tokens`` tokens each; remembered."""
        key = (kv_tokens, embeds, samples)
        found = self._most.get(key)
        if found is None:
            found = self._most[key] = self._max_layers(kv_tokens, embeds, samples)
        return found

    def _max_layers(self, kv_tokens: int, embeds: bool, samples: bool) -> int:
        return min(
            max(0, (rank.room(0, embeds, samples) - kv_tokens * rank.kv_token(0)) // rank.layer_bytes(kv_tokens))
            for rank in self._bytes
        )

    def missing_bytes(self, layers: int, kv_tokens: int, embeds: bool, samples: bool) -> int:
        """Bytes by which the fullest rank exceeds its memory (negative: what is left)."""
        return max(kv_tokens * rank.kv_token(layers) - rank.room(layers, embeds, samples) for rank in self._bytes)


@dataclass(frozen=True, slots=True)
class _RankBytes:
    usable: int
    fixed: dict[tuple[bool, bool], int]  # (embeds, samples) -> embedding, head and buffers
    weights_layer: int
    kv_layer: int  # of one token
    extra_layers: int  # room for the copies that attention gathers, in layers

    def kv_token(self, layers: int) -> int:
        """Bytes that one token of KV takes."""
        return self.kv_layer * (layers + self.extra_layers)

    def layer_bytes(self, kv_tokens: int) -> int:
        return self.weights_layer + self.kv_layer * kv_tokens

    def room(self, layers: int, embeds: bool, samples: bool) -> int:
        """Bytes left for KV."""
        return self.usable - self.fixed[embeds, samples] - layers * self.weights_layer


def _distinct_bytes(
    model: ModelSpec,
    dtype: DType,
    engine: EngineOptions,
    devices: Sequence[DeviceType],
    slices: Sequence[RankSlice],
) -> tuple[_RankBytes, ...]:
    ranks: list[_RankBytes] = []
    for device, part in dict.fromkeys(zip(devices, slices, strict=True)):
        fixed = {
            (embeds, samples): rank_weights_bytes(model, dtype, 0, part, embeds, samples)
            + rank_buffers_bytes(model, dtype, part, engine.token_budget, engine.max_sequences, samples)
            for embeds in (False, True)
            for samples in (False, True)
        }
        layer = rank_weights_bytes(model, dtype, 1, part, False, False) - rank_weights_bytes(
            model, dtype, 0, part, False, False
        )
        kv = rank_kv_bytes_per_token(model, dtype, 1, part)
        extra = 0 if device.kind == "cpu" else GPU_GATHER_LAYERS
        ranks.append(_RankBytes(usable_bytes(device), fixed, layer, kv, extra))
    return tuple(ranks)


def _rank_work(model: ModelSpec, dtype: DType, device: DeviceType, part: RankSlice) -> _RankWork:
    """Roofline of one rank: Williams et al. 2009; a multiply-add is two FLOPs."""
    figures = figures_of(device)
    peak = flops_of(device, dtype)
    gemm, stream = peak * figures.compute_share, device.bandwidth_bytes_s * figures.bandwidth_share
    core = peak * figures.attention_compute_share
    gather = device.bandwidth_bytes_s * figures.attention_bandwidth_share
    size = DTYPE_BYTES[dtype]
    q, kv = part.n_query_heads * model.head_dim, part.n_kv_heads * model.head_dim
    attention = model.hidden_size * (2 * q + 2 * kv)
    mlp = 3 * model.hidden_size * part.n_columns
    head = model.hidden_size * part.n_vocab
    return _RankWork(
        attn_gemm_s_token=2 * attention / gemm,
        attn_weights_s=attention * size / stream,
        core_s_attended=4 * q / core,
        core_s_kv_read=2 * kv * size / gather,
        mlp_gemm_s_token=2 * mlp / gemm,
        mlp_weights_s=mlp * size / stream,
        head_gemm_s_row=2 * head / gemm,
        head_weights_s=head * size / stream,
    )
