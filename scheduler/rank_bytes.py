"""Bytes of a stage's ranks as the search asks for them: by `hexgen.memory`, the engine's own arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.cluster import DeviceType
from hexgen.memory import (
    GPU_GATHER_LAYERS,
    rank_buffers_bytes,
    rank_kv_bytes_per_token,
    rank_weights_bytes,
    usable_bytes,
)
from hexgen.model import DType, ModelSpec
from hexgen.plan import EngineOptions
from hexgen.split import RankSlice


@dataclass(frozen=True, slots=True)
class RankBytes:
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


def distinct_bytes(
    model: ModelSpec,
    dtype: DType,
    engine: EngineOptions,
    devices: Sequence[DeviceType],
    slices: Sequence[RankSlice],
) -> tuple[RankBytes, ...]:
    ranks: list[RankBytes] = []
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
        ranks.append(RankBytes(usable_bytes(device), fixed, layer, kv, extra))
    return tuple(ranks)
