"""A lower bound on the price of a pipeline, by Lagrangian relaxation, vectorised over cycle times.

The pipeline takes exactly ``depth`` groups; together they hold all layers, and their busy seconds and the travel
between them fit into the round trip. With multipliers mu (a layer) and nu (a second of the round trip) what
remains is to take the ``depth`` groups of least ``price - mu * layers + nu * seconds``. Any mu, nu >= 0 gives a
valid bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_COARSE = np.concatenate(([0.0], 2.0 ** np.arange(-8.0, 1.0)))  # times the dearest group's price
_FINE = np.linspace(0.0, 1.0, 8)[1:-1]
_STEPS = 12
_BEYOND = 1.02  # the target is passed, not only reached
_RELAXATION = 0.7
_SLOPES = 3  # values of nu tried for each mu
LEAST_PRICE = 1e-12


@dataclass(frozen=True, slots=True)
class Knapsacks:
    """One relaxed knapsack for each cycle time."""

    layers: Floats  # [types, cycles]: that a group holds within the cycle; 0: it cannot be used
    cost: Floats  # [types]
    available: Floats  # [types]: at most ``depth``
    depth: int
    total: int  # layers
    first_s: Floats  # [types]: busy seconds of one layer
    slope_s: Floats | None  # [types]: of each further one; None where times are not linear
    spare_s: Floats  # [cycles]: of the round trip, for busy seconds
    member: Floats  # [classes, types]: devices that a group takes of each class
    devices: Floats  # [classes]
    target: Floats  # [cycles]: a bound above this price is high enough


def least_price(k: Knapsacks, *, thorough: bool) -> Floats:
    """[cycles]: no pipeline is cheaper; ``inf`` where there is none. ``thorough``: with the round trip."""
    usable = (k.layers > 0) & (k.available > 0)[:, None]
    counts = np.where(usable, k.available[:, None], 0.0)
    held = -_smallest(np.where(usable, -k.layers, np.inf)[:, :, None], counts, k.depth)[:, 0]
    possible = (counts.sum(axis=0) >= k.depth) & (held >= k.total)
    result = np.full(k.layers.shape[1], np.inf)
    if possible.any():
        part = replace(k, layers=k.layers[:, possible], spare_s=k.spare_s[possible], target=k.target[possible])
        result[possible] = np.maximum(
            _search(part, usable[:, possible], counts[:, possible], thorough), LEAST_PRICE
        )
    return result


def _search(k: Knapsacks, usable: npt.NDArray[np.bool_], counts: Floats, thorough: bool) -> Floats:
    """Coarse multipliers, then finer ones around the best."""
    cycles = k.layers.shape[1]
    coarse = float(k.cost[k.available > 0].max()) * _COARSE
    ratios = np.zeros(1) if k.slope_s is None or not thorough else _ratios(k)
    mu = np.broadcast_to(np.repeat(coarse, len(ratios)), (cycles, len(coarse) * len(ratios)))
    ratio = np.broadcast_to(np.tile(ratios, len(coarse)), mu.shape)
    at = _bound(k, usable, counts, mu, ratio)
    best = at.argmax(axis=1)
    i = best // len(ratios)
    low, high = coarse[np.maximum(i - 1, 0)], coarse[np.minimum(i + 1, len(coarse) - 1)]
    fine = low[:, None] + (high - low)[:, None] * _FINE
    chosen = np.broadcast_to(ratios[best % len(ratios)][:, None], fine.shape)
    finer = _bound(k, usable, counts, fine, chosen)
    found: Floats = np.maximum(at.max(axis=1), finer.max(axis=1))
    if not thorough:
        return found
    closer = finer.max(axis=1) >= at.max(axis=1)
    mu = np.where(closer, fine[np.arange(cycles), finer.argmax(axis=1)], coarse[i])
    return np.maximum(found, _climbed(k, usable, counts, mu, mu * ratios[best % len(ratios)]))


def _climbed(k: Knapsacks, usable: npt.NDArray[np.bool_], counts: Floats, mu: Floats, nu: Floats) -> Floats:
    """Subgradient steps (Polyak's, towards ``target``) on the multipliers and one for each class's devices."""
    theta = np.zeros((len(k.devices), len(mu)))
    best = np.full(len(mu), -np.inf)
    slope = k.slope_s
    for _ in range(_STEPS):
        seconds = np.zeros_like(k.layers)
        held = k.layers
        if slope is not None:
            pays = mu > nu * slope[:, None]
            held = np.where(pays, k.layers, 1.0)
            seconds = k.first_s[:, None] + slope[:, None] * (held - 1)
        values = k.cost[:, None] - mu * held + k.member.T @ theta
        if slope is not None:
            values = values + nu * seconds
        values = np.where(usable, values, np.inf)
        taken = _taken(values, counts, k.depth)
        chosen = np.where(taken > 0, np.where(np.isfinite(values), values, 0.0) * taken, 0.0).sum(axis=0)
        constant = mu * k.total - (theta * k.devices[:, None]).sum(axis=0)
        if slope is not None:
            constant = constant - nu * k.spare_s
        bound = chosen + constant
        best = np.maximum(best, bound)
        # Subgradients, each scaled to what its constraint is about.
        short = (k.total - (held * taken).sum(axis=0)) / k.total
        spent = (seconds * taken).sum(axis=0) - k.spare_s
        late = np.zeros_like(mu) if slope is None else spent / np.maximum(k.spare_s, 1e-9)
        over = (k.member @ taken - k.devices[:, None]) / k.devices[:, None]
        over = np.where((theta > 0) | (over > 0), over, 0.0)
        late = np.where((nu > 0) | (late > 0), late, 0.0)
        norm = short**2 + late**2 + (over**2).sum(axis=0)
        step = np.maximum(k.target * _BEYOND - bound, 0.0) / np.maximum(norm, 1e-12) * _RELAXATION
        mu = np.maximum(0.0, mu + step * short / k.total)
        nu = np.maximum(0.0, nu + step * late / np.maximum(k.spare_s, 1e-9))
        theta = np.maximum(0.0, theta + step * over / k.devices[:, None])
    return best


def _taken(values: Floats, counts: Floats, depth: int) -> Floats:
    """How many of each type the ``depth`` smallest values are: [types, cycles]."""
    order = values.argsort(axis=0)
    ordered = np.take_along_axis(counts, order, axis=0)
    np.cumsum(ordered, axis=0, out=ordered)
    np.minimum(ordered, depth, out=ordered)
    ordered[1:] -= ordered[:-1].copy()
    result = np.empty_like(ordered)
    np.put_along_axis(result, order, ordered, axis=0)
    return result


def _ratios(k: Knapsacks) -> Floats:
    """nu over mu: none, and where one or another type would be indifferent to a layer more."""
    slopes = k.slope_s if k.slope_s is not None else np.zeros(0)
    distinct = np.unique(slopes[(k.available > 0) & (slopes > 0)])
    if len(distinct) > _SLOPES:
        distinct = distinct[np.linspace(0, len(distinct) - 1, _SLOPES).astype(int)]
    return np.concatenate(([0.0], 1.0 / distinct))


def _bound(k: Knapsacks, usable: npt.NDArray[np.bool_], counts: Floats, mu: Floats, ratio: Floats) -> Floats:
    """The relaxation's value: [cycles, multipliers]."""
    nu = mu * ratio
    values = k.cost[:, None, None] - mu * k.layers[:, :, None]
    constant = mu * k.total
    if ratio.any() and k.slope_s is not None:
        slope, first = k.slope_s[:, None, None], k.first_s[:, None, None]
        # A group takes all the layers it can where that pays, else one.
        more = np.minimum((nu * slope - mu) * (k.layers[:, :, None] - 1), 0.0)
        values = k.cost[:, None, None] + nu * first - mu + more
        constant = constant - nu * k.spare_s[:, None]
    values = np.where(usable[:, :, None], values, np.inf)
    found: Floats = _smallest(values, counts, k.depth) + constant
    return found


def _smallest(values: Floats, counts: Floats, depth: int) -> Floats:
    """The sum of the ``depth`` smallest of values [types, cycles, multipliers], each there ``counts`` times."""
    order = values.argsort(axis=0)
    ordered = np.take_along_axis(values, order, axis=0)
    taken = np.take_along_axis(np.broadcast_to(counts[:, :, None], values.shape), order, axis=0)
    np.cumsum(taken, axis=0, out=taken)
    np.minimum(taken, depth, out=taken)
    taken[1:] -= taken[:-1].copy()
    result: Floats = np.where(taken > 0, np.where(np.isfinite(ordered), ordered, 0.0) * taken, 0.0).sum(axis=0)
    return result
