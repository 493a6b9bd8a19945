"""Stop strings, wherever the tokens' boundaries fall."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until a stop string is complete; what may be the beginning of one waits.

    The outcome does not depend on how the text is cut into pieces: the stop string that is complete first wins
    (the longest, where several end at the same character), and the text ends before it.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may go out now. ``matched`` is set once a stop string is complete."""
        if not self._stops or not text:
            return text
        buffer = self._held + text
        end, start = min(
            ((at + len(stop), at) for stop in self._stops if (at := buffer.find(stop)) >= 0), default=(0, 0)
        )
        if end:
            self.matched, self._held = buffer[start:end], ""
            return buffer[:start]
        held = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - held :]
        return buffer[: len(buffer) - held]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ``text`` ends with."""
    longest = min(len(text), len(stop) - 1)
    # Only where the first character of the stop occurs can it begin.
    at = text.find(stop[0], len(text) - longest)
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0
