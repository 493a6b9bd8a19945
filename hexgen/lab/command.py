"""The command that a lab runs: on the head, in the foreground, with signals passed on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from hexgen.errors import SpecError
from hexgen.lab.namespaces import Door

# After SIGTERM: as long as `hexgen serve` takes to let running requests end and to stop its workers.
STOP_GRACE_S = 45.0
_POLL_S = 0.1


class Signals:
    """From ``with`` on, SIGINT, SIGTERM and SIGHUP end the lab in good order, whenever they come.

    Before and after the command they raise (``KeyboardInterrupt`` or ``SystemExit``) once, so that ``finally``
    blocks run; while it runs they are passed on to it; during the clean-up they are noted and nothing more.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: int | None = None
        self.shielded = False
        self.pass_on: Callable[[int], None] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in self._NUMBERS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        self.received = self.received or number
        if self.pass_on is not None:
            self.pass_on(number)
        elif first and not self.shielded:
            self.shielded = True
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def run(door: Door, command: Sequence[str], environment: Mapping[str, str], signals: Signals,
        watch: Callable[[], None]) -> int:  # fmt: skip
    """Run ``command`` to its end; its exit status as a shell would say it. ``watch`` is called now and then.

    A terminal's Ctrl-C reaches the command by itself, and need not mean its end. A signal to us alone is passed
    on; a command that goes on for ``STOP_GRACE_S`` after that is left to the clean-up, which kills it.
    """
    deadline: float | None = None
    terminal = any(os.isatty(descriptor) for descriptor in (0, 1, 2))
    process = subprocess.Popen(door.command(command), env=dict(environment))

    def pass_on(number: int) -> None:
        nonlocal deadline
        if number == signal.SIGINT and terminal:
            return
        if process.poll() is None:
            process.send_signal(number)
        if deadline is None:
            deadline = time.monotonic() + STOP_GRACE_S

    signals.pass_on = pass_on
    try:
        while True:
            try:
                status = process.wait(_POLL_S)
                break
            except subprocess.TimeoutExpired:
                watch()
                if deadline is not None and time.monotonic() > deadline:
                    status = -signal.SIGKILL
                    break
    finally:
        signals.shielded = True
        signals.pass_on = None
    return status if status >= 0 else 128 - status


def check_found(name: str) -> None:
    """Before anything is built. Raises ``SpecError``."""
    if shutil.which(name, path=_path()) is None:
        raise SpecError(f"the command {name!r} was not found", remedy="give its path, or put it on PATH")


def command_environment(additions: Mapping[str, str]) -> dict[str, str]:
    """Ours, with ``additions``; the ``hexgen`` that made the lab is the first that the command finds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return environment | {"PATH": _path()} | dict(additions)


def _path() -> str:
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
