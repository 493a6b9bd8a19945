"""The engine's own `Batcher`, as the simulator sees it: every token of every sequence, one by one.

Slow. What counting (`counted.py`) must agree with, to the last token.
"""

from __future__ import annotations

from collections import deque

from hexgen.batching.batcher import Batcher
from hexgen.batching.limits import BatchLimits
from hexgen.batching.segments import SampledToken, Segment, SegmentKind
from hexgen.request import SamplingParams
from hexgen.scheduler.simulation.cohort import CountedSequence
from hexgen.scheduler.simulation.step import CountedStep, Returned, Windows


class TokenwiseBatcher:
    """In place of a `CountedBatcher`."""

    def __init__(self, limits: BatchLimits, windows: Windows = ()) -> None:
        self.limits = limits
        self.in_flight: deque[CountedStep] = deque()
        self._windows = windows
        self._real = Batcher(limits)
        self._known: dict[int, CountedSequence] = {}
        self._sent: deque[tuple[int, list[Segment]]] = deque()  # of each step in flight: its number, who samples
        self._added = 0

    @property
    def free_pages(self) -> int:
        return self._real.free_pages

    @property
    def running(self) -> int:
        return self._real.running

    @property
    def waiting(self) -> int:
        return self._real.waiting

    @property
    def steps(self) -> int:
        return self._real.stats().steps

    @property
    def preemptions(self) -> int:
        return self._real.stats().preemptions

    def add(self, prompt: int, output: int, request: int) -> None:
        self._real.add(self._added, (0,) * prompt, SamplingParams(max_tokens=output, ignore_eos=True))
        self._known[self._added] = CountedSequence(self._added, prompt, prompt + output, request)
        self._added += 1

    def next_step(self) -> CountedStep | None:
        step = self._real.next_step()
        if step is None:
            return None
        parts = [
            (self._known[s.sequence], s.start, s.end, s.sample, False)
            for s in sorted(step.segments, key=lambda s: s.kind != SegmentKind.DECODE)
        ]
        made = CountedStep([*parts], self.limits.page_size, self._windows)
        self.in_flight.append(made)
        self._sent.append((step.number, list(step.sampled)))
        return made

    def complete(self, now_s: float) -> Returned:
        self.in_flight.popleft()
        number, sampled = self._sent.popleft()
        events = self._real.complete(number, [SampledToken(s.sequence, 1) for s in sampled])
        gaps: list[tuple[float, int]] = []
        began: list[CountedSequence] = []
        ended: list[CountedSequence] = []
        for event in events:
            state = self._known[event.request]
            state.known += 1
            if state.first:
                state.first = False
                began.append(state)
            else:
                gaps.append((now_s - state.last_s, 1))
            state.last_s = now_s
            if event.finish_reason is not None:
                state.end = state.known  # the context may end it
                ended.append(state)
        return Returned(len(events), gaps, began, ended)

    def repeat(self, now_s: float) -> None:
        """Never: the policy is asked for every step."""
