"""Launch arithmetic: which tiles an attention kernel is compiled for, and how a step's work is cut into tasks.

Plain functions over plain numbers; nothing here needs a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexgen.errors import EngineError
from hexgen.worker.kernels.source import KernelSpec

Int32s = npt.NDArray[np.int32]

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
LARGEST_HEAD = 256
# Shared memory that the driver keeps of every block (CUDA C++ Programming Guide, from compute capability 8.0 on).
RESERVED_BYTES = 1024
# A task's fixed cost, in keys' worth of reading: its own start and the reduction's read of what it leaves.
TASK_COST_KEYS = 128
MOST_WAVES = 8
# Of a captured step, whose grid is as large as its largest step's: what is not used costs little, but not nothing.
GRAPH_WAVES = 2
UNUSED = -1  # instead of a run, in tables that are longer than the step: the block has nothing to do
NO_END = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What of a card decides tiles and grids."""

    arch: int  # 90 for sm_90: what is compiled for
    processors: int  # streaming multiprocessors
    block_shared_bytes: int  # that one block may ask for
    processor_shared_bytes: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """One compiled shape of the attention kernels."""

    tensor_cores: bool
    warps_m: int  # warps that share the rows
    warps_n: int  # warps that share the keys
    warp_rows: int
    warp_keys: int
    stages: int  # tiles of keys and values in shared memory
    shared_bytes: int

    @property
    def rows(self) -> int:
        return self.warps_m * self.warp_rows

    @property
    def keys(self) -> int:
        return self.warps_n * self.warp_keys

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n


def supported(dtype: str, head_dim: int, capability: tuple[int, int]) -> bool:
    """Whether the kernels take this: heads are read in 16-byte pieces and multiplied in units of 16."""
    return dtype in ITEM_BYTES and head_dim % 16 == 0 and 0 < head_dim <= LARGEST_HEAD and capability >= (7, 0)


def uses_tensor_cores(dtype: str, arch: int) -> bool:
    """fp32 keeps its precision in plain arithmetic; bf16 has tensor cores from sm_80 on."""
    return dtype == "float16" or (dtype == "bfloat16" and arch >= 80)


def tiling(dtype: str, head_dim: int, limits: DeviceLimits, decode: bool, group: int) -> Tiling:
    """The first shape that lets two blocks share a multiprocessor; else the first that fits at all.

    ``group``: query heads of a KV head. Preferences come from reasoning about registers and latency, not from
    measurements: see docs/kernels.md.
    """
    candidates = _candidates(dtype, head_dim, limits.arch, decode, group)
    two = min(limits.block_shared_bytes, limits.processor_shared_bytes // 2 - RESERVED_BYTES)
    for budget in (two, limits.block_shared_bytes):
        for candidate in candidates:
            if candidate.shared_bytes <= budget:
                return candidate
    raise EngineError(
        f"no attention kernel for {dtype} heads of {head_dim} fits the {limits.block_shared_bytes} bytes of "
        "shared memory that a block may have"
    )


def _candidates(dtype: str, head_dim: int, arch: int, decode: bool, group: int) -> list[Tiling]:
    # Copies that run while something is computed need cp.async (sm_80); without it a second buffer buys nothing.
    pipelined = arch >= 80
    shapes: list[tuple[int, int, int, int, int]]  # warps m, warps n, rows, keys, stages
    if uses_tensor_cores(dtype, arch):
        if decode:
            shapes = [(1, 4, 16, 16, 3), (1, 4, 16, 16, 2)] if pipelined else []
            shapes += [(1, 4, 16, 16, 1), (1, 2, 16, 16, 2 if pipelined else 1), (1, 2, 16, 16, 1)]
        else:
            # Scores and results live in registers: longer heads leave less for scores.
            sizes = [64, 32, 16] if head_dim <= 128 and arch >= 75 else [32, 16]
            shapes = [(4, 1, 16, keys, stages) for keys in sizes for stages in ((2, 1) if pipelined else (1,))]
    else:
        rows, warps = 4, 4
        if decode:
            rows = min(4, 1 << (group - 1).bit_length())
            warps = min(4, -(-group // rows))
        stages = (2, 1) if pipelined else (1,)
        shapes = [(warps, 1, rows, keys, stage) for keys in (32, 16) for stage in stages]
    return [
        Tiling(uses_tensor_cores(dtype, arch), *shape, shared_bytes=_shared_bytes(dtype, head_dim, *shape))
        for shape in shapes
    ]


def _shared_bytes(
    dtype: str, head_dim: int, warps_m: int, warps_n: int, warp_rows: int, warp_keys: int, stages: int
) -> int:
    """Queries, then stages of keys and values; rows are padded by 16 bytes against bank conflicts. Where warps
    share the keys, the stages' place is used once more, to put their results together.
    """
    rows, keys = warps_m * warp_rows, warps_n * warp_keys
    row_bytes = head_dim * ITEM_BYTES[dtype] + 16
    tiles = 2 * stages * keys * row_bytes
    merging = 4 * (rows * head_dim + 2 * warps_n * rows) if warps_n > 1 else 0
    return rows * row_bytes + max(tiles, merging)


def attention_kernel(dtype: str, head_dim: int, page_size: int, shape: Tiling, decode: bool) -> KernelSpec:
    name = "decode_attention" if decode else "prefill_attention"
    return KernelSpec.make(
        name,
        name,
        dtype,
        head=head_dim,
        page=page_size,
        tensor_cores=int(shape.tensor_cores),
        warps_m=shape.warps_m,
        warps_n=shape.warps_n,
        warp_rows=shape.warp_rows,
        warp_keys=shape.warp_keys,
        stages=shape.stages,
    )


# ---- tasks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunShape:
    """Neighbouring tokens of one sequence: positions ``[start, start + length)``."""

    length: int
    start: int


@dataclass(frozen=True, slots=True)
class Tasks:
    """``tasks`` [n, 5] int32 (run, first row, key begin, key end, partial or -1), the most expensive first;
    ``jobs`` [m, 4] int32 (run, first row, first partial, partials): what the reduction has to put together.
    """

    tasks: Int32s
    jobs: Int32s
    partials: int


def plan_tasks(
    runs: Sequence[RunShape],
    shape: Tiling,
    readers: Sequence[int],
    window: int | None,
    slots: int,
    first_run: int = 0,
    most_waves: int = MOST_WAVES,
) -> Tasks:
    """Tiles of rows, and ranges of keys where there are too few tiles to fill the card.

    ``readers``: query heads of each KV head; ``slots``: blocks that run at once on the card; ``first_run``: number
    of ``runs[0]`` in the step's table of runs; ``most_waves``: of tasks that splitting may make.
    """
    group, kv_heads = max(readers), len(readers)
    uneven = min(readers) < group
    tiles: list[tuple[int, int, int, int]] = []  # run, first row, key begin, key end
    for index, run in enumerate(runs, first_run):
        for first_row in range(0, run.length * group, shape.rows):
            first_token = first_row // group
            # A KV head with fewer readers has later tokens at these rows: the range must hold those too. The
            # kernel itself looks no further than the mask.
            last_token = run.length if uneven else min(run.length, -(-(first_row + shape.rows) // group))
            end = run.start + last_token
            begin = 0 if window is None else max(0, run.start + first_token - window + 1)
            tiles.append((index, first_row, begin, end))
    chunk = choose_chunk([end - begin for _, _, begin, end in tiles], kv_heads, slots, shape.keys, most_waves)
    tasks: list[tuple[int, int, int, int, int]] = []
    costs: list[int] = []
    jobs: list[tuple[int, int, int, int]] = []
    partials = 0
    for number, first_row, begin, end in tiles:
        pieces = max(1, -(-(end - begin) // chunk))
        width = -(-(end - begin) // pieces)
        width = -(-width // shape.keys) * shape.keys
        bounds = list(range(begin, end, width))
        if len(bounds) == 1:
            tasks.append((number, first_row, 0, NO_END, -1))
            costs.append(end - begin)
            continue
        jobs.append((number, first_row, partials, len(bounds)))
        for i, at in enumerate(bounds):  # the outer bounds are left open: the mask knows them exactly
            last = i == len(bounds) - 1
            tasks.append((number, first_row, at if i else 0, NO_END if last else at + width, partials))
            costs.append(min(end, at + width) - at)
            partials += 1
    order = np.argsort(-np.array(costs, dtype=np.int64), kind="stable")
    table = np.array(tasks, dtype=np.int32).reshape(-1, 5)[order]
    return Tasks(table, np.array(jobs, dtype=np.int32).reshape(-1, 4), partials)


def most_decode_tasks(sequences: int, shape: Tiling, readers: Sequence[int], slots: int) -> tuple[int, int]:
    """How many tasks and jobs ``plan_tasks`` makes at most of so many single tokens in ``GRAPH_WAVES``: a tile is
    cut into ceil(its keys / chunk) pieces, and a chunk is at least (all keys x KV heads) / (waves x slots).
    """
    tiles = sequences * -(-max(readers) // shape.rows)
    return tiles + -(-GRAPH_WAVES * slots // len(readers)), tiles


def choose_chunk(
    keys: Sequence[int], kv_heads: int, slots: int, tile_keys: int, most_waves: int = MOST_WAVES
) -> int:
    """Keys of a task at most: of the lengths that would make 1 ... ``most_waves`` full waves of tasks, the one
    whose waves end first. Waves are taken as equally long as their longest task, each with a fixed cost.
    """
    lengths = np.maximum(np.array(keys, dtype=np.int64), 1)
    best = int(lengths.max(initial=1))
    best_cost = None
    for waves in range(1, most_waves + 1):
        wanted = -(-int(lengths.sum()) * kv_heads // (waves * slots))
        chunk = max(1, -(-wanted // tile_keys)) * tile_keys
        pieces = -(-lengths // chunk)
        widest = int((-(-lengths // pieces)).max(initial=1))
        cost = -(-int(pieces.sum()) * kv_heads // slots) * (widest + TASK_COST_KEYS)
        if best_cost is None or cost < best_cost:
            best, best_cost = chunk, cost
    return best
