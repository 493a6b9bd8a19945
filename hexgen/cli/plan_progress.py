"""A search as it goes, on a terminal's standard error: nothing where that is a pipe or a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hexgen.scheduler.progress import OnProgress, Progress

_REFRESHES_S = 8  # a second
_QUIET_S = 0.5  # a search that ends sooner shows nothing


class _Line:
    """The latest figures; rendered anew at each refresh, so that the seconds go on between reports."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.started = time.monotonic()
        self.latest: Progress | None = None

    def __rich__(self) -> Text:
        seconds = time.monotonic() - self.started
        return Text("" if seconds < _QUIET_S else progress_text(self.latest, seconds, self.label), style="dim")


def progress_text(latest: Progress | None, seconds: float, label: str = "searching") -> str:
    """``searching: 1,934 tokens/s, bound 2,502, gap 22.7%, 3.2 s (pricing)``."""
    parts: list[str] = []
    if latest is not None and latest.best_tokens_s > 0:
        parts.append(f"{latest.best_tokens_s:,.0f} tokens/s")
    if latest is not None and latest.bound_tokens_s:
        parts.append(f"bound {latest.bound_tokens_s:,.0f}")
        if latest.best_tokens_s > 0 and latest.gap is not None:
            parts.append(f"gap {latest.gap:.1%}")
    parts.append(f"{seconds:.1f} s")
    phase = f" ({latest.phase})" if latest is not None and latest.phase else ""
    return f"{label}: {', '.join(parts)}{phase}"


@contextmanager
def search_shown(wanted: bool = True, label: str = "searching") -> Iterator[OnProgress | None]:
    """What the planner is to call while it searches; None where there is nobody to look."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    line = _Line(label)

    def report(progress: Progress) -> None:
        line.latest = progress

    console = Console(stderr=True, highlight=False)
    with Live(line, console=console, refresh_per_second=_REFRESHES_S, transient=True):
        yield report
