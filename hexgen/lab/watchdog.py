"""``python -m hexgen.lab.watchdog NUMBER``: waits for the lab's process to end, then removes what it left behind.

Standard input is a pipe that nobody writes into; its end is the lab's end.
"""

from __future__ import annotations

import signal
import sys
import time

from hexgen.lab.claims import claim
from hexgen.lab.groups import find_groups
from hexgen.lab.teardown import clean

_CLAIM_WITHIN_S = 5.0  # the kernel closes the dead one's files in any order
_POLL_S = 0.05


def main(number: int) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    sys.stdin.buffer.read()
    deadline = time.monotonic() + _CLAIM_WITHIN_S
    while (mine := claim(number)) is None:  # after an orderly end somebody else may have the number by now
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)
    try:
        clean(mine.lab, find_groups())
    finally:
        mine.release()


if __name__ == "__main__":
    main(int(sys.argv[1]))
