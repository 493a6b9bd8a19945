"""Seconds of a piece of work on a device, sustained, and as if the device had nothing else to do.

A CPU may be held back in two ways. A control group's quota is part of what the node is: it lets a burst run at
full speed and makes up for it in the rest of its period (mostly 100 ms), so a short look at the clock on the
wall sees the wrong thing. Other programs on the machine are not part of the node, and come and go; they also
empty its caches. So one thread's work is counted in its own CPU time, in the quarter of the repeats that took
least, divided by the share of a CPU that the quota leaves. With more threads, which wait for one another, the
wall's clock counts: the same quarter, or under a quota the mean; on a GPU, where work is queued, the mean too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from hexgen.discover.cgroups import cpu_quota, hidden

MOST_REPEATS = 10_000
UNHINDERED = 0.97
Work = Callable[[], object]


def found_share(windows: int = 3, window_s: float = 0.8) -> float:
    """The share of a CPU that this thread gets when it wants all of it, in the best of several windows.

    For a control group whose quota cannot be read; each window is several of its periods.
    """
    best = 0.0
    for _ in range(windows):
        wall, cpu = time.perf_counter(), time.thread_time()
        while time.perf_counter() - wall < window_s:
            sum(range(1000))
        best = max(best, (time.thread_time() - cpu) / (time.perf_counter() - wall))
    return min(1.0, best)


def cpu_share(threads: int) -> float:
    """Of each of ``threads`` CPUs, what the control group leaves: its quota, or where that is hidden as found."""
    if hidden("cpu"):
        share = found_share()
        return 1.0 if share > UNHINDERED else share
    quota = cpu_quota()
    return 1.0 if quota is None else min(1.0, quota / threads)


class Stopwatch:
    """Of one device. ``share``: of a CPU, as `cpu_share` has it; ``sync`` waits for a GPU."""

    def __init__(self, threads: int = 1, share: float = 1.0, sync: Work | None = None) -> None:
        self._sync = sync
        self._by_cpu = threads == 1 and sync is None
        self._share = share
        self._wall_s = 0.0
        self._alone_s = 0.0

    @property
    def disturbance(self) -> float:
        """How much longer it all took than it would have without others: 1.0 is not at all."""
        return self._wall_s / self._alone_s if self._alone_s else 1.0

    def seconds(self, work: Work, window_s: float, windows: int = 2) -> float:
        """Of one call of ``work``, repeated for ``window_s`` and more, after one call that does not count."""
        work()
        if self._sync is not None:
            self._sync()
        return min(self._window(work, window_s) for _ in range(windows))

    def _window(self, work: Work, window_s: float) -> float:
        began, walls, cpus = time.perf_counter(), [], []
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            work()
            cpus.append(time.thread_time() - cpu)
            walls.append(time.perf_counter() - wall)
            if self._sync is not None and len(walls) % 8 == 0:
                self._sync()
            if time.perf_counter() - began >= window_s or len(walls) >= MOST_REPEATS:
                break
        if self._sync is not None:
            self._sync()
        spent = time.perf_counter() - began
        if self._by_cpu:
            once = least_quarter(cpus) / self._share
        elif self._sync is None and self._share == 1.0:
            once = least_quarter(walls)
        else:
            once = spent / len(walls)
        self._wall_s += spent
        self._alone_s += once * len(walls)
        return once


def least_quarter(times: Sequence[float]) -> float:
    """Below which a quarter of the times lie; the least of fewer than four."""
    return sorted(times)[len(times) // 4]
