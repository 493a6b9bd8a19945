"""What a search tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """The search so far. Zero and None where nothing is known yet; ``phase`` in a few words for people."""

    best_tokens_s: float  # of the best plan so far; 0.0 before the first
    bound_tokens_s: float | None  # proven: no plan serves more
    elapsed_s: float
    phase: str = ""

    @property
    def gap(self) -> float | None:
        """How far the best plan may be from the best possible, as a share of the latter; None while unknown."""
        if self.bound_tokens_s is None or self.bound_tokens_s <= 0:
            return None
        return max(0.0, 1 - self.best_tokens_s / self.bound_tokens_s)


OnProgress = Callable[[Progress], None]
