"""One row that is not plain greedy: what a rank proposes for it, and what rank 0 makes of all proposals.

A proposal is a flat run of float64 (which holds float32 and token ids exactly), of a size that every rank knows
from the request's parameters alone: candidates' adjusted logits, their ids, their raw logits, the masses of adjusted
and raw logits, and the most likely raw tokens where log-probabilities are asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from hexgen.errors import EngineError
from hexgen.request import SamplingParams, TokenLogprobs
from hexgen.split import Range
from hexgen.worker.sampling_math import Candidates, Doubles, Mass, best, choose, join, mass, sort
from hexgen.worker.sampling_state import Floats, SequenceState

# Candidates of each rank for a sampled row, and how many more than top-k where that is larger. A few beyond top-k,
# because a candidate equal to the last one is not known to be better than what was left out.
CANDIDATES = 128
BEYOND_TOP_K = 16
# A row gathered whole is sorted so far first: rarely is more needed.
FIRST_SORTED = 4096


@dataclass(frozen=True, slots=True)
class Work:
    """A row that is not plain greedy."""

    row: int
    state: SequenceState
    position: int  # of the token to choose

    @property
    def params(self) -> SamplingParams:
        return self.state.params

    def candidates(self, vocab_size: int) -> int:
        if self.params.greedy:
            return 1
        return min(vocab_size, max(CANDIDATES, (self.params.top_k or 0) + BEYOND_TOP_K))

    def proposal_size(self, vocab_size: int) -> int:
        """Numbers that a rank sends: values, ids and raw logits, two masses, and the alternatives to report."""
        return 3 * self.candidates(vocab_size) + 4 + 2 * (self.params.logprobs or 0)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's shard of a row."""

    raw: Floats
    adjusted: Floats


@dataclass(frozen=True, slots=True)
class Merged:
    """A row's candidates of all ranks, best first, with what logprobs need."""

    found: Candidates
    raw: Doubles  # of each candidate
    whole: Mass  # at the temperature, of adjusted logits
    raw_whole: Mass  # at temperature 1, of raw logits
    top: tuple[tuple[int, float], ...]  # raw logits

    def draw(self, work: Work) -> tuple[int, TokenLogprobs | None] | None:
        """The chosen token, or None where the candidates do not decide it."""
        at = choose(self.found, work.params, self.whole, work.state.uniform(work.position))
        if at is None:
            return None
        token = int(self.found.ids[at])
        if work.params.logprobs is None:
            return token, None
        base = self.raw_whole.largest + math.log(self.raw_whole.total) if self.raw_whole.total else 0.0
        top = tuple((id_, value - base) for id_, value in self.top)
        return token, TokenLogprobs(chosen=float(self.raw[at]) - base, top=top)


def propose(work: Work, logits: Shard, start: int, vocab_size: int, out: Doubles) -> None:
    """Fill ``out`` (``work.proposal_size`` numbers) with the proposal of the rank whose shard begins at ``start``."""
    count, params = work.candidates(vocab_size), work.params
    kept = best(logits.adjusted, count)
    if params.greedy and logits.adjusted.size:
        kept = np.array([logits.adjusted.argmax()])  # of equal values the first, as for plain rows
    values, ids, raw = out[:count], out[count : 2 * count], out[2 * count : 3 * count]
    values[kept.size :], ids[kept.size :], raw[kept.size :] = -np.inf, -1, -np.inf
    values[: kept.size] = logits.adjusted[kept]
    ids[: kept.size] = kept + start
    raw[: kept.size] = logits.raw[kept]
    masses = out[3 * count : 3 * count + 4]
    masses[:] = 0
    if not params.greedy and (params.top_k is None):
        found = mass(logits.adjusted, params.temperature)
        masses[:2] = found.largest, found.total
    if params.logprobs is not None:
        found = mass(logits.raw, 1.0)
        masses[2:] = found.largest, found.total
        tops = best(logits.raw, params.logprobs)
        top = out[3 * count + 4 :].reshape(2, -1)
        top[0, tops.size :], top[1, tops.size :] = -np.inf, -1
        top[0, : tops.size] = logits.raw[tops]
        top[1, : tops.size] = tops + start


def merge(work: Work, parts: list[Doubles], shards: tuple[Range, ...], vocab_size: int) -> Merged:
    """All ranks' proposals for one row."""
    count, params = work.candidates(vocab_size), work.params
    values = np.concatenate([part[:count] for part in parts])
    ids = np.concatenate([part[count : 2 * count] for part in parts]).astype(np.int64)
    raw = np.concatenate([part[2 * count : 3 * count] for part in parts])
    real = ids >= 0
    values, ids, raw = values[real], ids[real], raw[real]
    order = sort(values, ids)
    values, ids, raw = values[order], ids[order], raw[order]
    # What a rank left out is at most its worst candidate: beyond the best such value nothing is sure.
    cut = [float(part[:count].min()) for part, (a, b) in zip(parts, shards, strict=True) if b - a > count]
    safe = int(np.searchsorted(-values, -max(cut), side="left")) if cut else values.size
    masses = [part[3 * count : 3 * count + 4] for part in parts]
    top: tuple[tuple[int, float], ...] = ()
    if params.logprobs:
        tops = np.concatenate([part[3 * count + 4 :].reshape(2, -1) for part in parts], axis=1)
        tops = tops[:, tops[1] >= 0]
        first = sort(tops[0], tops[1].astype(np.int64))[: params.logprobs]
        top = tuple((int(tops[1, i]), float(tops[0, i])) for i in first)
    return Merged(
        found=Candidates(values, ids, safe, complete=not cut),
        raw=raw,
        whole=join([Mass(m[0], m[1]) for m in masses], params.temperature or 1.0),
        raw_whole=join([Mass(m[2], m[3]) for m in masses], 1.0),
        top=top,
    )


def draw_from_all(work: Work, merged: Merged, adjusted: Floats, raw: Floats) -> tuple[int, TokenLogprobs | None]:
    """Draw with the whole vocabulary at hand: from as many of the best as decide it."""
    for count in (FIRST_SORTED, adjusted.size):
        ids = best(adjusted, count).astype(np.int64)
        values = adjusted[ids].astype(np.float64)
        order = sort(values, ids)
        ids, values = ids[order], values[order]
        complete = ids.size == adjusted.size
        safe = ids.size if complete else int(np.searchsorted(-values, -values[-1], side="left"))
        found = Candidates(values, ids, safe, complete)
        token = replace(merged, found=found, raw=raw[ids].astype(np.float64)).draw(work)
        if token is not None:
            return token
    raise EngineError("a token could not be drawn from the whole vocabulary")
