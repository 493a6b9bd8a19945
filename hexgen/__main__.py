"""The ``hexgen`` command, and ``python -m hexgen``. Signals are handled from the first line on."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

_STARTED_S = time.monotonic()  # limits of time count from here: imports take a second or two


def _end(number: int, frame: FrameType | None) -> None:
    """Nothing is started yet. An exception could be lost in some library's import, and the command would go on."""
    os._exit(128 + number)


def main() -> None:
    """Entry point; never returns normally (``SystemExit`` carries the status)."""
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    from hexgen import cli

    for number, handler in before.items():
        signal.signal(number, handler)
    cli.main(started_s=_STARTED_S)


if __name__ == "__main__":
    main()
