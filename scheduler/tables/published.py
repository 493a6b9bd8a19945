"""A published table: tokens/s of one machine that holds n layers, and the KV room it then has (Helix, ASPLOS'25).

Helix profiles machines so (the cost tables of its artifact). Prompt and output tokens count alike. A step of T
tokens on n layers takes the longer of T / rate(n) and the time to read n layers' weights once: no faster than
published, and never faster than memory allows, which is what makes small batches slow.
"""

from __future__ import annotations

from bisect import bisect_left
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
from hexgen.scheduler.times import StepTimes, TabledTimes
from hexgen.scheduler.traffic import Mix, StepLoad


@dataclass(frozen=True, slots=True)
class PublishedType:
    """One machine. Both rows by layers held, from one; neither grows (the reader sees to it)."""

    tokens_s: tuple[float, ...]
    kv_token_layers: tuple[int, ...]  # tokens x layers of KV that fit beside so many layers

    @property
    def max_layers(self) -> int:
        return len(self.tokens_s)


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """The file ``where``, read and checked."""

    where: str
    title: str  # who measured what
    model: str
    layers: int
    activation_bytes: float  # of one token, between stages
    layer_bytes: float
    types: Mapping[str, PublishedType]

    @property
    def source(self) -> str:
        return f"published table {Path(self.where).name}: {shorten(self.title, 100)}"

    @property
    def holds_kv(self) -> bool:
        return True

    def check(self, model: ModelSpec, nodes: Sequence[Node], dtype: DType | None = None) -> None:
        if model.layers != self.layers:
            raise SpecError(
                f"the figures are for {self.model} with {self.layers} layers, and {model.name} has {model.layers}",
                where=self.where,
                remedy="give the table's model, or a table of this model",
            )
        for node in nodes:
            if all(self._entry_name(node.device.name, width) is None for width in range(1, node.count + 1)):
                raise SpecError(
                    f"has no figures for {node.device.name} (node {node.name}); it has {', '.join(self.types)}",
                    where=self.where,
                    remedy="add the type to the table, or leave these nodes out of the cluster",
                )

    def entry(self, shape: GroupShape) -> PublishedType | None:
        """The figures of a stage: of one device, or of ``NAMExWIDTH``, a machine that was profiled as one unit."""
        device = equal_devices(shape)
        name = self._entry_name(device.name, shape.width) if device is not None else None
        return self.types[name] if name is not None else None

    def _entry_name(self, device: str, width: int) -> str | None:
        if width == 1:
            return find_type(device, [name for name in self.types if _width(name) == 1])
        units = {name.rpartition("x")[0]: name for name in self.types if _width(name) == width}
        found = find_type(device, list(units))
        return units[found] if found is not None else None

    def profile(
        self, number: int, shape: GroupShape, model: ModelSpec, dtype: DType, engine: EngineOptions
    ) -> StageProfile:
        return PublishedProfile(number, shape, model, dtype, engine, self)

    def edge(self, link: Link) -> EdgeCost:
        return EdgeCost(link.latency_s, self.activation_bytes / link.bandwidth_bytes_s)


def _width(name: str) -> int:
    """``L4x2`` is two L4 profiled as one; any other name is one device."""
    before, _, width = name.rpartition("x")
    return int(width) if before and width.isdigit() else 1


class PublishedProfile(StageProfile):
    """A stage by a published table. What the table lacks holds no layers."""

    __slots__ = ("_kv", "_rates", "_weights_s")

    linear = False

    def __init__(
        self,
        number: int,
        shape: GroupShape,
        model: ModelSpec,
        dtype: DType,
        engine: EngineOptions,
        table: PublishedTable,
    ) -> None:
        super().__init__(number, shape, model, dtype, engine)
        entry = table.entry(shape)
        self._rates = entry.tokens_s if entry else ()
        self._kv = entry.kv_token_layers if entry else ()
        stream = sum(device.bandwidth_bytes_s for device in shape.devices) * self.figures.bandwidth_share
        self._weights_s = table.layer_bytes / stream  # of one layer

    @property
    def most_layers(self) -> int:
        return len(self._rates)

    def rate_tokens_s(self, layers: int) -> float:
        """Published tokens/s, prompt and output alike, of this stage holding ``layers``; 0 where it cannot."""
        return self._rates[layers - 1] if 1 <= layers <= len(self._rates) else 0.0

    def flow_tokens_s(self, layers: int, mix: Mix, end: int) -> float:
        return self.rate_tokens_s(layers)

    def layer_s(self, load: StepLoad) -> float:
        """A mean, for ranking: half of what the device could hold, by layer."""
        layers = max(1, self.most_layers // 2)
        return self.step_s(layers, load, False, False) / layers

    def fixed_s(self, load: StepLoad, embeds: bool, samples: bool) -> float:
        return 0.0  # whatever a step costs is in the rate

    def step_s(self, layers: int, load: StepLoad, embeds: bool, samples: bool) -> float:
        rate = self.rate_tokens_s(layers)
        return max(load.tokens / rate, layers * self._weights_s) if rate > 0 else float("inf")

    def _mix_times(self, mix: Mix) -> StepTimes:
        layers = range(1, self.most_layers + 1)
        plain = [self.step_s(n, mix.plain, False, False) for n in layers]
        mixed = [self.step_s(n, mix.mixed, False, False) for n in layers]
        mean = (p + mix.mixed_share * (m - p) for p, m in zip(plain, mixed, strict=True))
        return TabledTimes((0.0, *mean), (0.0, *mixed))

    def kv_tokens(self, layers: int, embeds: bool, samples: bool) -> int:
        """The table's room, where the engine would have any room at all."""
        if not 1 <= layers <= self._servable(embeds, samples):
            return 0
        page = self._engine.page_size
        return self._kv[layers - 1] // layers // page * page

    def _max_layers(self, kv_tokens: int, embeds: bool, samples: bool) -> int:
        # Negated, the room per layer grows: the first that is too little is found by bisection.
        most = self._servable(embeds, samples)
        return bisect_left(range(1, most + 1), True, key=lambda n: self.kv_tokens(n, embeds, samples) < kv_tokens)

    def _servable(self, embeds: bool, samples: bool) -> int:
        """The table's layers, as far as `hexgen.memory` lets a worker hold them: a plan must start."""
        return min(self.most_layers, super()._max_layers(self._engine.page_size, embeds, samples))
