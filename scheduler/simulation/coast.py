"""A stage alone with its decodes: step after step, until something else happens."""

from __future__ import annotations

import math
from typing import NamedTuple

from hexgen.scheduler.simulation.counted import CountedBatcher
from hexgen.scheduler.simulation.layout import RoutePath
from hexgen.scheduler.simulation.record import Recorder, gap_bin, gap_edges


class Way(NamedTuple):
    """``arrived``: the step that comes back at ``back_s`` is what happens next, and is not dealt with yet."""

    back_s: float
    arrived: bool
    busy_s: float
    late: bool = False  # the first round has tokens that wait since different times; it is not for here


def coast(batcher: CountedBatcher, path: RoutePath, recorder: Recorder, now_s: float, horizon_s: float) -> Way:
    """The only step of a route of one stage is back at ``now_s``; as `CountedBatcher.repeat` sends it again, and
    again, as long as it is back before ``horizon_s``. The same sums in the same order as one step at a time.
    """
    step, table = batcher.in_flight[0], batcher.table
    cohort = step.cohort
    if cohort is None or not batcher.may_repeat(step, cohort):
        return Way(now_s, True, 0.0)
    if cohort.late:
        return Way(now_s, True, 0.0, late=True)
    size, page, residues = cohort.size, cohort.page, cohort.residues
    rounds, seen, last_s = cohort.rounds, cohort.total, cohort.last_s
    rounds_end = rounds + cohort.left
    free = table.counted.count
    delay_s = path.back.delay_s
    counts = recorder.gap_counts
    bin_number, low_s, high_s = 0, math.inf, 0.0
    cell_end, base, slope = -1.0, 0.0, 0.0
    first = rounds
    busy_s = gaps_s = 0.0
    in_bin = 0
    arrived = True
    while rounds < rounds_end:
        pages = residues[-rounds % page]
        if pages > free:
            break
        free -= pages
        gap_s = now_s - last_s
        gaps_s += gap_s * size
        if low_s <= gap_s < high_s:
            in_bin += size
        else:
            counts[bin_number] += in_bin
            in_bin = size
            bin_number = gap_bin(gap_s)
            low_s, high_s = gap_edges(bin_number)
        last_s = now_s
        rounds += 1
        seen += size
        if seen >= cell_end:
            (base, slope), cell_end = path.clock.line(size, seen)
        took = base + slope * seen
        busy_s += took
        now_s = now_s + took + delay_s
        if now_s >= horizon_s:
            arrived = False
            break
    counts[bin_number] += in_bin
    done = rounds - first
    if done:
        recorder.tokens += done * size
        recorder.gap_sum_s += gaps_s
        cohort.rounds, cohort.total, cohort.last_s = rounds, seen, last_s
        table.counted.count = free
        table.released.clear()
        step.attended = step.kv_read = float(seen)
        batcher.steps += done
        batcher.repeated += done
    return Way(now_s, arrived, busy_s)
