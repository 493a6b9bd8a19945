"""A run by the compiled loop: Python keeps the front door, C++ everything between two of its decisions.

What the loop runs is translated from the sources that the engine and the planner run (`translate.py`): the
batching policy and the cost model's roofline. The table of sequences is its own (`core/table.h`), each sequence by
itself. Times are those of `run.py` to the last bit; sums over them differ by their order.
"""

from __future__ import annotations

import math
import time
from ctypes import CDLL, Array, c_int64

from hexgen.errors import EngineError
from hexgen.scheduler.simulation.front import FrontDoor
from hexgen.scheduler.simulation.layout import Layout
from hexgen.scheduler.simulation.native_build import library
from hexgen.scheduler.simulation.native_loop import BEGAN, CHANGED, OVER, CompiledLoop
from hexgen.scheduler.simulation.record import Recorder
from hexgen.scheduler.simulation.requests import Requests

_WORTH_COMPILING = 20_000  # requests; fewer are soon simulated, where the loop is not there yet
_LOOK_TURNS = 64  # between two looks at the clock on the wall


def native_run(
    layout: Layout,
    requests: Requests,
    recorder: Recorder,
    concurrency: int | None = None,
    most_waiting: int | None = None,
    asked: bool | None = None,
) -> NativeRun | None:
    """A run by the compiled loop; None where there is none, or it is not ``asked`` for (None: where it is there
    already, or worth compiling).
    """
    if asked is False:
        return None
    try:
        found = library(asked is True or len(requests) >= _WORTH_COMPILING)
    except EngineError:
        return None
    return NativeRun(found, layout, requests, recorder, concurrency, most_waiting)


class _Route:
    """What the front door sees of a route: `CompiledLoop.shown`."""

    __slots__ = ("_place", "_shown")

    def __init__(self, number: int, shown: Array[c_int64]) -> None:
        self._place = 1 + 2 * number
        self._shown = shown

    @property
    def free_pages(self) -> int:
        return self._shown[self._place]

    @property
    def waiting(self) -> int:
        return self._shown[self._place + 1]


class NativeRun:
    """One simulation, as `run.Run`. ``to_end`` is called once."""

    def __init__(
        self,
        found: CDLL,
        layout: Layout,
        requests: Requests,
        recorder: Recorder,
        concurrency: int | None,
        most_waiting: int | None,
    ) -> None:
        self.now_s = self.started_s = 0.0
        self.busy_s = [0.0] * len(layout.stages)
        self.link_busy_s = [0.0] * layout.links
        self.tokens = self.finished = self.steps = self.preemptions = 0
        self._library = found
        self._layout = layout
        self._recorder = recorder
        self._judging = recorder.judging
        self._requests = requests
        self._closed = concurrency
        self._arrived = 0
        self._most_waiting = most_waiting
        self._prompts: list[int] = requests.prompt_tokens.tolist()

    def to_end(self, warmup_s: float, until_s: float, deadline: float | None = None) -> bool:
        """As `run.Run.to_end`. That too many have missed is seen where a request arrives, or while some wait."""
        loop = CompiledLoop(self._library, self._layout, self._requests, warmup_s, until_s)
        seen = [_Route(number, loop.shown) for number in range(len(self._layout.routes))]
        try:
            if not self._turns(loop, FrontDoor(self._layout.routes, seen, self._most_waiting), deadline):
                return False
            self._read(loop, until_s)
        finally:
            loop.close()
        return True

    def _turns(self, loop: CompiledLoop, front: FrontDoor, deadline: float | None) -> bool:
        """False where the deadline came first."""
        recorder, closed = self._recorder, self._closed is not None
        arrivals = recorder.arrival_s
        count, turns = len(arrivals), 0
        if self._closed is not None:
            arrivals[:] = [0.0 if i < self._closed else math.inf for i in range(count)]
        while not recorder.hopeless:
            if deadline is not None:
                turns += 1
                if turns % _LOOK_TURNS == 0 and time.monotonic() >= deadline:
                    return False
            arriving = arrivals[self._arrived] if self._arrived < count else math.inf
            outcome = loop.advance(arriving, closed or bool(front.queue))
            if loop.shown[0]:
                self._hear(loop, front)
            if outcome == CHANGED:
                if self._judging:
                    recorder.look(loop.now_s())
                self._admit(loop, front)
            elif outcome == OVER or arriving == math.inf or not loop.clock(arriving):
                break
            else:
                self._arrive(loop, front, arriving)
        return True

    def _arrive(self, loop: CompiledLoop, front: FrontDoor, now_s: float) -> None:
        request = self._arrived
        self._arrived += 1
        if self._judging:
            self._recorder.look(now_s)
        prompt = self._prompts[request]
        if front.refuses(prompt):
            self._recorder.refuse(request)
            self._next_of_loop(now_s)
            return
        front.place(request, prompt)
        self._admit(loop, front)

    def _admit(self, loop: CompiledLoop, front: FrontDoor) -> None:
        """From the door to the routes, as long as one has room."""
        while front.queue and (found := front.next()) is not None:
            request, route = found
            self._recorder.route[request] = route
            loop.add(route, request)

    def _next_of_loop(self, now_s: float) -> None:
        arrivals = self._recorder.arrival_s
        if self._closed is not None and self._closed < len(arrivals):
            arrivals[self._closed] = now_s
            self._closed += 1

    def _hear(self, loop: CompiledLoop, front: FrontDoor) -> None:
        """The door hears of who has begun or ended, and so does who judges."""
        recorder, prompts = self._recorder, self._prompts
        for kind, route, request in loop.changes():
            if kind == BEGAN:
                front.started(route, prompts[request])
                if self._judging:
                    recorder.first_token(request, float(loop.first_s[request]))
            else:
                front.ended(route)
                if self._closed is not None:
                    self._next_of_loop(loop.now_s())
                if self._judging:
                    recorder.finish(request, int(loop.delivered[request]), float(loop.finish_s[request]))

    def _read(self, loop: CompiledLoop, until_s: float) -> None:
        """What the loop has counted."""
        recorder = self._recorder
        counts, (self.now_s, self.started_s, recorder.gap_sum_s) = loop.counts()
        tokens, tokens_before, finished, finished_before, prompt_tokens, self.steps, self.preemptions, samples = (
            counts
        )
        recorder.tokens, recorder.prompt_tokens = tokens, prompt_tokens
        self.tokens, self.finished = tokens - tokens_before, finished - finished_before
        if math.isfinite(until_s) and not recorder.hopeless:
            self.now_s = until_s
        self.busy_s, self.link_busy_s = loop.read(recorder, samples)
        recorder.first_s[:], recorder.finish_s[:] = loop.first_s.tolist(), loop.finish_s.tolist()
        recorder.outputs[:] = loop.delivered.tolist()
