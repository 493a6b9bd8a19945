"""What the commands that run an engine share: stopping cleanly, progress, and messages on stderr."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hexgen.errors import SpecError
from hexgen.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from hexgen.deploy.ray_deployment import OnProgress, RayDeployment, StageProgress

LINE_INTERVAL_S = 5.0
CAUSE_WAIT_S = 5.0
_PIPED_WIDTH = 140

WORKLOAD = (
    "What is asked: a YAML file, a .csv trace, or text: prompt=763,output=232 with rate, ttft, tpot or latency, "
    "like rate=2.5 or ttft=2s (default: the cluster file's, else a chat)."
)
COST = (
    "A table of times in place of the catalogue's figures: published ones, or this cluster's own as `hexgen "
    "discover --model` writes it."
)

PlanArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[PLAN]", help="A plan file (default: one is made for this machine or the Ray cluster)."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A Hugging Face folder with safetensors (default: the plan's, else demo)."),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address", help="HOST:PORT of a Ray cluster's head (default: RAY_ADDRESS, else a local instance)."
    ),
]
WorkloadOption = Annotated[
    str | None,
    typer.Option("--workload", help=WORKLOAD),
]
CostOption = Annotated[
    Path | None,
    typer.Option("--cost", help=COST),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")]


def say(text: str) -> None:
    """A message for a person: stdout belongs to results."""
    print(text, file=sys.stderr, flush=True)


def tables_console() -> Console:
    """Standard output for tables. What people name things is text: no brackets of it are taken for styles."""
    from rich.console import Console

    # Piped, the width of a screen is unknown; tables folded to 80 columns are hard to read.
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def given_text(option: str, text: str | None) -> None:
    """Raises ``SpecError`` for an option that says nothing: often a script's variable that is not set."""
    if text is not None and not text.strip():
        raise SpecError("is empty", where=option, remedy="give it a value, or leave it out")


class StopSignals:
    """Ctrl-C and SIGTERM end a command once, and everything it started with it.

    The first signal calls ``on_stop`` where one is set, else raises ``KeyboardInterrupt`` or ``SystemExit(143)``,
    so that ``finally`` blocks run. Later ones, and all after ``shield()``, cannot cut the clean-up short: its time
    is bounded.
    """

    def __init__(self) -> None:
        self._on_stop: Callable[[], None] | None = None
        self._shielded = False
        self._ended_by: BaseException | None = None  # what a signal raised
        self._before: dict[int, Any] = {}

    @property
    def on_stop(self) -> Callable[[], None] | None:
        return self._on_stop

    @on_stop.setter
    def on_stop(self, stop: Callable[[], None] | None) -> None:
        if self._ended_by is not None:
            raise self._ended_by  # a library lost it, and went on
        self._on_stop = stop

    def shield(self) -> None:
        """From here on things are ended anyway."""
        self._shielded = True

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._ended_by is not None and isinstance(error, Exception | SystemExit):
            # Raised inside a library's import or wait, which may make an error or an exit of its own out of it.
            raise self._ended_by from None
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            # Ray's own handler, which stands while it connects, takes the signal's number for the exit status.
            raise SystemExit(128 + signal.SIGTERM) from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._shielded:
            say("still stopping ...")
            return
        self._shielded = True
        say("stopping ...")
        if self.on_stop is not None:
            self.on_stop()
        else:
            self._ended_by = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
            raise self._ended_by


@contextmanager
def shown_progress(quiet: bool = False) -> Iterator[OnProgress | None]:
    """Bytes read of bytes needed, for each stage: a bar on a terminal, now and then a line elsewhere."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stages: Sequence[StageProgress]) -> None:
            for stage in stages:
                if stage.stage not in tasks:
                    tasks[stage.stage] = progress.add_task(stage.stage, total=None)
                progress.update(tasks[stage.stage], completed=stage.done_bytes, total=stage.total_bytes or None)

        yield show


def _lines() -> OnProgress:
    complete: set[str] = set()
    last = time.monotonic()

    def show(stages: Sequence[StageProgress]) -> None:
        nonlocal last
        due = time.monotonic() - last >= LINE_INTERVAL_S
        for stage in stages:
            finished = 0 < stage.total_bytes <= stage.done_bytes
            if stage.stage in complete or not (finished or (due and stage.total_bytes)):
                continue
            if finished:
                complete.add(stage.stage)
            say(f"loading {stage.stage}: {format_bytes(stage.done_bytes)} of {format_bytes(stage.total_bytes)}")
        if due:
            last = time.monotonic()

    return show


def say_remarks(deployment: RayDeployment) -> None:
    for remark in deployment.remarks:
        say(f"note: {remark}")


def raise_cause(deployment: RayDeployment) -> None:
    """When requests failed: raise what ended the deployment, once it is known; return where it still runs."""
    deadline = time.monotonic() + CAUSE_WAIT_S
    while time.monotonic() < deadline:
        failure = deployment.failure()
        if failure is not None:
            raise failure
        time.sleep(0.1)


def check_target(path: Path) -> None:
    """Before minutes are spent on what it is for: can the file be written? Raises ``SpecError``."""
    folder = path.parent
    if path.is_dir():
        raise SpecError("is a folder, not a file", where=str(path), remedy="name a file in it")
    if not folder.is_dir():
        raise SpecError(
            "cannot be written: there is no such folder", where=str(path), remedy=f"make {folder} first"
        )
    try:  # who may write anything is not told by permissions alone
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror}", where=str(path)) from error
