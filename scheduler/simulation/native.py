"""A run by the compiled loop: Python keeps the front door, C++ everything between two of its decisions.

What the loop runs is translated from the sources that the engine and the planner run (`translate.py`): the
batching policy and the cost model's roofline. The table of sequences is its own (`core/table.h`), each sequence by
itself. Times are those of `run.py` to the last bit; sums over them differ by their order.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from hexgen.errors import HexgenError
from hexgen.scheduler.cost import StageProfile
from hexgen.scheduler.simulation.front import FrontDoor
from hexgen.scheduler.simulation.layout import Layout, RoutePath, StepClock
from hexgen.scheduler.simulation.native_build import NativeError, cost_code, library
from hexgen.scheduler.simulation.record import GAP_BINS, Recorder
from hexgen.scheduler.simulation.requests import Requests
from hexgen.scheduler.traffic import StepLoad

if TYPE_CHECKING:
    Doubles = ctypes._Pointer[ctypes.c_double]

_WORTH_COMPILING = 20_000  # requests; fewer are soon simulated, where the loop is not there yet
_WAITS, _CHANGED, _OVER, _FAILED = range(4)
_BEGAN = 0
_ASK_CELL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_double)
)
_ASK_STEP = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_double), ctypes.POINTER(ctypes.c_double)
)
_LOAD_FIELDS = 9  # of a StepLoad


def native_run(
    layout: Layout,
    requests: Requests,
    recorder: Recorder,
    concurrency: int | None,
    most_waiting: int | None,
    asked: bool | None,
) -> NativeRun | None:
    """A run by the compiled loop; None where there is none, or it is not ``asked`` for (None: where it is there
    already, or worth compiling). Sliding windows, and trials that end when too many have missed, are for Python.
    """
    if asked is False or layout.windows or recorder.judging:
        return None
    try:
        found = library(asked is True or len(requests) >= _WORTH_COMPILING)
    except NativeError:
        return None
    return NativeRun(found, layout, requests, recorder, concurrency, most_waiting)


class _Route:
    """What the front door sees of a route."""

    __slots__ = ("free_pages", "waiting")

    def __init__(self, path: RoutePath) -> None:
        self.free_pages = path.limits.pages
        self.waiting = 0


class NativeRun:
    """One simulation, as `run.Run`. ``to_end`` is called once."""

    def __init__(
        self,
        found: ctypes.CDLL,
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
        self._requests = requests
        self._closed = concurrency
        self._arrived = 0
        self._seen = [_Route(path) for path in layout.routes]
        self._front = FrontDoor(layout.routes, self._seen, most_waiting)
        self._shown = (ctypes.c_int64 * (1 + 2 * len(layout.routes)))()
        self._prompts: list[int] = requests.prompt_tokens.tolist()
        self._error: HexgenError | None = None
        found.run_new.restype = ctypes.c_void_p
        found.run_now.restype = ctypes.c_double
        found.run_changes.restype = ctypes.POINTER(ctypes.c_int64)

    def to_end(self, warmup_s: float, until_s: float) -> None:
        """Until all is served, or the clock shows ``until_s``."""
        count = len(self._requests)
        times = np.full((2, count), math.nan)  # first tokens, ends
        delivered = np.zeros(count, dtype=np.int64)
        lengths = [
            np.ascontiguousarray(a, np.int64) for a in (self._requests.prompt_tokens, self._requests.output_tokens)
        ]
        handle = ctypes.c_void_p(
            self._library.run_new(
                ctypes.c_int64(len(self.busy_s)),
                ctypes.c_int64(len(self.link_busy_s)),
                *(ctypes.c_void_p(a.ctypes.data) for a in (*lengths, times[0], times[1], delivered)),
                ctypes.c_double(warmup_s),
                ctypes.c_double(until_s),
            )
        )
        try:
            asked = self._routes(handle)  # to be kept as long as the loop runs
            self._loop(handle)
            del asked
            self._read(handle, until_s)
        finally:
            self._library.run_delete(handle)
        self._recorder.first_s[:], self._recorder.finish_s[:] = times.tolist()
        self._recorder.outputs[:] = delivered.tolist()

    # ---- the loop --------------------------------------------------------------------------------------------

    def _loop(self, handle: ctypes.c_void_p) -> None:
        recorder, front, shown = self._recorder, self._front, self._shown
        arrivals, closed = recorder.arrival_s, self._closed is not None
        advance, clock = self._library.run_advance, self._library.run_clock
        count = len(arrivals)
        if self._closed is not None:
            arrivals[:] = [0.0 if i < self._closed else math.inf for i in range(count)]
        while True:
            arriving = arrivals[self._arrived] if self._arrived < count else math.inf
            outcome = advance(handle, ctypes.c_double(arriving), 1 if closed or front.queue else 0, shown)
            if outcome == _FAILED:
                raise self._error or RuntimeError("the cost model failed within the compiled loop")
            changed = self._changes(handle)
            if outcome == _CHANGED:
                if changed and front.queue:
                    self._admit(handle)
            elif outcome == _OVER or arriving == math.inf or not clock(handle, ctypes.c_double(arriving)):
                return
            else:
                self._arrive(handle, arriving)

    def _arrive(self, handle: ctypes.c_void_p, now_s: float) -> None:
        request = self._arrived
        self._arrived += 1
        prompt = self._prompts[request]
        if self._front.refuses(prompt):
            self._recorder.refuse(request)
            self._next_of_loop(now_s)
            return
        self._front.place(request, prompt)
        self._admit(handle)

    def _admit(self, handle: ctypes.c_void_p) -> None:
        """From the door to the routes, as long as one has room."""
        add, shown = self._library.run_add, self._shown
        while (found := self._front.next()) is not None:
            request, route = found
            self._recorder.route[request] = route
            if add(handle, ctypes.c_int64(route), ctypes.c_int64(request), shown) == _FAILED:
                raise self._error or RuntimeError("the cost model failed within the compiled loop")
            self._show()

    def _next_of_loop(self, now_s: float) -> None:
        arrivals = self._recorder.arrival_s
        if self._closed is not None and self._closed < len(arrivals):
            arrivals[self._closed] = now_s
            self._closed += 1

    def _show(self) -> None:
        values = iter(self._shown[1:])
        for route in self._seen:
            route.free_pages = next(values)
            route.waiting = next(values)

    def _changes(self, handle: ctypes.c_void_p) -> bool:
        """The door hears of who has begun or ended."""
        self._show()
        count = self._shown[0]
        if not count:
            return False
        front, prompts = self._front, self._prompts
        told = self._library.run_changes(handle)[: 3 * count]
        for kind, route, request in zip(told[::3], told[1::3], told[2::3], strict=True):
            if kind == _BEGAN:
                front.started(route, prompts[request])
            else:
                front.ended(route)
                if self._closed is not None:
                    self._next_of_loop(self._library.run_now(handle))
        return True

    # ---- to and from C++ -------------------------------------------------------------------------------------

    def _routes(self, handle: ctypes.c_void_p) -> list[object]:
        """Tells of all routes. Returns what C++ will call."""
        clocks = [path.clock for path in self._layout.routes]
        cell, step = _ASK_CELL(self._asking_cell(clocks)), _ASK_STEP(self._asking_step(clocks))
        code = cost_code()
        profiles: dict[StageProfile, int] = {}
        for path in self._layout.routes:
            for profile, *_ in path.clock.distinct:
                if profile not in profiles and type(profile) is StageProfile:
                    profiles[profile] = len(profiles)
                    self._library.run_profile(handle, _doubles(code.numbers_of(profile)))
        for path in self._layout.routes:
            told = path.limits
            limits = (told.pages, told.page_size, told.token_budget, told.max_sequences, told.context, told.depth)
            legs = [n for leg in path.legs for n in (leg.stage, leg.link, int(leg.waits))]
            times = [s for leg in path.legs for s in (leg.token_s, leg.delay_s)]
            parts: list[int] = []  # none: a table has its own figures, and Python is asked for them
            if all(part[0] in profiles for part in path.clock.distinct):
                parts = [
                    number
                    for profile, *rest in path.clock.distinct
                    for number in (profiles[profile], *map(int, rest))
                ]
            self._library.run_route(
                handle,
                _whole(limits),
                ctypes.c_int64(len(path.legs)),
                _whole(legs),
                _doubles([*times, path.back.delay_s]),
                ctypes.c_int64(len(parts) // 4),
                _whole(parts),
                _whole(path.clock.place),
                cell,
                step,
            )
        return [cell, step]

    def _asking_cell(self, clocks: list[StepClock]) -> Callable[[int, int, int, Doubles], int]:
        def ask(route: int, size: int, number: int, out: Doubles) -> int:
            try:
                for i, line in enumerate(clocks[route].cell(size, number)):
                    out[2 * i], out[2 * i + 1] = line
            except HexgenError as error:
                self._error = error
                return 0
            return 1

        return ask

    def _asking_step(self, clocks: list[StepClock]) -> Callable[[int, Doubles, Doubles], int]:
        def ask(route: int, load: Doubles, out: Doubles) -> int:
            try:
                for i, seconds in enumerate(clocks[route].of_load(StepLoad(*load[:_LOAD_FIELDS]))):
                    out[i] = seconds
            except HexgenError as error:
                self._error = error
                return 0
            return 1

        return ask

    def _read(self, handle: ctypes.c_void_p, until_s: float) -> None:
        """What the loop has counted."""
        recorder, routes = self._recorder, len(self._layout.routes)
        counts, seconds = (ctypes.c_int64 * 8)(), (ctypes.c_double * 3)()
        self._library.run_counts(handle, counts, seconds)
        tokens, tokens_before, finished, finished_before, recorder.prompt_tokens, *rest = counts
        self.steps, self.preemptions, samples = rest
        recorder.tokens = tokens
        self.tokens, self.finished = tokens - tokens_before, finished - finished_before
        self.now_s, self.started_s, recorder.gap_sum_s = seconds
        if math.isfinite(until_s):
            self.now_s = until_s
        busy_s, link_busy_s = _doubles(self.busy_s), _doubles(self.link_busy_s)
        sample_s = (ctypes.c_double * samples)()
        gaps = (ctypes.c_int64 * GAP_BINS)()
        used, running = ((ctypes.c_int64 * (samples * routes))() for _ in range(2))
        self._library.run_arrays(handle, busy_s, link_busy_s, gaps, sample_s, used, running)
        self.busy_s[:], self.link_busy_s[:] = busy_s, link_busy_s
        recorder.gap_counts[:] = gaps
        recorder.sample_s[:] = sample_s
        recorder.sample_used[:] = _rows(used, routes)
        recorder.sample_running[:] = _rows(running, routes)


def _doubles(values: list[float]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(values))(*values)


def _whole(values: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
    found = list(values)
    return (ctypes.c_int64 * len(found))(*found)


def _rows(values: ctypes.Array[ctypes.c_int64], width: int) -> list[list[int]]:
    return [list(values[i : i + width]) for i in range(0, len(values), width)]
