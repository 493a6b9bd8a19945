"""What happened to one request, as its client saw it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from hexgen.bench.asks import Ask


@dataclass(slots=True)
class Record:
    """Times are seconds on one clock (``time.perf_counter``), NaN before they have come.

    ``times`` has an entry for each piece of the answer: a token as a rule, several where a server sends them
    together. A request is done when it ``completed`` or has an ``error``; else the run was ended before it.
    """

    ask: Ask
    due_s: float
    sent_s: float = float("nan")
    times: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int = 0
    output_tokens: int = 0
    server_queue_s: float = float("nan")  # arrival to route, and to the first token, by the server's own count,
    server_ttft_s: float = float("nan")  # where it tells
    completed: bool = False
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.sent_s

    @property
    def latency_s(self) -> float:
        """From sending to the last token."""
        return self.times[-1] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """NaN for a single token."""
        if self.output_tokens < 2:
            return float("nan")
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run: its requests in the order in which they were due, and its span on their clock."""

    records: tuple[Record, ...]
    started_s: float
    ended_s: float
    stopped: bool  # by a person, before all was done

    @property
    def duration_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def completed(self) -> list[Record]:
        return [record for record in self.records if record.completed]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.error is not None]
