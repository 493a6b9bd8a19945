"""How long each type of group takes for n layers, under so many stages and so many sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.columns.classes import Classes
from hexgen.scheduler.cost import StageProfile, end_index
from hexgen.scheduler.layers import tokens_for
from hexgen.scheduler.times import MixTimes
from hexgen.scheduler.traffic import Mix, Traffic, best_mix, mix_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_NO_LESS = 1 + 1e-12  # times a cycle: rounding takes no layer
_LINEAR = 1e-9  # relative: second differences below it are rounding


@dataclass(frozen=True, slots=True)
class Load:
    """Seconds of a mean step; ``inf`` where the layers do not fit beside the sequences' KV."""

    value: float  # tokens/s times cycle seconds
    tokens: float  # of a mean step
    in_flight: float
    middle: Floats  # [types, layers + 1]: of a stage inside the pipeline
    first: Floats  # [types, layers + 1]: of the first stage
    last: Floats  # [types, layers + 1]: of the last stage
    only: Floats  # [types]: of all layers on one stage
    slope_s: Floats | None  # [types]: of one layer more, where all are linear
    exact: bool  # nothing is gained by telling the numbers of sequences apart


def make_load(
    classes: Classes, traffic: Traffic, layers: int, depth: int, low: int, high: int, *, limited: bool
) -> Load | None:
    """Optimistic for every number of sequences from ``low`` to ``high``; None where nothing fits.

    Memory is that of the fewest. With the same layers a pipeline never serves less for having more sequences (a
    step's seconds grow no faster than its sequences: weights are read once), so times and value are those of the
    most (but see `best_mix`). Under ``limited``, where fewer sequences keep limits that more break, times are
    those of the fewest.
    """
    most = mix_of(traffic, float(high), depth)
    mix = mix_of(traffic, float(low), depth) if limited else best_mix(traffic, low, high, depth)
    tokens = tokens_for(low, traffic)
    rows: dict[int, tuple[Floats, Floats, Floats, float]] = {}
    for group in classes.types:
        if group.profile.id not in rows:
            rows[group.profile.id] = _rows(group.profile, mix, tokens, layers)
    chosen = [rows[group.profile.id] for group in classes.types]
    middle, first, last = (np.array([row[i] for row in chosen]) for i in range(3))
    only = np.array([row[3] for row in chosen])
    if not np.isfinite(only if depth == 1 else middle).any():
        return None
    return Load(
        value=most.running / (most.cycles * most.steps_in_flight) * traffic.output,
        tokens=mix.mean_tokens,
        in_flight=mix.steps_in_flight,
        middle=middle,
        first=first,
        last=last,
        only=only,
        slope_s=_slopes(middle),
        exact=not limited and _same_room(classes, traffic, layers, low, high),
    )


def _same_room(classes: Classes, traffic: Traffic, layers: int, low: int, high: int) -> bool:
    """Whether memory tells none of these numbers of sequences apart."""
    fewest, most = tokens_for(low, traffic), tokens_for(high, traffic)
    profiles = {group.profile.id: group.profile for group in classes.types}.values()
    ends = ((False, False), (True, False), (False, True), (True, True))
    return all(
        min(layers, profile.max_layers(fewest, *end)) == min(layers, profile.max_layers(most, *end))
        for profile in profiles
        for end in ends
    )


def _rows(profile: StageProfile, mix: Mix, tokens: int, layers: int) -> tuple[Floats, Floats, Floats, float]:
    times = profile.times(mix)

    def row(embeds: bool, samples: bool) -> Floats:
        found = np.full(layers + 1, np.inf)
        fits = min(layers, profile.max_layers(tokens, embeds, samples))
        end = end_index(embeds, samples)
        if isinstance(times, MixTimes):
            found[1 : fits + 1] = times.fixed_s[end] + np.arange(1, fits + 1) * times.layer_s
        else:
            found[1 : fits + 1] = [times.busy_s(n, end) for n in range(1, fits + 1)]
        return found

    whole = profile.max_layers(tokens, True, True) >= layers
    only = times.busy_s(layers, end_index(True, True)) if whole else math.inf
    return row(False, False), row(True, False), row(False, True), only


def _slopes(middle: Floats) -> Floats | None:
    """Seconds of one layer more; None where some type's times are not linear in its layers."""
    slopes = np.zeros(len(middle))
    for i, row in enumerate(middle):
        steps = np.diff(row[np.isfinite(row)])
        if len(steps) and np.ptp(steps) > _LINEAR * steps.max():
            return None
        slopes[i] = steps[0] if len(steps) else 0.0
    return slopes


def layers_within(seconds: Floats, cycles: Floats) -> Floats:
    """The most layers of each type whose step takes at most each of ``cycles`` seconds: [types, cycles]."""
    counts = [np.searchsorted(row[1:], cycles * _NO_LESS, side="right") for row in seconds]
    return np.array(counts, dtype=np.float64)


def layers_within_each(seconds: Floats, cycles: Floats) -> Ints:
    """The same for cycles in ascending order: [types, cycles]."""
    # Where each row's seconds stand among the cycles says the same with few searches.
    places = np.searchsorted(cycles * _NO_LESS, seconds[:, 1:], side="left")
    every = len(cycles) + 1
    row = np.arange(len(seconds))[:, None] * every
    counts = np.bincount((row + places).ravel(), minlength=len(seconds) * every).reshape(len(seconds), every)
    found: Ints = counts[:, :-1].cumsum(axis=1)
    return found
