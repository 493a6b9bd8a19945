"""Choosing the next tokens where each rank of the last stage holds a part of the vocabulary.

Every rank proposes its best few candidates and the mass of its shard; rank 0 merges. Greedy rows exchange one
value and one id a rank. Only where the merged candidates do not decide a draw (a flat distribution without top-k,
or a nucleus wider than the candidates) are that row's logits gathered whole. Arithmetic runs on the host in numpy;
on GPUs the plain greedy rows, the common case, are reduced on the device.
"""

from __future__ import annotations

import numpy as np
import torch

from hexgen.batching.segments import SampledToken, Segment, Step
from hexgen.errors import EngineError
from hexgen.request import TokenLogprobs
from hexgen.worker.communicator import Communicator
from hexgen.worker.config import RankConfig
from hexgen.worker.sampling_math import Doubles, finite
from hexgen.worker.sampling_rows import Merged, Shard, Work, draw_from_all, merge, propose
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
        work: list[Work] = []
        plain: list[int] = []
        for row, segment in enumerate(segments):
            state = self._state(segment.sequence)
            if state.is_plain(segment.end):
                plain.append(row)
            else:
                work.append(Work(row, state, segment.end))
        logits = self._shards_of(local_logits, work)
        parts = self._exchange(self._pack(local_logits, plain, work, logits))
        if self._communicator.rank != 0:
            self._settle([], work, logits)
            return None
        chosen: list[tuple[int, TokenLogprobs | None]] = [(0, None)] * len(segments)
        for row, id_ in zip(plain, _merge_plain(parts, len(plain)), strict=True):
            chosen[row] = (int(id_), None)
        unsure: list[tuple[Work, Merged]] = []
        at = 2 * len(plain)
        for w in work:
            end = at + w.proposal_size(self._vocab_size)
            merged = merge(w, [part[at:end] for part in parts], self._shards, self._vocab_size)
            at = end
            token = merged.draw(w)
            if token is None:
                unsure.append((w, merged))
            else:
                chosen[w.row] = token
        for (w, _), token in zip(unsure, self._settle(unsure, work, logits), strict=True):
            chosen[w.row] = token
        return [
            SampledToken(segment.sequence, token, logprobs)
            for segment, (token, logprobs) in zip(segments, chosen, strict=True)
        ]

    # ---- what a rank proposes ----------------------------------------------------------------------------

    def _state(self, sequence: int) -> SequenceState:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise EngineError(f"the sampler does not know sequence {sequence}") from None

    def _shards_of(self, local_logits: torch.Tensor, work: list[Work]) -> dict[int, Shard]:
        """The worked rows on the host, as the model gave them and adjusted."""
        if not work:
            return {}
        on_host = local_logits.device.type == "cpu"
        host = (local_logits if on_host else local_logits[[w.row for w in work]].cpu()).numpy()
        shards: dict[int, Shard] = {}
        for i, w in enumerate(work):
            raw = finite(host[w.row if on_host else i])
            shards[w.row] = Shard(raw, w.state.adjusted(raw, w.position))
        return shards

    def _pack(
        self, local_logits: torch.Tensor, plain: list[int], work: list[Work], logits: dict[int, Shard]
    ) -> Doubles:
        """Plain rows' maxima, their ids, then the proposals: float64, which holds float32 and ids exactly."""
        sizes = [w.proposal_size(self._vocab_size) for w in work]
        packed: Doubles = np.empty(2 * len(plain) + sum(sizes), dtype=np.float64)
        if plain:
            values, ids = self._maxima(local_logits, plain)
            packed[: len(plain)] = values
            packed[len(plain) : 2 * len(plain)] = ids + self._shard[0]
        at = 2 * len(plain)
        for w, size in zip(work, sizes, strict=True):
            propose(w, logits[w.row], self._shard[0], self._vocab_size, packed[at : at + size])
            at += size
        return packed

    def _maxima(self, local_logits: torch.Tensor, rows: list[int]) -> tuple[Doubles, Ints]:
        """Largest value and its first index, of each row of this shard."""
        if local_logits.shape[1] == 0:
            return np.full(len(rows), -np.inf), np.zeros(len(rows), dtype=np.int64)
        chosen = local_logits if len(rows) == local_logits.shape[0] else local_logits[rows]
        if chosen.device.type == "cpu":
            array = chosen.numpy()
            ids = array.argmax(axis=1)  # several times faster than torch's
            return array[np.arange(len(rows)), ids].astype(np.float64), ids
        largest, at = chosen.max(dim=1)
        both = torch.stack((largest.double(), at.double())).cpu().numpy()
        return both[0], both[1].astype(np.int64)

    # ---- what rank 0 makes of it -------------------------------------------------------------------------

    def _exchange(self, packed: Doubles) -> list[Doubles]:
        """Every rank's numbers, in rank order."""
        if self._communicator.size == 1:
            return [packed]
        parts = self._communicator.all_gather(torch.from_numpy(packed).to(self._device))
        return [part.cpu().numpy() for part in parts]

    # ---- rows that the candidates do not decide ----------------------------------------------------------

    def _settle(
        self, unsure: list[tuple[Work, Merged]], work: list[Work], logits: dict[int, Shard]
    ) -> list[tuple[int, TokenLogprobs | None]]:
        """Gather the unsure rows whole on rank 0, which alone knows them, and draw again there."""
        possible = [w for w in work if not w.params.greedy]
        if not possible:
            return []
        flags = np.zeros(len(possible), dtype=np.int64)
        wanted = {w.row for w, _ in unsure}
        flags[[i for i, w in enumerate(possible) if w.row in wanted]] = 1
        if self._communicator.size > 1:
            shared = torch.from_numpy(flags).to(self._device)
            self._communicator.broadcast(shared)
            flags = shared.cpu().numpy()
        rows = [w.row for w, flag in zip(possible, flags, strict=True) if flag]
        if not rows:
            return []
        self.gathered_rows += len(rows)
        whole = self._gather([logits[row] for row in rows])
        return [draw_from_all(w, m, *whole[i]) for i, (w, m) in enumerate(unsure)]

    def _gather(self, shards: list[Shard]) -> list[tuple[Floats, Floats]]:
        """Whole rows ``(adjusted, raw)`` from every rank's shards."""
        if self._communicator.size == 1:
            return [(shard.adjusted, shard.raw) for shard in shards]
        padded = np.zeros((len(shards), 2, self._widest), dtype=np.float32)
        for i, shard in enumerate(shards):
            padded[i, 0, : shard.adjusted.size] = shard.adjusted
            padded[i, 1, : shard.raw.size] = shard.raw
        parts = self._communicator.all_gather(torch.from_numpy(padded).to(self._device))
        host = [part.cpu().numpy()[:, :, : b - a] for part, (a, b) in zip(parts, self._shards, strict=True)]
        rows = np.concatenate(host, axis=2)
        return [(row[0], row[1]) for row in rows]


def _merge_plain(parts: list[Doubles], count: int) -> Ints:
    """The best id of each plain row over all ranks."""
    if len(parts) == 1:
        return parts[0][count : 2 * count].astype(np.int64)
    values = np.stack([part[:count] for part in parts])
    ids = np.stack([part[count : 2 * count] for part in parts])
    # Shards lie in order, and argmax takes the first of equals: the lowest id wins, as on one rank.
    winners: Ints = ids[values.argmax(axis=0), np.arange(count)].astype(np.int64)
    return winners
