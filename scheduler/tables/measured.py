"""A measured table: seconds of one layer on this cluster's own devices, over a small grid of loads.

A step's prompts and its decodes are looked up apart and add up, as the engine works through them. Between the
grid's points times are linear along each axis; beyond the last point they go on with the last slope, before the
first they stay (a smaller load still reads the weights and launches the kernels).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from hexgen.cluster import Link, Node
from hexgen.errors import SpecError
from hexgen.model import DType, ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.cost import EdgeCost, GroupShape, StageProfile
from hexgen.scheduler.tables.source import equal_devices, find_type
from hexgen.scheduler.traffic import StepLoad


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What of a model decides one layer's time."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int


def layer_shape(model: ModelSpec) -> LayerShape:
    return LayerShape(model.hidden_size, model.heads, model.kv_heads, model.head_dim, model.intermediate_size)


@dataclass(frozen=True, slots=True)
class Grid:
    """``seconds[i][j]`` of one layer under ``across[i]`` (tokens, or sequences) and ``context[j]`` tokens seen."""

    across: tuple[float, ...]  # rising
    context: tuple[float, ...]  # rising
    seconds: tuple[tuple[float, ...], ...]

    def at(self, across: float, context: float) -> float:
        row, share = _between(self.across, across)
        low = _along(self.context, self.seconds[row], context)
        if share == 0.0:
            return low
        return max(low, low + share * (_along(self.context, self.seconds[row + 1], context) - low))


def _between(axis: Sequence[float], value: float) -> tuple[int, float]:
    """The index to the left, and how far towards the next: above 1 beyond the end, 0 before the first."""
    if len(axis) == 1 or value <= axis[0]:
        return 0, 0.0
    i = min(bisect_right(axis, value) - 1, len(axis) - 2)
    return i, (value - axis[i]) / (axis[i + 1] - axis[i])


def _along(axis: Sequence[float], values: Sequence[float], value: float) -> float:
    i, share = _between(axis, value)
    return values[i] if share == 0.0 else max(0.0, values[i] + share * (values[i + 1] - values[i]))


@dataclass(frozen=True, slots=True)
class MeasuredEntry:
    """One stage as it was measured: so many equal devices, one dtype, one shape of layer."""

    device: str
    width: int
    dtype: DType
    layer: LayerShape
    versions: Mapping[str, str]  # of libraries, for people
    prefill: Grid
    decode: Grid
    step_s: float | None = None  # software of a step; None: the catalogue's
    kv_token_layers: tuple[int, ...] = ()  # by layers, from one; empty: by `hexgen.memory`


@dataclass(frozen=True, slots=True)
class MeasuredTable:
    """The file ``where``, read and checked. Of several entries for the same stage the last counts."""

    where: str
    title: str
    entries: tuple[MeasuredEntry, ...]

    @property
    def source(self) -> str:
        title = shorten(self.title, 100)
        return f"measured table {Path(self.where).name}: {title}; the catalogue for what it lacks"

    @property
    def holds_kv(self) -> bool:
        return False

    def check(self, model: ModelSpec, nodes: Sequence[Node]) -> None:
        shape = layer_shape(model)
        ours = [entry for entry in self.entries if entry.layer == shape]
        types = {node.device.name for node in nodes}
        if not any(find_type(name, [entry.device for entry in ours]) for name in types):
            had = sorted({f"{e.device} ({e.layer.hidden_size} wide layers)" for e in self.entries})
            raise SpecError(
                f"has no figures for {model.name} on {', '.join(sorted(types))}; it has {', '.join(had)}",
                where=self.where,
                remedy="measure this model here, or plan without --cost",
            )

    def entry(self, shape: GroupShape, model: ModelSpec, dtype: DType) -> MeasuredEntry | None:
        device = equal_devices(shape)
        if device is None:
            return None
        wanted = layer_shape(model)
        fitting = [e for e in self.entries if e.width == shape.width and e.dtype == dtype and e.layer == wanted]
        name = find_type(device.name, list(dict.fromkeys(entry.device for entry in fitting)))
        return next((entry for entry in reversed(fitting) if entry.device == name), None)

    def profile(
        self, number: int, shape: GroupShape, model: ModelSpec, dtype: DType, engine: EngineOptions
    ) -> StageProfile | None:
        entry = self.entry(shape, model, dtype)
        return None if entry is None else MeasuredProfile(number, shape, model, dtype, engine, entry)

    def edge(self, link: Link) -> EdgeCost | None:
        return None


class MeasuredProfile(StageProfile):
    """A stage by its own measurements; embedding, head and sampling stay the roofline's."""

    __slots__ = ("_entry",)

    def __init__(
        self,
        number: int,
        shape: GroupShape,
        model: ModelSpec,
        dtype: DType,
        engine: EngineOptions,
        entry: MeasuredEntry,
    ) -> None:
        super().__init__(number, shape, model, dtype, engine)
        self._entry = entry

    def layer_s(self, load: StepLoad) -> float:
        seconds = 0.0
        if load.prefill_tokens > 0:
            seen = load.prefill_attended / load.prefill_tokens
            seconds += self._entry.prefill.at(load.prefill_tokens, seen)
        decodes = load.tokens - load.prefill_tokens
        if decodes > 1e-9:
            seen = (load.attended - load.prefill_attended) / decodes
            seconds += self._entry.decode.at(decodes, seen)
        return seconds

    def fixed_s(self, load: StepLoad, embeds: bool, samples: bool) -> float:
        fixed = super().fixed_s(load, embeds, samples)
        return fixed if self._entry.step_s is None else fixed - self.figures.step_s + self._entry.step_s

    def kv_tokens(self, layers: int, embeds: bool, samples: bool) -> int:
        """The engine's own room, or what was measured where that is less."""
        room = super().kv_tokens(layers, embeds, samples)
        held = self._entry.kv_token_layers
        if not held:
            return room
        page = self._engine.page_size
        return min(room, held[layers - 1] // layers // page * page) if 1 <= layers <= len(held) else 0

    def _max_layers(self, kv_tokens: int, embeds: bool, samples: bool) -> int:
        most = super()._max_layers(kv_tokens, embeds, samples)
        held = self._entry.kv_token_layers
        if held:
            most = min(most, len(held))
            while most > 0 and self.kv_tokens(most, embeds, samples) < kv_tokens:
                most -= 1
        return most
