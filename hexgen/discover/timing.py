"""Seconds of a piece of work on a device, sustained, and as if the device had nothing else to do.

A CPU may be held back in two ways. A control group's quota is part of what the node is: it lets a burst run at
full speed and makes up for it in the rest of its period (mostly 100 ms), so a short look at the clock on the
wall sees the wrong thing. Other programs on the machine are not part of the node, and come and go; they also
empty its caches. So one thread's work is counted in its own CPU time, divided by the share of a CPU that the quota
leaves: half of the repeats took longer, or where others were seen to disturb, three quarters. With more threads,
which wait for one another, the wall's clock counts: the least quarter, or under a quota the mean; on a GPU, where
work is queued, the mean too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from hexgen.discover.cgroups import cpu_quota, hidden

MOST_REPEATS = 10_000
UNHINDERED = 0.97
# Beside a quota's figure: what is found below this part of it is the doing of other programs, not of Ray's own
# processes, which take one or two hundredths of a core on each node.
LEAST_OF_QUOTA = 0.8
LONG_S = 1.0
DISTURBED = 1.3  # times as long on the wall as alone
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
    """Of each of ``threads`` CPUs, what the control group leaves beside whatever else runs in it (Ray's own
    processes): found with a busy loop, by one thread; of several its quota.
    """
    if hidden("cpu"):
        share = found_share()
        return 1.0 if share > UNHINDERED else share
    quota = cpu_quota()
    if quota is None or quota >= threads:
        return 1.0
    share = quota / threads
    if threads > 1:
        return share
    found = found_share()
    return found if LEAST_OF_QUOTA * share <= found < share else share


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

    def parts(self, works: Sequence[Work], window_s: float) -> list[float]:
        """Of each of ``works``, called one after the other as in service, over and over: what one leaves in the
        processor's caches is what the next one finds. A loop around each alone would find its own code and data
        there, which halves the time of everything beside the layers of a small model. The first round does not
        count (it also brings memory into use), unless it takes `LONG_S` already.
        """
        if not self._by_cpu:
            return [self.seconds(work, window_s / len(works), 1) for work in works]
        began, first = time.perf_counter(), self._round(works)
        if time.perf_counter() - began >= max(LONG_S, window_s):
            rounds = [first]
        else:
            began, rounds = time.perf_counter(), []
            while not rounds or (time.perf_counter() - began < window_s and len(rounds) < MOST_REPEATS):
                rounds.append(self._round(works))
        wall_s, cpu_s = time.perf_counter() - began, sum(map(sum, rounds)) / self._share
        self._wall_s += wall_s
        self._alone_s += cpu_s
        middle = least_quarter if wall_s > DISTURBED * cpu_s else median
        return [middle(spent) / self._share for spent in zip(*rounds, strict=True)]

    @staticmethod
    def _round(works: Sequence[Work]) -> list[float]:
        """This thread's processor seconds of each."""
        found = []
        for work in works:
            before = time.thread_time()
            work()
            found.append(time.thread_time() - before)
        return found

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
            disturbed = sum(walls) * self._share > DISTURBED * sum(cpus)
            once = (least_quarter(cpus) if disturbed else median(cpus)) / self._share
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


class Others:
    """How many cores of this machine other processes keep busy, from ``with`` on; 0 where no kernel says."""

    cores = 0.0

    def __enter__(self) -> Others:
        self._before = _busy_s(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        busy_s, own_s, now_s = _busy_s(), time.process_time(), time.perf_counter()
        spent_s = busy_s - self._before[0] - (own_s - self._before[1])
        self.cores = max(0.0, spent_s / max(1e-9, now_s - self._before[2]))


def _busy_s(stat: Path = Path("/proc/stat")) -> float:
    """Seconds that all cores together were busy since the start (proc(5)): user, nice, system, irq, softirq; and
    stolen by a host.
    """
    try:
        fields = stat.read_text().partition("\n")[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields[:8])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
