"""A step of a simulated route: who is in it, and what it asks of the stages."""

from __future__ import annotations

import math
from typing import NamedTuple

from hexgen.scheduler.simulation.cohort import Cohort, CountedSequence, Part

Windows = tuple[tuple[int | None, int], ...]  # sliding window, how many layers have it; () for none at all


class Returned(NamedTuple):
    """What a step that is back has brought."""

    tokens: int  # to clients
    gaps: list[tuple[float, int]]  # seconds since the token before, and how many tokens came after such a time
    began: list[CountedSequence]  # their first token
    ended: list[CountedSequence]


class CountedStep:
    """A step in flight: sequences that decode, and chunks of others. One of decodes alone may come back and leave
    again many times as it is.

    It has the fields of a `StepLoad`, with whole numbers, and is given to stages as one. ``order``: where older
    sequences were served first, all that sample, in the order in which they will be ready.
    """

    __slots__ = (
        "attended", "chunks", "cohort", "finishing", "kv_read", "order", "plain", "prefill_attended",
        "prefill_kv_read", "prefill_sequences", "prefill_tokens", "samples", "seconds", "sequences", "tokens",
    )  # fmt: skip

    def __init__(self, parts: list[Cohort | Part], page: int, windows: Windows) -> None:
        cohort: Cohort | None = None
        singles: list[CountedSequence] = []  # that decode, and are in no cohort yet
        self.chunks: list[Part] = []
        self.finishing: list[CountedSequence] = []  # whose last chunk this is: a token will come
        self.order: list[CountedSequence] | None = None
        for part in parts:
            if isinstance(part, Cohort):
                cohort = part
            elif part[4]:
                singles.append(part[0])
            else:
                self.chunks.append(part)
                if part[3]:
                    self.finishing.append(part[0])
        if singles:
            cohort = Cohort.of(singles, page, sent=True)
            if self.finishing:
                self.order = [part[0] for part in parts if not isinstance(part, Cohort) and part[3]]
        self.cohort = cohort
        decodes = seen = 0
        if cohort is not None:
            decodes, seen = cohort.size, cohort.total
        self.seconds: list[float] = []  # on each stage of the route
        self.tokens = self.sequences = decodes
        self.samples = decodes + len(self.finishing)
        self.attended = self.kv_read = float(seen)
        self.prefill_tokens = self.prefill_sequences = 0
        self.prefill_attended = self.prefill_kv_read = 0.0
        if windows and cohort is not None:
            held = [_windowed(state.base + cohort.rounds, windows) for state in cohort]
            self.attended = self.kv_read = math.fsum(held)
        if self.chunks:
            self._add_chunks(windows)
        # One token of each sequence: its cost is that of decodes, also where one is a prompt's last.
        self.plain = self.tokens == self.samples == self.sequences > 0

    def _add_chunks(self, windows: Windows) -> None:
        """Of chunks longer than one token: tokens, positions seen, KV read, sequences. A prompt's lone last token
        is a decode to a stage.
        """
        tokens = count = 0
        seen = read = lone = 0.0
        for _, start, end, _, _ in self.chunks:
            self.tokens += end - start
            self.sequences += 1
            held = end if not windows else _windowed(end, windows)
            if end == start + 1:
                lone += held
            else:
                tokens += end - start
                count += 1
                seen += _attended(start, end, windows)
                read += held
        self.attended += lone + seen
        self.kv_read += lone + read
        self.prefill_tokens, self.prefill_sequences = tokens, count
        self.prefill_attended, self.prefill_kv_read = seen, read


def _windowed(context: int, windows: Windows) -> float:
    layers = sum(n for _, n in windows)
    return sum(n * (context if w is None else min(context, w)) for w, n in windows) / layers


def _attended(start: int, end: int, windows: Windows) -> float:
    """Positions attended to by the tokens at [start, end), each to itself and all before it, windows averaged."""
    if not windows:
        return (end - start) * (start + end + 1) / 2
    layers = sum(n for _, n in windows)
    return sum(n * _attended_within(start, end, w) for w, n in windows) / layers


def _attended_within(start: int, end: int, window: int | None) -> float:
    if window is None or end <= window:
        return (end - start) * (start + end + 1) / 2
    growing = max(0, window - start)  # tokens whose whole past is inside the window
    return growing * (start + start + growing + 1) / 2 + (end - start - growing) * window
