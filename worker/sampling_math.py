"""The arithmetic of choosing tokens from candidates, for many rows at once, without a thought for who holds them.

A candidate is one 64-bit key: its float32 logit mapped to an integer of the same order, above its token id counted
backwards. Sorting keys downwards is therefore the one order that everything here is defined by: by value, largest
first, ties by token id. A token is drawn by inverting the cumulative distribution in that order. Filters: first
temperature, then top-k, top-p (Holtzman et al., arXiv:1904.09751) and min-p (Nguyen et al., arXiv:2407.01082),
each over what the one before has left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexgen.worker.sampling_state import Floats, Ints

Doubles = npt.NDArray[np.float64]

PAD = np.int64(-(2**63))  # sorts behind every candidate
_LOW = 0xFFFFFFFF
_LEAST_SETS = 1024  # fewer would be reduced in inner loops too short to be fast


@dataclass(frozen=True, slots=True)
class Filters:
    """What each of ``rows`` asks for: arrays ``[rows]``."""

    greedy: npt.NDArray[np.bool_]
    temperature: Doubles  # 1 where greedy
    top_k: Ints  # 0: none
    top_p: Doubles
    min_p: Doubles

    def row(self, i: int) -> Filters:
        """The filters of row ``i`` alone."""
        one = slice(i, i + 1)
        return Filters(self.greedy[one], self.temperature[one], self.top_k[one], self.top_p[one], self.min_p[one])


def to_keys(values: Floats, ids: Ints) -> Ints:
    """float32 ``values`` of tokens ``ids`` (below 2**32), without NaN."""
    bits = (values + np.float32(0.0)).view(np.int32)  # + 0: minus zero equals zero
    ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys: Ints = (ordered.astype(np.int64) << 32) | (_LOW - ids)
    return keys


def key_values(keys: Ints) -> Doubles:
    """The logits in ``keys``; -inf for ``PAD``."""
    ordered = (keys >> 32).astype(np.int32)
    bits = ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))
    values: Doubles = bits.view(np.float32).astype(np.float64)
    values[keys == PAD] = -np.inf
    return values


def key_ids(keys: Ints) -> Ints:
    ids: Ints = _LOW - (keys & _LOW)
    return ids


def clean(values: Floats) -> Floats:
    """Rows without NaN or +inf (an overflowed model must not break the batch); ``values`` where there is none."""
    if values.shape[1] == 0:
        return values
    broken = ~(values.max(axis=1) < np.inf)  # a NaN makes the maximum NaN
    if not broken.any():
        return values
    limit = float(np.finfo(np.float32).max)
    cleaned = values.copy()
    cleaned[broken] = np.nan_to_num(cleaned[broken], nan=-limit, posinf=limit, neginf=-limit)
    return cleaned


def select(values: Floats, start: int, count: int, width: int, floors: Doubles) -> tuple[Ints, Doubles]:
    """The best of each row of a shard ``[rows, n]`` whose first token is ``start``.

    Keys ``[rows, width]``, sorted downwards, ``PAD`` behind: at least the ``count`` best of the row, less those
    below ``floors`` ``[rows]``, as far as they fit. And a bound on the logits of all others, -inf where there are
    none.
    """
    rows, n = values.shape
    keys = np.full((rows, width), PAD)
    if n == 0:
        return keys, np.full(rows, -np.inf)
    bound = floors
    if count < n:
        # The count-th best of the maxima of disjoint sets is a lower bound on the count-th best value: one cheap
        # pass (columns a stride apart are a set, which vectorises) leaves little to select from.
        fold = max(1, n // max(4 * count, _LEAST_SETS))
        maxima = values[:, : n // fold * fold].reshape(rows, fold, -1).max(axis=1)
        last = maxima.shape[1] - max(count, 1)
        bound = np.maximum(floors, np.partition(maxima, last, axis=1)[:, last])
    at, token = np.divmod(np.flatnonzero(values >= bound.astype(np.float32)[:, None]), n)
    counts = np.bincount(at, minlength=rows)
    found = np.full((rows, max(int(counts.max()), 1)), PAD)
    found[at, np.arange(at.size) - (counts.cumsum() - counts)[at]] = to_keys(values[at, token], token + start)
    found.sort(axis=1)
    found = found[:, ::-1]
    cut = np.where(counts == n, -np.inf, bound)
    if found.shape[1] > width:
        cut = np.maximum(cut, key_values(found[:, width]))
    kept = min(width, found.shape[1])
    keys[:, :kept] = found[:, :kept]
    return keys, cut


def masses(values: Floats, temperature: Doubles) -> Doubles:
    """Of each row: its largest value, and the sum of exp((value - largest) / temperature), ``[rows, 2]``.

    float32 exponentials, summed in float64. An empty shard has no mass.
    """
    found = np.zeros((values.shape[0], 2))
    if values.size == 0:
        return found
    largest = values.max(axis=1)
    largest[largest == -np.inf] = 0
    scale = np.minimum(1 / np.maximum(temperature, 1e-38), 1e38).astype(np.float32)
    powers = values - largest[:, None]
    powers *= scale[:, None]
    np.exp(powers, out=powers)
    found[:, 0], found[:, 1] = largest, powers.sum(axis=1, dtype=np.float64)
    return found


def join(parts: list[Doubles], temperature: Doubles) -> Doubles:
    """The ``masses`` of all shards together, ``[rows, 2]``."""
    stacked = np.stack(parts)
    weights = stacked[:, :, 1] > 0
    largest = np.where(weights, stacked[:, :, 0], -np.inf).max(axis=0)
    largest[largest == -np.inf] = 0
    shares = np.exp(np.minimum((stacked[:, :, 0] - largest) / temperature, 0)) * stacked[:, :, 1]
    return np.stack((largest, shares.sum(axis=0)), axis=1)


def choose(keys: Ints, cut: Doubles, filters: Filters, whole: Doubles, uniform: Doubles) -> Ints:
    """Which candidate each row draws, ``[rows]``; -1 where the candidates do not decide it.

    ``keys`` ``[rows, candidates]`` are sorted downwards. ``cut`` ``[rows]`` bounds the logits of all tokens that
    are no candidates: those above it are certainly the best of the vocabulary, in order. ``whole`` ``[rows, 2]``
    is the vocabulary's mass at the temperature (not needed with top-k). ``uniform`` ``[rows]`` is in [0, 1).
    """
    values = key_values(keys)
    first = values[:, :1]
    rows, width = values.shape
    hopeless = first[:, 0] == -np.inf  # every token is banned
    first = np.where(hopeless[:, None], 0, first)
    powers = np.exp((values - first) / filters.temperature[:, None])
    complete = cut == -np.inf
    safe = np.where(complete, width, (values > cut[:, None]).sum(axis=1))
    limited = filters.top_k > 0
    closed = complete | (limited & (filters.top_k <= safe))  # whether what is left is known to the last token
    known = np.where(limited, np.minimum(filters.top_k, safe), safe)
    powers[np.arange(width) >= known[:, None]] = 0
    cumulative = powers.cumsum(axis=1)
    outside = whole[:, 1] * np.exp(np.minimum((whole[:, 0] - first[:, 0]) / filters.temperature, 700))
    total = np.where(closed, cumulative[:, -1], outside)
    undecided = (limited & ~closed) | (known == 0)
    # Top-p: a token stays if those before it have less than top_p together. Min-p: if it has min_p of the first's.
    nucleus = 1 + (cumulative < (filters.top_p * total)[:, None]).sum(axis=1)
    likely = np.where(filters.min_p > 0, (powers >= filters.min_p[:, None]).sum(axis=1), known)
    nucleus = np.where(filters.top_p < 1, nucleus, known)
    closed |= ((filters.top_p < 1) & (nucleus <= known)) | (likely < known)
    keep = np.maximum(np.minimum(np.minimum(nucleus, likely), known), 1)
    # Where the filters leave more than is known, so is the mass that they leave.
    undecided |= ~closed & ((filters.top_p < 1) | (filters.min_p > 0))
    total = np.where(closed, cumulative[np.arange(rows), keep - 1], total)
    drawn = (cumulative <= (uniform * total)[:, None]).sum(axis=1)
    undecided |= ~closed & (drawn >= keep)
    chosen = np.where(undecided, -1, np.minimum(drawn, keep - 1))
    result: Ints = np.where(filters.greedy | hopeless, 0, chosen).astype(np.int64)
    return result
