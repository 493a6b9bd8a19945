"""One step's attention as the CUDA kernels see it: tables of runs, pages and tasks, on the host.

Plain numpy: the tests hand the same tables to the emulated kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hexgen.worker.batch_inputs import BatchInputs, run_table
from hexgen.worker.kernels.arithmetic import Int32s, RunShape, Tasks, Tiling, plan_tasks


@dataclass(frozen=True, slots=True)
class Readers:
    """Which query heads read which KV head on this rank: local head h reads KV head (h + shift) // group."""

    query_heads: int
    kv_heads: int
    group: int  # of the model, before it was divided
    shift: int

    @staticmethod
    def make(query_heads: tuple[int, int], kv_heads: tuple[int, int], group: int) -> Readers:
        """For global half-open ranges, where query head h reads KV head h // group."""
        shift = query_heads[0] - kv_heads[0] * group
        return Readers(query_heads[1] - query_heads[0], kv_heads[1] - kv_heads[0], group, shift)

    @property
    def reads(self) -> list[int]:
        """The local KV head of each query head."""
        return [(head + self.shift) // self.group for head in range(self.query_heads)]

    @property
    def counts(self) -> tuple[int, ...]:
        """Query heads of each KV head."""
        firsts = [kv * self.group - self.shift for kv in range(self.kv_heads)]
        return tuple(min(self.query_heads, first + self.group) - max(0, first) for first in firsts)


@dataclass(frozen=True, slots=True)
class HostTables:
    """``runs`` [n, 4] int32 (row, length, start, where its pages begin), long ones first; ``pages`` int32;
    ``short`` are the tasks of runs whose rows fit one warp's tile (decoding), ``long`` of the others.
    """

    runs: Int32s
    pages: Int32s
    long: Tasks | None
    short: Tasks | None


def is_short(length: int, group: int) -> bool:
    """One token, or so few that they fill one tile of the decode kernel."""
    return length == 1 or length * group <= 16


def decode_runs(batch: BatchInputs) -> list[RunShape]:
    """The single tokens of a batch, in the order of their rows."""
    return [RunShape(1, at) for at in batch.decodes.positions]


def host_tables(
    batch: BatchInputs,
    window: int | None,
    readers: Readers,
    long_shape: Tiling,
    short_shape: Tiling,
    long_slots: int,
    short_slots: int,
) -> HostTables:
    """``slots``: blocks of each kernel that run at once."""
    decodes = batch.decodes
    group = max(readers.counts)
    long = [run for run in batch.prefills if not is_short(run.length, group)]
    short = [run for run in batch.prefills if is_short(run.length, group)]
    rows = [*((run.row, run.length, run.start) for run in long + short), *decodes.runs]
    runs, pages = run_table(rows, [*(run.pages for run in long + short), *decodes.pages])
    shapes = [RunShape(length, start) for _, length, start in rows]
    tasks: list[Tasks | None] = []
    for some, first, shape, slots in (
        (shapes[: len(long)], 0, long_shape, long_slots),
        (shapes[len(long) :], len(long), short_shape, short_slots),
    ):
        tasks.append(plan_tasks(some, shape, readers.counts, window, slots, first) if some else None)
    return HostTables(runs.astype(np.int32), pages.astype(np.int32), tasks[0], tasks[1])
