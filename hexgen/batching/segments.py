"""A step and its segments: what the batching policy emits, the workers run and the simulator replays."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from hexgen.request import SamplingParams, TokenLogprobs


class SegmentKind(IntEnum):
    """Numbers are part of the wire format between stages."""

    PREFILL = 0  # prompt tokens (or recomputed ones), causal among themselves
    DECODE = 1  # one token
    # TREE = 2 (speculation) and FINETUNE = 3 come later.


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one sequence inside one step.

    ``start`` is the position of the first token. ``new_pages`` are the pages appended to the sequence's page
    table before the run's keys and values are written. ``sample``: the last token's logits choose the next token.
    """

    sequence: int  # unique on its route while it lives
    kind: SegmentKind
    start: int
    tokens: tuple[int, ...]
    new_pages: tuple[int, ...] = ()
    sample: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence enters the route (again, after preemption): what later segments refer to by number.

    ``pages`` are pages already filled: a cached prefix shared with other sequences. ``history`` is every token
    so far, sent only where the sampler needs it (penalties); ``prompt_tokens`` of them are prompt.
    """

    sequence: int
    sampling: SamplingParams
    prompt_tokens: int
    pages: tuple[int, ...] = ()
    history: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # ids that end it (eos unless ignored, and the request's own)


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of a route over a batch of segments: released first, then admitted, then run.

    Steps of a route run in the order of their numbers on every stage. Within a layer, the keys and values of all
    segments are written before any segment attends: an admitted sequence may share pages that another segment of
    the same step fills. The order of segments carries no meaning.
    """

    route: int
    number: int
    released: tuple[int, ...] = ()  # sequences finished, aborted or preempted
    admitted: tuple[Admission, ...] = ()
    segments: tuple[Segment, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(len(s.tokens) for s in self.segments)

    @property
    def sampled(self) -> tuple[Segment, ...]:
        return tuple(s for s in self.segments if s.sample)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the last stage chose for one sampling segment of a step."""

    sequence: int
    token: int
    logprobs: TokenLogprobs | None = None  # set where the request asked for them
