"""What the two kinds of clients share: how a server is looked at, and what an answer is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from hexgen.bench.record import Record

MAX_REASON_CHARS = 200


class AnswerError(Exception):
    """Why one request failed, in words short enough to be counted."""

    def __init__(self, reason: str) -> None:
        text = " ".join(reason.split())
        super().__init__(text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 3] + "...")


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """None: the server does not say."""

    model: str
    max_context: int | None = None
    vocab_size: int | None = None
    owner: str = ""


@dataclass(frozen=True, slots=True)
class RankSeconds:
    """Where one rank's time went since it started."""

    stage: str
    rank: int
    steps: int
    compute_s: float
    wait_s: float
    transfer_s: float
    host_s: float


@dataclass(frozen=True, slots=True)
class ServerState:
    """What a hexgen server counts. ``totals`` holds sums since its start, by name; a name may be missing.
    ``layers``: of each stage that it runs, [first, end)."""

    ranks: tuple[RankSeconds, ...] = ()
    totals: dict[str, float] = field(default_factory=dict)
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)


class Client(Protocol):
    """``backend`` is what the result calls it; ``where`` is the server."""

    @property
    def backend(self) -> str: ...
    @property
    def where(self) -> str: ...

    async def look(self) -> ServerFacts:
        """Raises ``UnavailableError`` where no server answers, ``SpecError`` where it refuses us."""

    async def answer(self, record: Record) -> None:
        """Ask, and fill in ``record`` as the answer comes. Raises ``AnswerError``."""

    async def state(self) -> ServerState:
        """Empty where the server is not one of ours."""

    async def close(self) -> None: ...
