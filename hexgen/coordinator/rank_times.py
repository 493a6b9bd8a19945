"""Where the ranks' time went: asked of the deployment when somebody looks, and remembered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from hexgen.errors import HexgenError
from hexgen.worker.report import RankReport

_WAIT_S = 3.0  # for the ranks to answer; after that, what they said last stands
_FRESH_S = 0.1  # several who look at once are told the same


class RankTimes:
    """``ask`` gives each rank's report by device, and may block; None where nobody can be asked.

    One event loop. The ranks are asked by a thread, one call at a time, however many look.
    """

    def __init__(self, ask: Callable[[], Mapping[str, RankReport]] | None) -> None:
        self._ask = ask
        self._last: tuple[RankReport, ...] = ()
        self._asked_s = float("-inf")
        self._running: asyncio.Task[None] | None = None

    @property
    def last(self) -> tuple[RankReport, ...]:
        """By stage and rank; empty before the first look."""
        return self._last

    async def refresh(self) -> None:
        """Bring ``last`` up to date, within three seconds; a rank that does not answer leaves it as it was."""
        if self._ask is None or time.monotonic() - self._asked_s < _FRESH_S:
            return
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._fetch(self._ask))
        # Not cancelled by one caller's patience: others wait for the same answer.
        await asyncio.wait((self._running,), timeout=_WAIT_S)

    async def _fetch(self, ask: Callable[[], Mapping[str, RankReport]]) -> None:
        try:
            reports = await asyncio.to_thread(ask)
        except HexgenError:  # a deployment that is ending; its own failure is told elsewhere
            return
        self._last = tuple(sorted(reports.values(), key=lambda report: (report.stage, report.rank)))
        self._asked_s = time.monotonic()
