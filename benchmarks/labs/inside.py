"""Run on a laboratory's head: `hexgen discover --model`, which waits between starting its probes and measuring.

python inside.py CLUSTER.yaml MODEL     says `prepared`, then waits for a line on standard input.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hexgen.cli.discover_run import DiscoverRequest, run


def wait() -> None:
    print("prepared", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    run(DiscoverRequest(output=Path(sys.argv[1]), model=sys.argv[2]), wait)
