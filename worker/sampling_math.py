"""The arithmetic of choosing a token from candidates, without a thought for who holds them.

Candidates are in one order everywhere: by value, largest first, ties by token id. The token is drawn by inverting
the cumulative distribution in that order. Filters, in order: temperature, top-k, top-p (Holtzman et al.,
arXiv:1904.09751), min-p (Nguyen et al., arXiv:2407.01082), each over what the one before has left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexgen.request import SamplingParams
from hexgen.worker.sampling_state import Floats, Ints

Doubles = npt.NDArray[np.float64]

_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Mass:
    """Sum of exp((value - largest) / temperature) over values, and the largest: a softmax's denominator."""

    largest: float
    total: float


@dataclass(frozen=True, slots=True)
class Candidates:
    """Sorted candidates. The first ``safe`` are certainly the best of the whole vocabulary, in order."""

    values: Doubles
    ids: Ints
    safe: int
    complete: bool  # all of the vocabulary


def finite(values: Floats) -> Floats:
    """``values`` without NaN or +inf (an overflowed model must not break the batch); itself when there is none."""
    largest = values.max(initial=-np.inf)
    if np.isfinite(largest):
        return values
    limit = float(np.finfo(np.float32).max)
    cleaned: Floats = np.nan_to_num(values, nan=-limit, posinf=limit, neginf=-limit)
    return cleaned


def best(values: Floats, count: int) -> Ints:
    """Indices of the ``count`` largest, in no order. Ties at the end are broken as it happens."""
    size = values.size
    if count == 0 or count >= size:
        return np.arange(min(count, size))
    if size > 4 * _BLOCK * count:
        # The count-th best of the blocks' maxima is a lower bound on the count-th best value: one cheap pass
        # leaves little to select from.
        whole = size // _BLOCK * _BLOCK
        maxima = values[:whole].reshape(-1, _BLOCK).max(axis=1)
        bound = np.partition(maxima, maxima.size - count)[maxima.size - count]
        kept = np.flatnonzero(values >= bound)
        return kept[np.argpartition(values[kept], kept.size - count)[kept.size - count :]]
    return np.argpartition(values, size - count)[size - count :]


def mass(values: Floats, temperature: float) -> Mass:
    """Over one shard. float32 exponentials, summed in float64. An empty shard has no mass."""
    if not values.size:
        return Mass(-np.inf, 0.0)
    largest = float(values.max())
    if largest == -np.inf:
        return Mass(-np.inf, 0.0)
    powers = np.exp((values - np.float32(largest)) * np.float32(min(1.0 / temperature, 3e38)))
    return Mass(largest, float(powers.sum(dtype=np.float64)))


def join(parts: list[Mass], temperature: float) -> Mass:
    """The mass of all shards together."""
    largest = max(part.largest for part in parts)
    if largest == -np.inf:
        return Mass(-np.inf, 0.0)
    total = sum(part.total * float(np.exp((part.largest - largest) / temperature)) for part in parts if part.total)
    return Mass(largest, total)


def sort(values: Doubles, ids: Ints) -> Ints:
    """The order of candidates: indices by value, largest first, ties by id."""
    return np.lexsort((ids, -values))


def choose(found: Candidates, params: SamplingParams, whole: Mass | None, u: float) -> int | None:
    """Index of the drawn candidate, or None where the candidates do not decide it.

    ``whole`` is the mass of the vocabulary at the temperature; not needed with top-k. ``u`` is in [0, 1).
    """
    values = found.values
    if params.greedy or values[0] == -np.inf:  # -inf: every token is banned
        return 0
    powers = np.exp((values - values[0]) / params.temperature)
    closed = found.complete  # whether what is left is known to the last token
    if params.top_k is not None and (params.top_k <= found.safe or found.complete):
        powers, closed = powers[: params.top_k], True
    elif params.top_k is not None:
        return None
    known = powers.size if closed else found.safe
    if known == 0:
        return None
    powers = powers[:known]
    cumulative = powers.cumsum()
    if closed or whole is None:
        total = float(cumulative[-1])
    else:
        total = whole.total * float(np.exp(np.float64(whole.largest - values[0]) / params.temperature))
    keep = known
    if params.top_p < 1.0:
        # A token stays if those before it have less than top_p together.
        keep = 1 + int(np.searchsorted(cumulative, params.top_p * total, side="left"))
        closed, keep = closed or keep <= known, min(keep, known)
    if params.min_p > 0.0:
        enough = int(np.searchsorted(-powers, -params.min_p, side="right"))
        closed, keep = closed or enough < known, min(keep, enough)
    if closed:
        total = float(cumulative[keep - 1])
    elif params.top_p < 1.0 or params.min_p > 0.0:
        return None  # what the filters leave goes on beyond what is known, and so does its mass
    drawn = int(np.searchsorted(cumulative[:keep], u * total, side="right"))
    if drawn < keep:
        return drawn
    return keep - 1 if closed else None
