"""What the simulated cluster is asked: arrival times, prompt and output lengths, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexgen.errors import SpecError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """One entry a request, in order of arrival. Raises ``SpecError`` where arrays do not fit together."""

    arrival_s: Floats  # [requests], non-decreasing, from 0
    prompt_tokens: Ints  # [requests], at least 1
    output_tokens: Ints  # [requests], at least 1

    def __post_init__(self) -> None:
        shapes = {self.arrival_s.shape, self.prompt_tokens.shape, self.output_tokens.shape}
        if len(shapes) != 1 or self.arrival_s.ndim != 1:
            raise SpecError("arrivals, prompts and outputs must be rows of one length", where="requests")
        if len(self) == 0:
            raise SpecError("there are none", where="requests", remedy="ask for at least one")
        if not np.all(np.isfinite(self.arrival_s)) or self.arrival_s[0] < 0 or np.any(np.diff(self.arrival_s) < 0):
            raise SpecError("arrival times must be finite, not negative, and in order", where="requests")
        if self.prompt_tokens.min() < 1 or self.output_tokens.min() < 1:
            raise SpecError("a prompt and an output have at least one token each", where="requests")

    def __len__(self) -> int:
        return int(self.arrival_s.shape[0])

    @property
    def rate(self) -> float:
        """Requests a second over the span of arrivals; infinite where all come at once."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span_s if span_s > 0 else float("inf")

    def at_rate(self, rate: float) -> Requests:
        """The same requests in the same pattern, faster or slower: what comparisons of rates share."""
        return Requests(self.arrival_s * (self.rate / rate), self.prompt_tokens, self.output_tokens)

    def at_once(self) -> Requests:
        """The same requests, all there from the start: what saturates a cluster."""
        return Requests(np.zeros(len(self)), self.prompt_tokens, self.output_tokens)
