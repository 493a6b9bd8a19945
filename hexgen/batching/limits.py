"""What the batching policy is told about its route, and what it reports of itself."""

from __future__ import annotations

from dataclasses import dataclass

from hexgen.errors import SpecError


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Every figure is of one route. Raises ``SpecError`` on one that is out of range."""

    pages: int  # KV pages on every stage of the route
    page_size: int  # tokens
    token_budget: int  # tokens of one step, over all its segments
    max_sequences: int  # running at the same time
    max_context: int  # tokens of one sequence, prompt and output
    depth: int = 1  # steps in flight: the number of stages of the route
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        least = {
            "pages": 1,
            "page_size": 1,
            "token_budget": 1,
            "max_sequences": 1,
            "max_context": 2,
            "depth": 1,
        }
        for name, minimum in least.items():
            value: int = getattr(self, name)
            if value < minimum:
                raise SpecError(f"{name} must be at least {minimum}, not {value}", where="batching limits")
        if self.context < 2:
            raise SpecError(
                "the route's KV pages hold a single token; a prompt and its answer need two",
                where="batching limits",
                remedy="leave the route more memory for keys and values, or make its pages larger",
            )

    @property
    def context(self) -> int:
        """The longest sequence, in tokens: one alone must fit into the pool, or it could never finish."""
        return min(self.max_context, self.pages * self.page_size)


@dataclass(frozen=True, slots=True)
class BatchStats:
    """The policy's state and its counters since the start; names as in ``hexgen.protocol.Stats``."""

    running: int
    waiting: int
    in_flight: int  # steps
    free_pages: int  # unreferenced pages, cached ones included
    total_pages: int
    steps: int
    preemptions: int
    cached_tokens: int  # prompt tokens served from the prefix cache
    prompt_tokens: int
    output_tokens: int
