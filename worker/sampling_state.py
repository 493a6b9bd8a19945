"""What the sampler remembers of each sequence: its parameters, and of its tokens what penalties need."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hexgen.batching.segments import Admission
from hexgen.request import SamplingParams
from hexgen.split import Range

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class TokenCounts:
    """The distinct tokens of a sequence within one shard of the vocabulary, and how often each was generated."""

    __slots__ = ("_counts", "_ids", "_place", "_shard", "length")

    def __init__(self, shard: Range) -> None:
        self.length = 0  # tokens of the sequence accounted for, those of other shards included
        self._shard = shard
        self._place: dict[int, int] = {}
        self._ids: Ints = np.zeros(16, dtype=np.int64)
        self._counts: Floats = np.zeros(16, dtype=np.float32)

    def add(self, token: int, *, generated: bool) -> None:
        self.length += 1
        if not self._shard[0] <= token < self._shard[1]:
            return
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            if place == self._ids.size:
                self._ids = np.resize(self._ids, 2 * place)
                self._counts = np.resize(self._counts, 2 * place)
            self._ids[place] = token - self._shard[0]
            self._counts[place] = 0
        self._counts[place] += generated

    @property
    def ids(self) -> Ints:
        """Distinct tokens, counted from the shard's start."""
        return self._ids[: len(self._place)]

    @property
    def generated(self) -> Floats:
        """How often each of ``ids`` was generated; 0 for those of the prompt alone."""
        return self._counts[: len(self._place)]


@dataclass(slots=True)
class SequenceState:
    """One admitted sequence on one rank. ``shard`` is the rank's part of the vocabulary."""

    params: SamplingParams
    prompt_tokens: int
    seed: int
    counts: TokenCounts | None
    bias_ids: Ints  # within the shard, from its start
    bias: Floats
    stop_ids: Ints  # within the shard, from its start
    plain: bool = field(init=False)  # its logits choose as they are: greedy, nothing added, nothing reported

    def __post_init__(self) -> None:
        p = self.params
        self.plain = p.greedy and p.logprobs is None and not p.needs_history and not p.logit_bias

    @staticmethod
    def admit(admission: Admission, shard: Range) -> SequenceState:
        params = admission.sampling
        counts = None
        if params.needs_history:
            counts = TokenCounts(shard)
            for i, token in enumerate(admission.history):
                counts.add(token, generated=i >= admission.prompt_tokens)
        biased = [(i, b) for i, b in params.logit_bias.items() if shard[0] <= i < shard[1]]
        stops = [i - shard[0] for i in admission.stop_token_ids if shard[0] <= i < shard[1]]
        return SequenceState(
            params=params,
            prompt_tokens=admission.prompt_tokens,
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            counts=counts,
            bias_ids=np.array([i - shard[0] for i, _ in biased], dtype=np.int64),
            bias=np.array([b for _, b in biased], dtype=np.float32),
            stop_ids=np.array(stops, dtype=np.int64),
        )

    def extend(self, start: int, tokens: tuple[int, ...]) -> None:
        """Take in a segment's tokens, from position ``start`` on; those already known are skipped."""
        if self.counts is not None:
            for token in tokens[max(0, self.counts.length - start) :]:
                self.counts.add(token, generated=self.counts.length >= self.prompt_tokens)

    def is_plain(self, position: int) -> bool:
        """Whether the token at ``position`` is chosen by the largest of the logits as they are, on every rank."""
        return self.plain and position - self.prompt_tokens >= self.params.min_tokens

    def adjusts(self, position: int) -> bool:
        """Whether ``adjust`` would change this shard's logits for the token at ``position``."""
        return self.counts is not None or self.bias_ids.size > 0 or self._bans(position)

    def _bans(self, position: int) -> bool:
        return self.stop_ids.size > 0 and position - self.prompt_tokens < self.params.min_tokens

    def adjust(self, values: Floats, position: int) -> None:
        """Bias, penalties and the ban on early stops, on the shard's logits ``values``, in place.

        Order: logit_bias; repetition penalty over prompt and output (Keskar et al., arXiv:1909.05858, section
        4.1); frequency, then presence penalty over the output; stop ids masked until ``min_tokens``.
        """
        p = self.params
        values[self.bias_ids] += self.bias
        if self.counts is not None and self.counts.ids.size:
            ids, generated = self.counts.ids, self.counts.generated
            seen = values[ids]
            if p.repetition_penalty != 1.0:
                penalty = np.float32(p.repetition_penalty)
                seen = np.where(seen > 0, seen / penalty, seen * penalty)
            seen -= np.float32(p.frequency_penalty) * generated
            seen -= np.float32(p.presence_penalty) * (generated > 0)
            values[ids] = seen
        if self._bans(position):
            values[self.stop_ids] = -np.inf

    def uniform(self, position: int) -> float:
        """The one random number in [0, 1) that chooses the token at ``position``.

        A function of the seed and of the place in the output alone: neither the batch, nor a preemption, nor the
        plan can change it. Counter-based: SplitMix64's mixing (Steele et al., OOPSLA 2014, figure 5), twice.
        """
        place = position - self.prompt_tokens
        bits = _mix(_mix((self.seed + _GOLDEN) & _MASK) ^ ((place + 1) * _GOLDEN & _MASK))
        return (bits >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
