"""A lower bound on the price of a pipeline, by Lagrangian relaxation, vectorised over cycle times and pools.

The pipeline takes exactly ``depth`` groups; together they hold all layers, and their busy seconds and the travel
between them fit into the round trip. With multipliers mu (a layer), nu (a second of the round trip) and theta (a
device of a class, of which widths share) what remains is to take the ``depth`` groups of least
``price - mu * layers + nu * seconds + theta * devices``. Any multipliers that are not negative give a valid bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.bool_] | npt.NDArray[np.int64]

_MEETINGS = 6  # of lines, on the way to the best multiplier
_DEAREST = 16.0  # times the dearest group's price: the most that a layer is said to be worth
_STEPS = 12
_BEYOND = 1.02  # the target is passed, not only reached
_RELAXATION = 0.7
_SLOPES = 3  # values of nu tried for each mu
LEAST_PRICE = 1e-12


@dataclass(frozen=True, slots=True)
class Knapsacks:
    """One relaxed knapsack for each spot: a cycle time in a pool."""

    layers: Floats  # [types, spots]: that a group holds within the cycle; 0: it cannot be used
    cost: Floats  # [types]
    available: Floats  # [types, spots]: at most ``depth``
    depth: int
    total: int  # layers
    first_s: Floats  # [types, spots]: busy seconds of one layer, and of the hop to the group
    slope_s: Floats | None  # [types]: of each further one; None where times are not linear
    spare_s: Floats  # [spots]: of the round trip, for busy seconds
    member: Floats  # [rooms, types]: what a group takes of each class's devices, and of its nodes' halves
    devices: Floats  # [rooms, spots]: what there is of them
    target: Floats  # [spots]: a bound above this price is high enough

    def only(self, rows: Rows) -> Knapsacks:
        return replace(
            self,
            layers=self.layers[:, rows],
            available=self.available[:, rows],
            first_s=self.first_s[:, rows],
            spare_s=self.spare_s[rows],
            devices=self.devices[:, rows],
            target=self.target[rows],
        )


def least_price(k: Knapsacks, *, thorough: bool) -> Floats:
    """[spots]: no pipeline is cheaper; ``inf`` where there is none. ``thorough``: not by the layers alone."""
    counts = np.where(k.layers > 0, k.available, 0.0)
    held = (k.layers * _taken(np.where(counts > 0, -k.layers, np.inf), counts, k.depth)).sum(axis=0)
    possible = np.flatnonzero((counts.sum(axis=0) >= k.depth) & (held >= k.total))
    result = np.full(k.layers.shape[1], np.inf)
    if len(possible):
        found = _search(k.only(possible), counts[:, possible], thorough)
        result[possible] = np.maximum(found, LEAST_PRICE)
    return result


def _search(k: Knapsacks, counts: Floats, thorough: bool) -> Floats:
    """The best multiplier of the layers; ``thorough``: beside others for the round trip, and then climbed from."""
    found, mu = _along(k, counts, 0.0)
    if not thorough:
        return found
    nu = np.zeros_like(mu)
    for ratio in () if k.slope_s is None else _ratios(k.slope_s[k.available.any(axis=1)]):
        left = np.flatnonzero(found < k.target)
        bound, at = _along(k.only(left), counts[:, left], float(ratio))
        better = bound > found[left]
        left = left[better]
        found[left], mu[left], nu[left] = bound[better], at[better], at[better] * ratio
    left = np.flatnonzero(found < k.target)
    if len(left):
        found[left] = np.maximum(found[left], _climbed(k.only(left), counts[:, left], mu[left], nu[left]))
    return found


def _ratios(slopes: Floats) -> Floats:
    """nu over mu: where one or another type would be indifferent to a layer more."""
    distinct = np.unique(slopes[slopes > 0])
    if len(distinct) > _SLOPES:
        distinct = distinct[np.linspace(0, len(distinct) - 1, _SLOPES).astype(int)]
    found: Floats = 1.0 / distinct
    return found


# ---- one multiplier ------------------------------------------------------------------------------------------


def _along(k: Knapsacks, counts: Floats, ratio: float) -> tuple[Floats, Floats]:
    """The best value for multipliers (mu, ``ratio`` x mu) and no theta, and that mu: [spots] each.

    In mu it is concave and made of lines: where the line at a point below the peak and the one at a point above it
    meet is the next point to look at. Spots that have passed their target are left at that.
    """
    line = _Lines(k, counts, ratio)
    every = np.arange(k.layers.shape[1])
    low = np.zeros(len(every))
    high = np.full_like(low, float(k.cost.max()) * _DEAREST)
    low_value, low_slope = line.at(every, low)
    high_value, high_slope = line.at(every, high)
    found, best = np.maximum(low_value, high_value), np.where(low_value >= high_value, low, high)
    for _ in range(_MEETINGS):
        i = np.flatnonzero((low_slope > 0) & (high_slope < 0) & (found < k.target))
        if len(i) == 0:
            break
        meeting = high_value[i] - low_value[i] + low_slope[i] * low[i] - high_slope[i] * high[i]
        mu = np.clip(meeting / (low_slope[i] - high_slope[i]), low[i], high[i])
        value, slope = line.at(i, mu)
        better = value > found[i]
        found[i[better]], best[i[better]] = value[better], mu[better]
        up = slope > 0
        low[i[up]], low_value[i[up]], low_slope[i[up]] = mu[up], value[up], slope[up]
        down = ~up
        high[i[down]], high_value[i[down]], high_slope[i[down]] = mu[down], value[down], slope[down]
    return found, best


class _Lines:
    """The relaxation as a function of mu alone. Here types are the last axis."""

    def __init__(self, k: Knapsacks, counts: Floats, ratio: float) -> None:
        self.depth = float(k.depth)
        self.counts = np.ascontiguousarray(counts.T)
        slopes, self.constant = -k.layers, np.full(k.layers.shape[1], float(k.total))
        if ratio and k.slope_s is not None:
            # A group takes all the layers it can where that pays, else one: the same along the whole ray.
            more = np.minimum((ratio * k.slope_s[:, None] - 1) * (k.layers - 1), 0.0)
            slopes = ratio * k.first_s - 1 + more
            self.constant = self.constant - ratio * k.spare_s
        self.slopes = np.where(self.counts > 0, slopes.T, 0.0)
        self.cost = np.where(self.counts > 0, k.cost, np.inf)

    def at(self, spots: npt.NDArray[np.int64], mu: Floats) -> tuple[Floats, Floats]:
        """Value and slope: [spots] each."""
        slopes = self.slopes[spots]
        values = self.cost[spots] + mu[:, None] * slopes
        order = values.argsort(axis=1)
        row = np.arange(len(spots))[:, None]
        counts = self.counts[spots][row, order]
        taken = np.clip(self.depth - (np.cumsum(counts, axis=1) - counts), 0.0, counts)
        chosen = np.where(taken > 0, values[row, order], 0.0)
        constant = self.constant[spots]
        return (chosen * taken).sum(axis=1) + mu * constant, (taken * slopes[row, order]).sum(axis=1) + constant


# ---- all multipliers -----------------------------------------------------------------------------------------


def _climbed(k: Knapsacks, counts: Floats, mu: Floats, nu: Floats) -> Floats:
    """Subgradient steps (Polyak's, towards ``target``) on the multipliers and one for each class's room."""
    theta = np.zeros_like(k.devices)
    best = np.full(len(mu), -np.inf)
    slope, usable = k.slope_s, counts > 0
    for _ in range(_STEPS):
        seconds = np.zeros_like(k.layers)
        held = k.layers
        if slope is not None:
            pays = mu > nu * slope[:, None]
            held = np.where(pays, k.layers, 1.0)
            seconds = k.first_s + slope[:, None] * (held - 1)
        values = k.cost[:, None] - mu * held + k.member.T @ theta
        if slope is not None:
            values = values + nu * seconds
        values = np.where(usable, values, np.inf)
        taken = _taken(values, counts, k.depth)
        chosen = np.where(taken > 0, np.where(np.isfinite(values), values, 0.0) * taken, 0.0).sum(axis=0)
        constant = mu * k.total - (theta * k.devices).sum(axis=0)
        if slope is not None:
            constant = constant - nu * k.spare_s
        bound = chosen + constant
        best = np.maximum(best, bound)
        # Subgradients, each scaled to what its constraint is about.
        short = (k.total - (held * taken).sum(axis=0)) / k.total
        spent = (seconds * taken).sum(axis=0) - k.spare_s
        late = np.zeros_like(mu) if slope is None else spent / np.maximum(k.spare_s, 1e-9)
        over = (k.member @ taken - k.devices) / k.devices
        over = np.where((theta > 0) | (over > 0), over, 0.0)
        late = np.where((nu > 0) | (late > 0), late, 0.0)
        norm = short**2 + late**2 + (over**2).sum(axis=0)
        step = np.maximum(k.target * _BEYOND - bound, 0.0) / np.maximum(norm, 1e-12) * _RELAXATION
        mu = np.maximum(0.0, mu + step * short / k.total)
        nu = np.maximum(0.0, nu + step * late / np.maximum(k.spare_s, 1e-9))
        theta = np.maximum(0.0, theta + step * over / k.devices)
    return best


def _taken(values: Floats, counts: Floats, depth: int) -> Floats:
    """How many of each type the ``depth`` smallest values are: [types, spots]."""
    order = values.argsort(axis=0)
    ordered = np.take_along_axis(counts, order, axis=0)
    np.cumsum(ordered, axis=0, out=ordered)
    np.minimum(ordered, depth, out=ordered)
    ordered[1:] -= ordered[:-1].copy()
    result = np.empty_like(ordered)
    np.put_along_axis(result, order, ordered, axis=0)
    return result
