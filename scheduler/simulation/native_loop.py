"""The compiled loop as Python calls it: what goes to C++ and what comes back (``core/run.cpp``)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from hexgen.errors import EngineError, HexgenError
from hexgen.scheduler.cost import StageProfile
from hexgen.scheduler.simulation.layout import Layout, StepClock
from hexgen.scheduler.simulation.native_build import cost_code
from hexgen.scheduler.simulation.record import GAP_BINS, Recorder
from hexgen.scheduler.simulation.requests import Ints, Requests
from hexgen.scheduler.traffic import StepLoad

if TYPE_CHECKING:
    Doubles = ctypes._Pointer[ctypes.c_double]

WAITS, CHANGED, OVER, FAILED = range(4)  # Outcome
BEGAN, ENDED = range(2)  # Kind

_Int, _Double = ctypes.c_int64, ctypes.c_double
_ASK_CELL = ctypes.CFUNCTYPE(ctypes.c_int, _Int, _Int, _Int, ctypes.POINTER(_Double))
_ASK_STEP = ctypes.CFUNCTYPE(ctypes.c_int, _Int, ctypes.POINTER(_Double), ctypes.POINTER(_Double))
_LOAD_FIELDS = 9  # of a StepLoad


class CompiledLoop:
    """One run's. To be closed. The clock ends at ``until_s``; rates are counted from ``warmup_s`` on."""

    def __init__(
        self, library: ctypes.CDLL, layout: Layout, requests: Requests, warmup_s: float, until_s: float
    ) -> None:
        count = len(requests)
        self.first_s = np.full(count, math.nan)  # of each request
        self.finish_s = np.full(count, math.nan)
        self.delivered: Ints = np.zeros(count, dtype=np.int64)
        # The number of changes; then free pages and how many wait, of each route.
        self.shown = (_Int * (1 + 2 * len(layout.routes)))(
            0, *(n for p in layout.routes for n in (p.limits.pages, 0))
        )
        self._library = library
        self._layout = layout
        self._error: HexgenError | None = None
        self._kept = [np.ascontiguousarray(a, np.int64) for a in (requests.prompt_tokens, requests.output_tokens)]
        library.run_new.restype = ctypes.c_void_p
        library.run_now.restype = _Double
        library.run_changes.restype = ctypes.POINTER(_Int)
        arrays = (*self._kept, self.first_s, self.finish_s, self.delivered)
        self._handle = ctypes.c_void_p(
            library.run_new(
                _Int(len(layout.stages)),
                _Int(layout.links),
                *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
                _Double(warmup_s),
                _Double(until_s),
            )
        )
        clocks = [path.clock for path in layout.routes]
        # C++ calls them as long as the run lives.
        self._cell, self._step = _ASK_CELL(self._asking_cell(clocks)), _ASK_STEP(self._asking_step(clocks))
        self._tell(layout)

    def close(self) -> None:
        self._library.run_delete(self._handle)

    # ---- the run ---------------------------------------------------------------------------------------------

    def advance(self, limit_s: float, stop: bool) -> int:
        """Until ``limit_s``, or the end; with ``stop``, until somebody has begun or ended. Returns which."""
        return self._checked(self._library.run_advance(self._handle, _Double(limit_s), int(stop), self.shown))

    def clock(self, at_s: float) -> bool:
        """A request arrives; False where that is after the run's end."""
        return bool(self._library.run_clock(self._handle, _Double(at_s)))

    def add(self, route: int, request: int) -> None:
        self._checked(self._library.run_add(self._handle, _Int(route), _Int(request), self.shown))

    def now_s(self) -> float:
        return float(self._library.run_now(self._handle))

    def changes(self) -> Iterable[tuple[int, int, int]]:
        """Who has begun or ended since the last call, in order: which of both, route, request."""
        count: int = self.shown[0]
        if not count:
            return ()
        told = self._library.run_changes(self._handle)[: 3 * count]
        self.shown[0] = 0
        return zip(told[::3], told[1::3], told[2::3], strict=True)

    def _checked(self, outcome: int) -> int:
        if outcome == FAILED:
            raise self._error or EngineError("the cost model failed in the compiled loop", where="simulate")
        return outcome

    # ---- to C++ ----------------------------------------------------------------------------------------------

    def _tell(self, layout: Layout) -> None:
        """Of all routes, and of the profiles that are rooflines."""
        profiles: dict[StageProfile, int] = {}
        for path in layout.routes:
            for profile, *_ in path.clock.distinct:
                if profile not in profiles and type(profile) is StageProfile:
                    profiles[profile] = len(profiles)
                    self._library.run_profile(self._handle, _doubles(cost_code().numbers_of(profile)))
        for path in layout.routes:
            told, clock = path.limits, path.clock
            limits = (told.pages, told.page_size, told.token_budget, told.max_sequences, told.context, told.depth)
            times = [s for leg in path.legs for s in (leg.token_s, leg.delay_s)]
            parts: list[int] = []  # none: a table has its own figures, and Python is asked for them
            if all(part[0] in profiles for part in clock.distinct):
                parts = [n for profile, *rest in clock.distinct for n in (profiles[profile], *map(int, rest))]
            self._library.run_route(
                self._handle,
                _whole(limits),
                _Int(len(path.legs)),
                _whole(n for leg in path.legs for n in (leg.stage, leg.link, int(leg.waits))),
                _doubles([*times, path.back.delay_s]),
                _Int(len(parts) // 4),
                _whole(parts),
                _whole(clock.place),
                self._cell,
                self._step,
            )
            for window, layers in layout.windows:
                self._library.run_window(self._handle, _Int(window or 0), _Int(layers))

    def _asking_cell(self, clocks: list[StepClock]) -> Callable[[int, int, int, Doubles], int]:
        def ask(route: int, size: int, number: int, out: Doubles) -> int:
            try:
                for i, line in enumerate(clocks[route].cell(size, number)):
                    out[2 * i], out[2 * i + 1] = line
            except HexgenError as error:  # through C++, it would be lost
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

    # ---- from C++ --------------------------------------------------------------------------------------------

    def counts(self) -> tuple[list[int], list[float]]:
        """Tokens, those before the window, finished requests, those before the window, prompt tokens, steps,
        preemptions, samples; the clock, the window's start, the sum of all gaps.
        """
        counts, seconds = (_Int * 8)(), (_Double * 3)()
        self._library.run_counts(self._handle, counts, seconds)
        return list(counts), list(seconds)

    def read(self, recorder: Recorder, samples: int) -> tuple[list[float], list[float]]:
        """Fills in gaps and samples. Returns the seconds that each stage and each link was busy."""
        routes = len(self._layout.routes)
        busy_s, link_busy_s = (_Double * len(self._layout.stages))(), (_Double * self._layout.links)()
        sample_s, gaps = (_Double * samples)(), (_Int * GAP_BINS)()
        used, running = ((_Int * (samples * routes))() for _ in range(2))
        self._library.run_arrays(self._handle, busy_s, link_busy_s, gaps, sample_s, used, running)
        recorder.gap_counts[:] = gaps
        recorder.sample_s[:] = sample_s
        for rows, values in ((recorder.sample_used, used), (recorder.sample_running, running)):
            rows[:] = [list(values[i : i + routes]) for i in range(0, samples * routes, routes)]
        return list(busy_s), list(link_busy_s)


def _doubles(values: list[float]) -> ctypes.Array[ctypes.c_double]:
    return (_Double * len(values))(*values)


def _whole(values: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
    found = list(values)
    return (_Int * len(found))(*found)
