"""The grid of loads that a model's layers are timed under, and each point as a step of segments. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from hexgen.batching.segments import Admission, Segment, SegmentKind, Step
from hexgen.request import SamplingParams

PREFILL_TOKENS = (16, 64, 256, 512)
DECODE_SEQUENCES = (1, 2, 4, 8, 16, 64)
CONTEXTS = (16, 128, 512, 2048)


@dataclass(frozen=True, slots=True)
class Load:
    """``runs`` of (first position, tokens), each of a sequence of its own: one step's."""

    runs: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(length for _, length in self.runs)

    @property
    def attended(self) -> float:
        """Positions that the new tokens attend to, summed over them: each to all before it and to itself."""
        return sum(length * start + length * (length + 1) / 2 for start, length in self.runs)


def contexts(max_context: int) -> tuple[int, ...]:
    """Positions that a token attends to, up to what the model takes."""
    fitting = [c for c in CONTEXTS if c < max_context]
    return tuple(fitting) if len(fitting) == len(CONTEXTS) else (*fitting, max_context - 1)


def decode_load(sequences: int, context: int) -> Load:
    """One token of each sequence, which attends to ``context`` positions, its own with them."""
    return Load(((context - 1, 1),) * sequences)


def prefill_load(tokens: int, seen: int, max_context: int) -> Load:
    """``tokens`` prompt tokens that attend to ``seen`` positions on average.

    Whole prompts of 2 x ``seen`` tokens where that is less than all of them (a prompt's tokens attend to half of
    it), else one chunk that begins far enough into its prompt, as far as the context allows.
    """
    prompt = max(2, min(2 * seen, tokens))
    if 2 * seen < tokens:
        whole, rest = divmod(tokens, prompt)
        lengths = [prompt] * whole + ([rest] if rest else [])
        return Load(tuple((0, length) for length in lengths))
    start = min(max(0, round(seen - (tokens + 1) / 2)), max(0, max_context - tokens))
    return Load(((start, tokens),))


def step_of(load: Load, number: int, first: int, pages: int, page_size: int, sample: bool) -> tuple[Step, Step]:
    """(the step that admits the load's sequences, with pages for all they see; the step to run again and again).

    Sequences are numbered from ``first``. Pages are taken in turn from ``pages``, and again from the first where
    these run out: two sequences may then write to one page, which costs the same time as two.
    """
    admitted, segments, next_page = [], [], 0
    for i, (start, length) in enumerate(load.runs):
        held = -(-(start + length) // page_size)
        table = tuple((next_page + j) % pages for j in range(held))
        next_page += held
        admitted.append(Admission(first + i, SamplingParams(temperature=0.0), start + length, pages=table))
        kind = SegmentKind.DECODE if length == 1 and start else SegmentKind.PREFILL
        segments.append(Segment(first + i, kind, start, (1,) * length, (), sample))
    return Step(0, number, admitted=tuple(admitted)), Step(0, number + 1, segments=tuple(segments))
