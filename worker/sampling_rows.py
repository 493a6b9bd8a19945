"""The rows of a step that are not plain greedy: what a rank proposes for them, and what rank 0 makes of it.

A proposal is one flat run of 64-bit integers (doubles travel as their bits), laid out in a way that every rank
knows from the requests' parameters alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hexgen.request import TokenLogprobs
from hexgen.worker.sampling_math import (
    Doubles,
    Filters,
    clean,
    join,
    key_ids,
    key_values,
    masses,
    select,
)
from hexgen.worker.sampling_state import Floats, Ints, SequenceState

# Candidates of each rank for a sampled row, and how many more than top-k where that is larger: a candidate equal
# to the last one is not known to be better than what was left out.
CANDIDATES = 128
BEYOND_TOP_K = 16
# Tokens less likely than exp(-this) of the likeliest are no candidates, unless top-k wants them.
FLOOR_NATS = 10.0
# Rows gathered whole are drawn from so many of the best first: rarely are more needed.
FIRST_SORTED = 4096


@dataclass(frozen=True, slots=True)
class Work:
    """One row that is not plain greedy."""

    row: int
    state: SequenceState
    position: int  # of the token to choose


class Rows:
    """Some worked rows and the layout of their proposals, the same on every rank."""

    def __init__(self, works: Sequence[Work], vocab_size: int) -> None:
        self.works = tuple(works)
        self.n = len(self.works)
        self.vocab_size = vocab_size
        params = [w.state.params for w in works]
        self.filters = Filters(
            greedy=np.array([p.greedy for p in params], dtype=np.bool_),
            temperature=np.array([p.temperature or 1.0 for p in params]),
            top_k=np.array([min(p.top_k or 0, vocab_size) for p in params], dtype=np.int64),
            top_p=np.array([p.top_p for p in params]),
            min_p=np.array([p.min_p for p in params]),
        )
        self.uniform = np.array([w.state.uniform(w.position) for w in works])
        self.reports = any(p.logprobs is not None for p in params)
        self.tops = min(vocab_size, max((p.logprobs or 0 for p in params), default=0))
        widest_k = int(self.filters.top_k.max(initial=0))
        sampled = max(CANDIDATES, widest_k + BEYOND_TOP_K) if not self.filters.greedy.all() else 1
        self.width = min(vocab_size, sampled)  # candidates of each rank
        # keys, cut, mass; where logprobs are wanted: raw logits of the candidates, raw mass, keys of raw tops
        self.row_size = self.width + 3 + (self.width + 2 + self.tops if self.reports else 0)

    def parts(self, proposal: Ints) -> Proposal:
        """Views of the flat ``proposal`` ``[n * row_size]``."""
        table = proposal.reshape(self.n, self.row_size)
        w = self.width
        report = table[:, w + 3 :]
        return Proposal(
            keys=table[:, :w],
            cut=table[:, w].view(np.float64),
            mass=table[:, w + 1 : w + 3].view(np.float64),
            raw=report[:, :w].view(np.float64) if self.reports else None,
            raw_mass=report[:, w : w + 2].view(np.float64) if self.reports else None,
            tops=report[:, w + 2 :] if self.reports else None,
        )


@dataclass(frozen=True, slots=True)
class Proposal:
    """A rank's word on each row; arrays with one row each."""

    keys: Ints  # [rows, width], PAD behind
    cut: Doubles  # [rows]
    mass: Doubles  # [rows, 2], at the temperature, of adjusted logits
    raw: Doubles | None  # [rows, width]: the logits of ``keys`` before any adjustment (of PAD: nothing)
    raw_mass: Doubles | None  # [rows, 2], at temperature 1
    tops: Ints | None  # [rows, tops]: keys of the likeliest raw tokens


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's logits of the rows, ``[rows, n_vocab]``; ``adjusted`` is ``raw`` itself if nothing is adjusted."""

    raw: Floats
    adjusted: Floats

    @staticmethod
    def make(rows: Rows, host: Floats) -> Shard:
        """``host`` ``[rows, n_vocab]`` is left as it is."""
        raw = clean(host)
        touched = [i for i, w in enumerate(rows.works) if w.state.adjusts(w.position)]
        if not touched:
            return Shard(raw, raw)
        adjusted = raw.copy()
        for i in touched:
            rows.works[i].state.adjust(adjusted[i], rows.works[i].position)
        return Shard(raw, adjusted)


def propose(rows: Rows, shard: Shard, start: int, out: Proposal) -> None:
    """Fill ``out`` for the rank whose part of the vocabulary begins at ``start``."""
    filters, adjusted = rows.filters, shard.adjusted
    unlimited = ~filters.greedy & (filters.top_k == 0)
    out.mass[:] = 0
    if unlimited.any():
        out.mass[unlimited] = masses(adjusted[unlimited], filters.temperature[unlimited])
    none = np.full(rows.n, -np.inf)
    peaks = adjusted.max(axis=1, initial=-np.inf) - FLOOR_NATS * filters.temperature
    floors = np.where(filters.top_k > 0, none, peaks)
    out.keys[:], out.cut[:] = select(adjusted, start, rows.width, rows.width, floors)
    if out.raw is None or out.raw_mass is None or out.tops is None:
        return
    out.raw_mass[:] = masses(shard.raw, np.ones(rows.n))
    out.tops[:], _ = select(shard.raw, start, rows.tops, rows.tops, none)
    if adjusted.shape[1]:
        ids = np.clip(key_ids(out.keys) - start, 0, adjusted.shape[1] - 1)
        out.raw[:] = np.take_along_axis(shard.raw, ids, axis=1)


class Merged:
    """All ranks' proposals, on rank 0."""

    def __init__(self, rows: Rows, proposals: Sequence[Proposal]) -> None:
        temperature = rows.filters.temperature
        self._rows = rows
        self._unsorted = np.concatenate([p.keys for p in proposals], axis=1)
        self.keys = np.sort(self._unsorted, axis=1)[:, ::-1]
        self.cut = np.stack([p.cut for p in proposals]).max(axis=0)
        self.whole = join([p.mass for p in proposals], temperature)
        self._raw = np.concatenate([p.raw for p in proposals if p.raw is not None] or [self.whole], axis=1)
        if rows.reports:
            mass = join([p.raw_mass for p in proposals if p.raw_mass is not None], np.ones(rows.n))
            self._bases = mass[:, 0] + np.log(np.maximum(mass[:, 1], np.finfo(np.float64).tiny))
            tops = np.concatenate([p.tops for p in proposals if p.tops is not None], axis=1)
            tops = np.sort(tops, axis=1)[:, ::-1][:, : rows.tops]
            self._top_ids = key_ids(tops).tolist()
            self._top_values = (key_values(tops) - self._bases[:, None]).tolist()

    def raw(self, chosen: Ints) -> Doubles:
        """Raw logits of one key a row (``chosen`` ``[rows]``); only where logprobs are reported."""
        at = (self._unsorted == chosen[:, None]).argmax(axis=1)
        found: Doubles = self._raw[np.arange(self._rows.n), at]
        return found

    def logprobs(self, i: int, raw: float) -> TokenLogprobs | None:
        """For row ``i``, whose chosen token has the raw logit ``raw``, if it asked for them."""
        wanted = self._rows.works[i].state.params.logprobs
        if wanted is None:
            return None
        top = zip(self._top_ids[i][:wanted], self._top_values[i][:wanted], strict=True)
        return TokenLogprobs(raw - float(self._bases[i]), tuple(top))
