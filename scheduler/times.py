"""Seconds of a stage's steps by how many layers it holds: linear where a roofline says so, else a table.

What division of layers, pipelines and searches ask of a stage is only this. ``end`` is
`end_index(embeds, samples)`: the first stage of a route also embeds, and the last samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

ENDS = ((False, False), (False, True), (True, False), (True, True))


def end_index(embeds: bool, samples: bool) -> int:
    return 2 * embeds + samples


class StepTimes(Protocol):
    """A stage under one mix of steps. Both times are non-decreasing in ``layers`` (at least 1)."""

    def busy_s(self, layers: int, end: int) -> float:
        """Seconds of a mean step."""
        ...

    def mixed_s(self, layers: int, end: int) -> float:
        """Seconds of a step that also carries a chunk of prompt."""
        ...


@dataclass(frozen=True, slots=True)
class MixTimes:
    """Linear: ``fixed[end] + layers * layer``."""

    layer_s: float
    mixed_layer_s: float
    fixed_s: tuple[float, float, float, float]
    mixed_fixed_s: tuple[float, float, float, float]

    def busy_s(self, layers: int, end: int) -> float:
        return self.fixed_s[end] + layers * self.layer_s

    def mixed_s(self, layers: int, end: int) -> float:
        return self.mixed_fixed_s[end] + layers * self.mixed_layer_s


@dataclass(frozen=True, slots=True)
class TabledTimes:
    """One figure for each number of layers, the same at every place of a route; more layers do not fit."""

    busy: tuple[float, ...]  # by layers, from 0
    mixed: tuple[float, ...]

    def busy_s(self, layers: int, end: int) -> float:
        return self.busy[layers]

    def mixed_s(self, layers: int, end: int) -> float:
        return self.mixed[layers]
