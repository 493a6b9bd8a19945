"""A survey as it goes: a bar on a terminal's standard error, a line for each part elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hexgen.cli._common import say

if TYPE_CHECKING:
    from hexgen.discover.survey import OnProgress


@contextmanager
def discover_shown(quiet: bool = False) -> Iterator[OnProgress]:
    """What the survey is to call: (what is under way, steps done, steps in all); no name only passes time."""
    if quiet:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as progress:
        task = progress.add_task("asking the nodes", total=None)

        def show(what: str, done: int, total: int) -> None:
            if what:
                progress.update(task, description=what, completed=done, total=total)

        yield show


def _lines() -> OnProgress:
    said: set[str] = set()

    def show(what: str, done: int, total: int) -> None:
        if what and what not in said:
            said.add(what)
            say(f"{what} ...")

    return show
