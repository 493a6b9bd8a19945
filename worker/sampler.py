"""Choosing the next tokens where each rank of the last stage holds a part of the vocabulary.

Every rank proposes its best few candidates and the mass of its shard; rank 0 merges. Plain greedy rows exchange
one number a rank. Only where the merged candidates do not decide a draw (a flat distribution without top-k,
or a nucleus wider than the candidates) are that row's logits gathered whole. Arithmetic runs on the host in numpy;
on GPUs the plain greedy rows, the common case, are reduced on the device.
"""

from __future__ import annotations

import numpy as np
import torch

from hexgen.batching.segments import SampledToken, Segment, Step
from hexgen.errors import EngineError
from hexgen.request import TokenLogprobs
from hexgen.worker.attention_choice import choose_candidates
from hexgen.worker.communicator import Communicator
from hexgen.worker.config import RankConfig
from hexgen.worker.sampling_math import PAD, choose, key_ids, select, to_keys
from hexgen.worker.sampling_rows import FIRST_SORTED, Merged, Rows, Shard, Work, propose
from hexgen.worker.sampling_state import Floats, Ints, SequenceState


class Sampler:
    """Samples for one route. Every rank of the stage makes the same calls; rank 0 gets the tokens.

    A text depends on its prompt, parameters and seed alone. A missing seed is drawn on admission.
    """

    def __init__(self, config: RankConfig, communicator: Communicator) -> None:
        self._communicator = communicator
        self._shards = tuple(part.vocab for part in config.slices)
        self._shard = self._shards[config.rank]
        self._widest = max(b - a for a, b in self._shards)
        self._vocab_size = config.model.vocab_size
        self._device = torch.device(config.device)
        self._candidates = choose_candidates(self._device)
        self._sequences: dict[int, SequenceState] = {}
        self.gathered_rows = 0  # rows whose logits had to be gathered whole, since the start

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, step: Step) -> None:
        """Forget, admit, and remember the tokens of a step before it is sampled. Every step, in order."""
        for sequence in step.released:
            self._sequences.pop(sequence, None)
        for admission in step.admitted:
            self._sequences[admission.sequence] = SequenceState.admit(admission, self._shard)
        for segment in step.segments:
            self._state(segment.sequence).extend(segment.start, segment.tokens)

    def sample(self, local_logits: torch.Tensor, segments: tuple[Segment, ...]) -> list[SampledToken] | None:
        """The tokens on rank 0, None elsewhere.

        ``local_logits`` is ``[len(segments), n_vocab of this rank]`` float32, rows in the order of ``segments``.
        """
        if tuple(local_logits.shape) != (len(segments), self._shard[1] - self._shard[0]):
            raise EngineError(f"logits of shape {list(local_logits.shape)} for {len(segments)} sampled segments")
        works: list[Work] = []
        plain: list[int] = []
        for row, segment in enumerate(segments):
            state = self._state(segment.sequence)
            if state.is_plain(segment.end):
                plain.append(row)
            else:
                works.append(Work(row, state, segment.end))
        chosen: list[tuple[int, TokenLogprobs | None]] = [(0, None)] * len(segments)
        if not works and self._communicator.size == 1 and self._host_takes(local_logits):
            # What nearly every step is: greedy rows of a whole vocabulary, on the host. Nothing is to be merged.
            best = self._on_host(local_logits, plain).argmax(axis=1).tolist()
            return [SampledToken(s.sequence, id_, None) for s, id_ in zip(segments, best, strict=True)]
        if not works:
            parts = self._exchange(self._best_keys(local_logits, plain))
        else:
            rows = Rows(works, self._vocab_size)
            shard = Shard.make(rows, self._on_host(local_logits, [w.row for w in works]))
            packed = np.empty(len(plain) + rows.n * rows.row_size, dtype=np.int64)
            packed[: len(plain)] = self._best_keys(local_logits, plain)
            propose(rows, shard, self._shard[0], rows.parts(packed[len(plain) :]))
            parts = self._exchange(packed)
            for work, token in zip(works, self._draw(rows, shard, parts, len(plain)), strict=True):
                chosen[work.row] = token
        if self._communicator.rank != 0:
            return None
        # Ids count backwards in a key: of equal values the largest key is the lowest id.
        winners = key_ids(np.stack([part[: len(plain)] for part in parts]).max(axis=0))
        for row, id_ in zip(plain, winners.tolist(), strict=True):
            chosen[row] = (id_, None)
        return [
            SampledToken(segment.sequence, token, logprobs)
            for segment, (token, logprobs) in zip(segments, chosen, strict=True)
        ]

    def _state(self, sequence: int) -> SequenceState:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise EngineError(f"the sampler does not know sequence {sequence}") from None

    # ---- this rank's part --------------------------------------------------------------------------------

    def _host_takes(self, local_logits: torch.Tensor) -> bool:
        return self._candidates is None and local_logits.device.type == "cpu"

    @staticmethod
    def _on_host(local_logits: torch.Tensor, rows: list[int]) -> Floats:
        """Some rows as numpy's, a view where that is possible."""
        chosen = local_logits if len(rows) == local_logits.shape[0] else local_logits[rows]
        array: Floats = chosen.cpu().numpy()
        return array

    def _best_keys(self, local_logits: torch.Tensor, rows: list[int]) -> Ints:
        """The key of the largest logit of each row of this shard."""
        if not rows or local_logits.shape[1] == 0:
            return np.full(len(rows), PAD)
        if self._candidates is not None:
            chosen = None
            if len(rows) < local_logits.shape[0]:
                chosen = torch.tensor(rows, dtype=torch.int64).to(local_logits.device)
            keys: Ints = self._candidates.greedy(local_logits, chosen, self._shard[0]).cpu().numpy()
            return keys
        if self._host_takes(local_logits):
            array = self._on_host(local_logits, rows)
            ids = array.argmax(axis=1)  # several times faster than torch's
            values = array[np.arange(len(rows)), ids]
        else:
            largest, at = (local_logits if len(rows) == local_logits.shape[0] else local_logits[rows]).max(dim=1)
            both = torch.stack((largest.double(), at.double())).cpu().numpy()
            values, ids = both[0].astype(np.float32), both[1].astype(np.int64)
        return to_keys(np.nan_to_num(values), ids + self._shard[0])

    def _exchange(self, packed: Ints) -> list[Ints]:
        """Every rank's numbers, in rank order."""
        if self._communicator.size == 1:
            return [packed]
        parts = self._communicator.all_gather(torch.from_numpy(packed).to(self._device))
        return [part.cpu().numpy() for part in parts]

    # ---- rank 0's part, and rows that the candidates do not decide ---------------------------------------

    def _draw(
        self, rows: Rows, shard: Shard, parts: list[Ints], skip: int
    ) -> list[tuple[int, TokenLogprobs | None]]:
        """The tokens of the worked rows on rank 0 (elsewhere of no meaning)."""
        leads = self._communicator.rank == 0
        at = np.full(rows.n, -1, dtype=np.int64)
        if leads:
            merged = Merged(rows, [rows.parts(part[skip:]) for part in parts])
            at = choose(merged.keys, merged.cut, rows.filters, merged.whole, rows.uniform)
        whole = self._gather_undecided(rows, shard, at)
        if not leads:
            return [(0, None)] * rows.n
        keys = merged.keys[np.arange(rows.n), np.maximum(at, 0)]
        tokens = key_ids(keys).tolist()
        raw = merged.raw(keys).tolist() if rows.reports else [0.0] * rows.n
        for i, row in whole.items():
            tokens[i], raw[i] = _draw_from_all(rows, merged, i, *row)
        return [(tokens[i], merged.logprobs(i, raw[i])) for i in range(rows.n)]

    def _gather_undecided(self, rows: Rows, shard: Shard, at: Ints) -> dict[int, tuple[Floats, Floats]]:
        """Whole rows ``(adjusted, raw)`` where ``at`` is -1 on rank 0, which tells the others which they are."""
        if rows.filters.greedy.all():
            return {}
        undecided = at < 0
        if self._communicator.size > 1:
            shared = torch.from_numpy(undecided.astype(np.int64)).to(self._device)
            self._communicator.broadcast(shared)
            undecided = shared.cpu().numpy() > 0
        wanted = np.flatnonzero(undecided)
        if not wanted.size:
            return {}
        self.gathered_rows += wanted.size
        if self._communicator.size == 1:
            return {int(i): (shard.adjusted[i], shard.raw[i]) for i in wanted}
        padded = np.zeros((wanted.size, 2, self._widest), dtype=np.float32)
        padded[:, 0, : shard.adjusted.shape[1]] = shard.adjusted[wanted]
        padded[:, 1, : shard.raw.shape[1]] = shard.raw[wanted]
        parts = self._communicator.all_gather(torch.from_numpy(padded).to(self._device))
        host = [part.cpu().numpy()[:, :, : b - a] for part, (a, b) in zip(parts, self._shards, strict=True)]
        return {int(i): (row[0], row[1]) for i, row in zip(wanted, np.concatenate(host, axis=2), strict=True)}


def _draw_from_all(rows: Rows, merged: Merged, i: int, adjusted: Floats, raw: Floats) -> tuple[int, float]:
    """Token and raw logit of row ``i`` from the whole vocabulary: from as many of the best as decide it."""
    one = slice(i, i + 1)
    for count in (FIRST_SORTED, adjusted.size):
        keys, cut = select(adjusted[None], 0, min(count, adjusted.size), adjusted.size, np.array([-np.inf]))
        at = choose(keys, cut, rows.filters.row(i), merged.whole[one], rows.uniform[one])
        if at[0] >= 0:
            token = int(key_ids(keys[0, at[0]]))
            return token, float(raw[token])
    raise EngineError("a token could not be drawn from the whole vocabulary")
