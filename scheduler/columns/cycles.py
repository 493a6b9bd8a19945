"""Cycle times that matter: between two of them no group holds a layer more."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.columns.loads import Load

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.bool_] | npt.NDArray[np.int64]

_FINE_RATIO = 1.008  # of cycle times that are told apart: the round trip may bind anywhere
_LONGER = 16.0  # times the longest stage that fits: round trips over slow links, with stages as full as they get
_LONGER_COARSE = 8  # intervals up to there, where few are looked at


@dataclass(frozen=True, slots=True)
class Cycles:
    """Intervals of the cycle time, [start, end): no group holds more layers than within ``held`` seconds."""

    start: Floats
    end: Floats
    held: Floats

    def __len__(self) -> int:
        return len(self.start)

    def only(self, rows: Rows) -> Cycles:
        return Cycles(self.start[rows], self.end[rows], self.held[rows])


def thinned(load: Load, most: int) -> Cycles:
    """At most ``most`` intervals between the times of middle stages, which hold no less than those at the ends."""
    every = np.unique(load.middle[np.isfinite(load.middle)])
    longer = np.geomspace(every[-1], every[-1] * _LONGER, _LONGER_COARSE)
    if len(every) <= most:
        start = np.append(every, longer[1:])
        return Cycles(start, np.append(start[1:], np.inf), start)
    start = every[np.unique(np.linspace(0, len(every) - 1, most).astype(int))]
    start = np.append(start, longer[1:])
    end = np.append(start[1:], np.inf)
    return Cycles(start, end, np.append(np.nextafter(end[:-1], 0), start[-1]))


def fine(load: Load) -> Cycles:
    """Every time at which a stage of any place holds a layer more, and times between them."""
    times = np.concatenate([row[np.isfinite(row)] for row in (load.middle, load.first, load.last)])
    every = np.unique(times)
    longest = every[-1] * _LONGER
    points = 2 + int(math.log(longest / every[0]) / math.log(_FINE_RATIO))
    start = np.unique(np.concatenate((every, np.geomspace(every[0], longest, points))))
    return Cycles(start, np.append(start[1:], np.inf), start)


def blocks(cycles: Cycles, first: Rows, size: int) -> Cycles:
    """The intervals from each of ``first`` on, ``size`` of them as one."""
    last = np.minimum(np.asarray(first) + size, len(cycles)) - 1
    return Cycles(cycles.start[first], cycles.end[last], cycles.held[last])
