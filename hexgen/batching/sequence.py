"""One sequence as the batching policy sees it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from hexgen.batching.prefix_cache import PageDigests
from hexgen.request import FinishReason, SamplingParams


@dataclass(slots=True, eq=False)  # compared by identity: a number may live again after an abort
class SequenceState:
    """Tokens, pages and progress. ``computed`` tokens have their keys and values in pages, or in a step that was
    formed already; they are always a prefix of ``tokens``."""

    number: int
    arrival: int  # lower came earlier
    tokens: array[int]  # the prompt, then the output
    prompt_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]
    stops: frozenset[int]
    digests: PageDigests | None  # None: no prefix cache
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    registered: int = 0  # full pages that the prefix cache knows of
    running: bool = False
    awaiting: bool = False  # a token of it was asked for and is not back yet
    ended: bool = False
    admissions: int = 0

    @property
    def remaining(self) -> int:
        """Tokens that are known and not yet computed."""
        return len(self.tokens) - self.computed

    def finish_reason(self, context: int) -> FinishReason | None:
        """Why the sequence ends with its last token, if it does. ``context`` is the longest it may become."""
        tokens = len(self.tokens)
        outputs = tokens - self.prompt_tokens
        if self.tokens[-1] in self.stops and outputs >= self.sampling.min_tokens:
            return "stop"
        if outputs >= self.sampling.max_tokens or tokens >= context:
            return "length"
        return None
