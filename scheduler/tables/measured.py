"""A measured table: seconds of one layer on this cluster's own devices, over a small grid of loads.

A step's prompts and its decodes are looked up apart and add up, as the engine works through them. Between the
grid's points times are linear along each axis; beyond the last point they go on with the last slope, before the
first they stay (a smaller load still reads the weights and launches the kernels).

What was measured on one device stands for a type. A device of that type with another peak (another `speed` of the
same CPU) takes times in proportion. A group that nobody measured, wider or of unlike devices, takes the roofline's
times, corrected by what measured times are of the roofline's on each of its devices alone: else a search would
prefer what was not measured wherever the roofline is the kinder of the two.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten

from hexgen.cluster import DeviceType, Link, Node
from hexgen.errors import SpecError
from hexgen.model import DTYPE_BYTES, DType, ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.cost import EdgeCost, GroupShape, StageProfile
from hexgen.scheduler.figures import flops_of
from hexgen.scheduler.tables.source import equal_devices, meant_by
from hexgen.scheduler.traffic import StepLoad

log = logging.getLogger("hexgen.scheduler")
SAME_PEAK = 1.02  # peaks that differ by less are one


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
class Curve:
    """``seconds[i]`` at ``across[i]`` (tokens, or sequences)."""

    across: tuple[float, ...]  # rising
    seconds: tuple[float, ...]

    def at(self, across: float) -> float:
        return _along(self.across, self.seconds, across)


@dataclass(frozen=True, slots=True)
class MeasuredEntry:
    """One stage as it was measured: so many equal devices, one dtype, one shape of layer."""

    device: str
    width: int
    dtype: DType
    layer: LayerShape
    versions: Mapping[str, str]  # of libraries
    prefill: Grid
    decode: Grid
    step_s: float | None = None  # software of a step; None: the catalogue's
    kv_token_layers: tuple[int, ...] = ()  # by layers, from one; empty: by `hexgen.memory`
    peak_flops: float | None = None  # of one device in ``dtype``, as the cluster file had it; None: not said
    step: Curve | None = None  # by sequences, instead of `step_s`
    embed: Curve | None = None  # by tokens; None: the roofline's
    sample: Curve | None = None  # by rows of logits: head and sampling; None: the roofline's
    batching: Curve | None = None  # by sequences: forming the batch and answering; None: the catalogue's
    passing: Curve | None = None  # by sequences: taking a step from another stage and passing it on; None: nothing


@dataclass(frozen=True)  # no slots: what is found is kept
class MeasuredTable:
    """The file ``where``, read and checked. Of several entries for the same stage the last counts."""

    where: str
    title: str
    entries: tuple[MeasuredEntry, ...]
    hop_s: float | None = None  # software of a message between stages; None: the catalogue's
    _found: dict[tuple[object, ...], MeasuredEntry | None] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    _said: set[str] = field(init=False, repr=False, compare=False, default_factory=set)

    @property
    def source(self) -> str:
        title = shorten(self.title, 100)
        return f"measured table {Path(self.where).name}: {title}; the catalogue for what it lacks"

    @property
    def holds_kv(self) -> bool:
        return False

    def check(self, model: ModelSpec, nodes: Sequence[Node], dtype: DType | None = None) -> None:
        shape = layer_shape(model)
        types = {node.device.name: node.device for node in nodes}
        of_model = [entry for entry in self.entries if entry.layer == shape]
        lacking = sorted(name for name in types if not meant_by(name, [entry.device for entry in of_model]))
        if len(lacking) == len(types):
            had = sorted({f"{e.device} ({e.layer.hidden_size} wide layers)" for e in self.entries})
            raise SpecError(
                f"has no figures for {model.name} on {', '.join(sorted(types))}; it has {', '.join(had)}",
                where=self.where,
                remedy="measure this model here, or plan without --cost",
            )
        if dtype is not None and all(entry.dtype != dtype for entry in of_model):
            had = sorted({entry.dtype for entry in of_model})
            raise SpecError(
                f"has {model.name} in {', '.join(had)}, and the plan computes in {dtype}",
                where=self.where,
                remedy=f"measure with `hexgen discover --model ... --dtype {dtype}`, or plan without --cost",
            )
        if lacking:
            self._warn(f"no figures for {', '.join(lacking)}: the catalogue's are taken there")
        with_torch = {_public(entry.versions["torch"]) for entry in of_model if "torch" in entry.versions}
        if with_torch and _INSTALLED not in (None, *with_torch):
            measured_with = ", ".join(sorted(with_torch))
            self._warn(f"measured with torch {measured_with}, and here is {_INSTALLED}: measure again")

    def _warn(self, text: str) -> None:
        """Once: a plan is checked against its table more than once."""
        if text not in self._said:
            self._said.add(text)
            log.warning("%s: %s", self.where, text)

    def entry(self, device: DeviceType, width: int, model: ModelSpec, dtype: DType) -> MeasuredEntry | None:
        """The entry for ``width`` such devices: the type by name, then the nearest peak, then the last."""
        key = (device, width, layer_shape(model), dtype)
        if key not in self._found:
            fitting = [e for e in self.entries if e.width == width and e.dtype == dtype and e.layer == key[2]]
            names = meant_by(device.name, [entry.device for entry in fitting])
            named = [entry for entry in reversed(fitting) if entry.device in names]
            peak = flops_of(device, dtype)
            self._found[key] = min(named, key=lambda e: (names.index(e.device), _apart(e, peak)), default=None)
        return self._found[key]

    def profile(
        self, number: int, shape: GroupShape, model: ModelSpec, dtype: DType, engine: EngineOptions
    ) -> StageProfile | None:
        device = equal_devices(shape)
        entry = self.entry(device, shape.width, model, dtype) if device is not None else None
        if entry is not None and device is not None:
            return MeasuredProfile(number, shape, model, dtype, engine, entry, _slower(entry, device, dtype))
        alone = []
        for one in dict.fromkeys(shape.devices):
            single = self.entry(one, 1, model, dtype)
            if single is not None:
                group = GroupShape((one,), shape.link)
                factor = _slower(single, one, dtype)
                measured = MeasuredProfile(number, group, model, dtype, engine, single, factor)
                alone.append((measured, StageProfile(number, group, model, dtype, engine)))
        return CorrectedProfile(number, shape, model, dtype, engine, tuple(alone)) if alone else None

    def edge(self, link: Link) -> EdgeCost | None:
        if self.hop_s is None or self._row_bytes is None:
            return None
        return EdgeCost(link.latency_s + self.hop_s, self._row_bytes / link.bandwidth_bytes_s)

    @cached_property
    def _row_bytes(self) -> int | None:
        """Of one token's hidden state; None where the table is of several models."""
        sizes = {entry.layer.hidden_size * DTYPE_BYTES[entry.dtype] for entry in self.entries}
        return sizes.pop() if len(sizes) == 1 else None


def _public(text: str) -> str:
    """A version without its build: 2.13.0 of 2.13.0+cpu."""
    return text.partition("+")[0]


def _torch_here() -> str | None:
    try:
        return _public(version("torch"))
    except PackageNotFoundError:
        return None


_INSTALLED = _torch_here()


def _apart(entry: MeasuredEntry, peak: float) -> float:
    return 0.0 if entry.peak_flops is None else max(entry.peak_flops / peak, peak / entry.peak_flops)


def _slower(entry: MeasuredEntry, device: DeviceType, dtype: DType) -> float:
    """How many times as long as measured this device takes, by their peaks."""
    if entry.peak_flops is None:
        return 1.0
    ratio = entry.peak_flops / flops_of(device, dtype)
    return 1.0 if 1 / SAME_PEAK <= ratio <= SAME_PEAK else ratio


class MeasuredProfile(StageProfile):
    """A stage by its own measurements; of embedding, head and sampling what was not measured is the roofline's."""

    __slots__ = ("_entry", "_factor")

    def __init__(
        self,
        number: int,
        shape: GroupShape,
        model: ModelSpec,
        dtype: DType,
        engine: EngineOptions,
        entry: MeasuredEntry,
        factor: float = 1.0,
    ) -> None:
        super().__init__(number, shape, model, dtype, engine)
        self._entry = entry
        self._factor = factor

    def layer_s(self, load: StepLoad) -> float:
        seconds = 0.0
        if load.prefill_tokens > 0:
            seen = load.prefill_attended / load.prefill_tokens
            seconds += self._entry.prefill.at(load.prefill_tokens, seen)
        decodes = load.tokens - load.prefill_tokens
        if decodes > 1e-9:
            seen = (load.attended - load.prefill_attended) / decodes
            seconds += self._entry.decode.at(decodes, seen)
        return seconds * self._factor

    def fixed_s(self, load: StepLoad, embeds: bool, samples: bool) -> float:
        entry, figures = self._entry, self.figures
        seconds = super().fixed_s(load, False, False) - figures.step_s + self.software_s(load)
        if embeds:
            seconds += self.batching_s(load)
            if entry.embed is not None:
                seconds += entry.embed.at(load.tokens) * self._factor
            else:
                seconds += super().fixed_s(load, True, False) - figures.step_s - figures.batching_s
        if entry.passing is not None and not (embeds and samples):
            seconds += entry.passing.at(load.sequences) * self._factor
        if samples and entry.sample is not None and load.samples > 0:
            seconds += entry.sample.at(load.samples) * self._factor
        elif samples:
            seconds += super().fixed_s(load, False, True) - figures.step_s
        return seconds

    def batching_s(self, load: StepLoad) -> float:
        """Of a first stage: forming the batch, and answering."""
        batching = self._entry.batching
        return self.figures.batching_s if batching is None else batching.at(load.sequences) * self._factor

    def software_s(self, load: StepLoad) -> float:
        """Of a step, beside layers, embedding and sampling."""
        entry = self._entry
        if entry.step is not None:
            return entry.step.at(load.sequences) * self._factor
        return self.figures.step_s if entry.step_s is None else entry.step_s * self._factor

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


class CorrectedProfile(StageProfile):
    """A group that was not measured: the roofline's arithmetic, times what measured is of roofline on its devices.

    All-reduces stay the model's own: a device alone makes none.
    """

    __slots__ = ("_alone",)

    def __init__(
        self,
        number: int,
        shape: GroupShape,
        model: ModelSpec,
        dtype: DType,
        engine: EngineOptions,
        alone: tuple[tuple[MeasuredProfile, StageProfile], ...],
    ) -> None:
        super().__init__(number, shape, model, dtype, engine)
        self._alone = alone  # of each measured type: as measured, and by the roofline

    def layer_s(self, load: StepLoad) -> float:
        by_roofline = super().layer_s(load)
        exchanged = 2 * self.all_reduce_s(load.tokens)
        worst = max(measured.layer_s(load) / roofline.layer_s(load) for measured, roofline in self._alone)
        return exchanged + (by_roofline - exchanged) * worst

    def fixed_s(self, load: StepLoad, embeds: bool, samples: bool) -> float:
        more = max(m.software_s(load) for m, _ in self._alone) - self.figures.step_s
        return super().fixed_s(load, embeds, samples) + more
