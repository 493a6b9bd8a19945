"""What a step costs: one model, called by search, evaluation, explanation and (later) simulation.

A stage is a `GroupShape`; `CostModel.profile` turns it into a `StageProfile` that knows two things: seconds of a
step (roofline of each rank, collectives, software), and bytes (by `hexgen.memory`, the engine's own arithmetic).
By the catalogue the time of a stage is linear in its layers, `fixed_s + layers * layer_s`; the search takes any
times that do not fall with layers (`hexgen.scheduler.times`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hexgen.cluster import DeviceType, Link
from hexgen.model import DTYPE_BYTES, DType, ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.figures import figures_of
from hexgen.scheduler.rank_bytes import distinct_bytes
from hexgen.scheduler.roofline import rank_work
from hexgen.scheduler.times import ENDS, MixTimes, StepTimes, end_index
from hexgen.scheduler.traffic import Mix, StepLoad
from hexgen.split import split_stage

if TYPE_CHECKING:
    from hexgen.scheduler.tables.source import CostTable

__all__ = ["CostModel", "EdgeCost", "GroupShape", "MixTimes", "StageProfile", "StepTimes", "end_index"]

_CANDIDATE_BYTES = 256 * 8  # per row of logits, what ranks exchange to sample: top candidates, not the vocabulary


@dataclass(frozen=True, slots=True)
class GroupShape:
    """A tensor-parallel group as the cost model sees it: which devices, joined by what, sharing how."""

    devices: tuple[DeviceType, ...]  # rank order
    link: Link  # the slowest among its ranks
    shares: tuple[float, ...] | None = None
    _hash: int = field(init=False, repr=False, compare=False)  # searches look shapes up millions of times

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.devices, self.link, self.shares)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        return GroupShape, (self.devices, self.link, self.shares)  # hashes of text differ between processes

    @property
    def width(self) -> int:
        return len(self.devices)


@dataclass(frozen=True, slots=True)
class EdgeCost:
    """A message from one stage to the next: ``delay_s + tokens * token_s``; the link is busy for the latter."""

    delay_s: float
    token_s: float


class CostModel:
    """Figures from the catalogue, or from ``table`` as far as it has any."""

    def __init__(
        self, model: ModelSpec, dtype: DType, engine: EngineOptions, table: CostTable | None = None
    ) -> None:
        self.model = model
        self.dtype: DType = dtype
        self.engine = engine
        self.table = table
        self._profiles: dict[GroupShape, StageProfile] = {}

    def profile(self, shape: GroupShape) -> StageProfile:
        """The stage that ``shape`` makes; equal shapes give the same object. Raises `SpecError` past the heads."""
        found = self._profiles.get(shape)
        if found is None:
            number = len(self._profiles)
            if self.table is not None:
                found = self.table.profile(number, shape, self.model, self.dtype, self.engine)
            if found is None:
                found = StageProfile(number, shape, self.model, self.dtype, self.engine)
            self._profiles[shape] = found
        return found

    def edge(self, sender: StageProfile, receiver: StageProfile, link: Link) -> EdgeCost:
        """Hidden states from ``sender`` to ``receiver`` over ``link``."""
        told = self.table.edge(link) if self.table is not None else None
        if told is not None:
            return told
        a, b = figures_of(sender.shape.devices[0]), figures_of(receiver.shape.devices[0])
        row_bytes = self.model.hidden_size * DTYPE_BYTES[self.dtype]
        share = min(a.link_share, b.link_share)
        return EdgeCost(link.latency_s + max(a.hop_s, b.hop_s), row_bytes / (link.bandwidth_bytes_s * share))

    def token_edge(self, sender: StageProfile, receiver: StageProfile, link: Link) -> EdgeCost:
        """Sampled tokens from the last stage back to the first: a few bytes each."""
        told = self.table.edge(link) if self.table is not None else None
        if told is not None:
            return EdgeCost(told.delay_s, 0.0)
        a, b = figures_of(sender.shape.devices[0]), figures_of(receiver.shape.devices[0])
        return EdgeCost(link.latency_s + max(a.hop_s, b.hop_s), 0.0)


class StageProfile:
    """Seconds and bytes of one group shape, by the catalogue's figures. Immutable but for its caches.

    ``linear``: `times` are `MixTimes`, and a step is `fixed_s` + layers x `layer_s`. Where another source of
    figures says otherwise, only `step_s` and `times` hold, and `layer_s` is a mean, good for ranking.
    """

    linear = True

    __slots__ = (
        "_bytes", "_dtype", "_engine", "_model", "_most", "_times", "_work", "figures", "id", "shape", "slices",
        "width",
    )  # fmt: skip

    def __init__(
        self, number: int, shape: GroupShape, model: ModelSpec, dtype: DType, engine: EngineOptions
    ) -> None:
        self.id = number
        self.shape = shape
        self.width = shape.width
        self.slices = split_stage(model, shape.width, shape.shares)
        self.figures = figures_of(shape.devices[0])
        self._model, self._dtype, self._engine = model, dtype, engine
        ranks = sorted(set(zip(shape.devices, self.slices, strict=True)), key=repr)
        self._work = tuple(rank_work(model, dtype, device, part) for device, part in ranks)
        self._bytes = distinct_bytes(model, dtype, engine, shape.devices, self.slices)
        self._times: dict[Mix, StepTimes] = {}
        self._most: dict[tuple[int, bool, bool], int] = {}

    # ---- time ------------------------------------------------------------------------------------------------

    def layer_s(self, load: StepLoad) -> float:
        """Seconds of one layer: its slowest rank, before each of its two all-reduces."""
        # Called for every step of a simulation: conditions, where `max` would take as long again.
        tokens = load.tokens
        prompts_attended, prompts_read = load.prefill_attended, load.prefill_kv_read
        attended, read = load.attended - prompts_attended, load.kv_read - prompts_read
        attention = mlp = 0.0
        for work in self._work:
            projection = tokens * work.projection_s_token
            if projection < work.projection_weights_s:
                projection = work.projection_weights_s
            # Attention itself: bound by arithmetic where many tokens see the same keys, else by reading them.
            core, reading = prompts_attended * work.core_s_attended, prompts_read * work.core_s_kv_read
            if core < reading:
                core = reading
            decodes, reading = attended * work.core_s_attended, read * work.core_s_kv_read
            core += decodes if decodes > reading else reading
            rank_s = projection + core + tokens * work.attention_elementwise_s_token
            if rank_s > attention:
                attention = rank_s
            products = tokens * work.mlp_s_token
            if products < work.mlp_weights_s:
                products = work.mlp_weights_s
            rank_s = products + tokens * work.mlp_elementwise_s_token
            if rank_s > mlp:
                mlp = rank_s
        figures = self.figures
        device = attention + mlp
        if device < figures.layer_launch_s:
            device = figures.layer_launch_s
        software = figures.layer_overhead_s + load.sequences * figures.sequence_layer_s
        return device + software + (2 * self.all_reduce_s(tokens) if self.width > 1 else 0.0)

    def fixed_s(self, load: StepLoad, embeds: bool, samples: bool) -> float:
        """Seconds of a step beside its layers: software, embedding, output head and sampling."""
        figures = self.figures
        seconds = figures.step_s
        if embeds:
            row_s = 0.0
            for work in self._work:
                if work.embedding_s_token > row_s:
                    row_s = work.embedding_s_token
            seconds += figures.batching_s + load.tokens * row_s + self.all_reduce_s(load.tokens)
        if samples and load.samples > 0:
            head = 0.0
            for work in self._work:
                rows = load.samples * work.head_s_row
                if rows > head:
                    head = rows
                if work.head_weights_s > head:
                    head = work.head_weights_s
            seconds += head + load.samples * figures.sample_row_s
            if self.width > 1:
                link = self.shape.link
                exchanged = load.samples * _CANDIDATE_BYTES * (self.width - 1)
                seconds += (self.width - 1) * link.latency_s + exchanged / link.bandwidth_bytes_s
        return seconds

    def step_s(self, layers: int, load: StepLoad, embeds: bool, samples: bool) -> float:
        return self.fixed_s(load, embeds, samples) + layers * self.layer_s(load)

    def times(self, mix: Mix) -> StepTimes:
        """The stage under a route's steady mix of steps; remembered."""
        found = self._times.get(mix)
        if found is None:
            found = self._times[mix] = self._mix_times(mix)
        return found

    def flow_tokens_s(self, layers: int, mix: Mix, end: int) -> float:
        """Tokens/s, prompt and output alike, of a stage that is never short of steps like these."""
        return mix.mean_tokens / self.times(mix).busy_s(layers, end)

    def _mix_times(self, mix: Mix) -> StepTimes:
        mixed = [self.fixed_s(mix.mixed, embeds, samples) for embeds, samples in ENDS]
        plain = [self.fixed_s(mix.plain, embeds, samples) for embeds, samples in ENDS]
        mean = [p + mix.held_share * (m - p) for p, m in zip(plain, mixed, strict=True)]
        return MixTimes(
            mix.mean_s(self.layer_s),
            self.layer_s(mix.mixed),
            (mean[0], mean[1], mean[2], mean[3]),
            (mixed[0], mixed[1], mixed[2], mixed[3]),
        )

    def all_reduce_s(self, tokens: float) -> float:
        """The faster of ring (2(w-1) steps, 2(w-1)/w of the bytes: Patarasuk & Yuan 2009, section 3) and tree."""
        width = self.width
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
