"""The door: what is refused because it is wrong, and what because too much is waiting already."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from hexgen.errors import QueueFullError, RequestError
from hexgen.routing import Need


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How much may wait for room on a route."""

    max_waiting_requests: int = 256
    max_waiting_tokens: int = 1_000_000  # of prompts


class Waiting(Protocol):
    @property
    def need(self) -> Need: ...


W = TypeVar("W", bound=Waiting)

_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0
_RATE_MEMORY = 0.9  # weight of the past in the moving average of finished requests per second


class FinishRate:
    """Requests finished per second: an exponential moving average over the gaps between finishes."""

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._gap_s: float | None = None

    def finished(self, now_s: float) -> None:
        if self._last_s is not None:
            gap = max(now_s - self._last_s, 1e-6)
            self._gap_s = gap if self._gap_s is None else _RATE_MEMORY * self._gap_s + (1 - _RATE_MEMORY) * gap
        self._last_s = now_s

    def wait_s(self, requests: int, now_s: float) -> float:
        """Seconds until ``requests`` more will have finished, between 1 and 60."""
        if self._gap_s is None or self._last_s is None:
            return _MIN_RETRY_S
        # Nothing has finished for longer than usual: the figure is out of date by that much.
        gap = max(self._gap_s, (now_s - self._last_s) / 10)
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, requests * gap))


class AdmissionQueue(Generic[W]):
    """First come, first served, and finite."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.rate = FinishRate()
        self.tokens = 0
        self._items: deque[W] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def push(self, item: W, now_s: float) -> None:
        """Queue ``item``; ``QueueFullError`` with ``retry_after_s`` where it would be too much."""
        tokens = item.need.prompt_tokens
        limits = self.limits
        full_tokens = self.tokens + tokens > limits.max_waiting_tokens and bool(self._items)
        if len(self._items) >= limits.max_waiting_requests or full_tokens:
            error = QueueFullError(
                f"{len(self._items)} requests with {self.tokens} prompt tokens are waiting already",
                remedy="try again later",
            )
            error.retry_after_s = self.rate.wait_s(len(self._items), now_s)
            raise error
        self._items.append(item)
        self.tokens += tokens

    def remove(self, item: W) -> bool:
        """Take ``item`` out, wherever it stands; False where it was not waiting."""
        try:
            self._items.remove(item)
        except ValueError:
            return False
        self.tokens -= item.need.prompt_tokens
        return True

    def snapshot(self) -> tuple[W, ...]:
        return tuple(self._items)


def check_prompt(prompt: Sequence[int], vocab_size: int, max_context: int) -> None:
    """Refuse a prompt that no route could run."""
    if not prompt:
        raise RequestError("is empty", where="prompt", remedy="send at least one token")
    if len(prompt) >= max_context:
        raise RequestError(
            f"has {len(prompt)} tokens, and the context of {max_context} must hold one more",
            where="prompt",
            remedy=f"send at most {max_context - 1} tokens",
        )
    # Whole-sequence operations: a long prompt is checked in well under a millisecond.
    if set(map(type, prompt)) != {int}:
        raise RequestError("must hold whole numbers, the token ids", where="prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise RequestError(
            f"{str(wrong)[:40] if abs(wrong) < 10**30 else 'a very large number'} is not a token id "
            f"between 0 and {vocab_size - 1}",
            where="prompt",
        )
