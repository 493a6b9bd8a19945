"""What a peer's process says and hears: one JSON object a line. Imported by the peers' scripts, in their own
environments: the standard library alone.

    said at the start   {"ready": {"version": ..., "notes": ...}}
    heard               {"prompts": [[ids], ...], "tokens": n}
    answered            {"tokens": [[ids], ...]}   n greedy ones for each prompt, whatever they are
    anything that fails {"error": "..."}, and the end
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], list[list[int]]]


def serve(start: Callable[[], tuple[dict[str, str], Generate]]) -> None:
    """``start`` gives facts about the peer and its ``generate``. What else is printed goes to stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, object]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        facts, generate = start()
        say({"ready": facts})
        for line in sys.stdin:
            job = json.loads(line)
            say({"tokens": generate(job["prompts"], job["tokens"])})
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise
