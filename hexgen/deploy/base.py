"""What every deployment offers, wherever its ranks run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hexgen.errors import HexgenError
from hexgen.worker.report import RankReport


@dataclass(frozen=True, slots=True)
class RouteEndpoint:
    """Where the coordinator reaches the head of a route; ``weight`` is the plan's."""

    route: int
    weight: float
    host: str
    port: int


class Deployment(Protocol):
    """A plan that is running. ``stop`` may be called more than once, and after a failure."""

    @property
    def secret(self) -> str:
        """What a connection to an endpoint must show first (hex)."""

    def endpoints(self) -> tuple[RouteEndpoint, ...]: ...

    def reports(self) -> dict[str, RankReport]:
        """By device id."""

    def failure(self) -> HexgenError | None:
        """Why it no longer serves; None while it does."""

    def stop(self) -> None: ...
