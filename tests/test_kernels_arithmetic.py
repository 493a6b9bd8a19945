"""Tiles, splits, and the choice of a compiler, as plain arithmetic."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.errors import EngineError
from hexgen.worker.kernels.arithmetic import DeviceLimits, RunShape, choose_chunk, plan_tasks, supported, tiling
from hexgen.worker.kernels.cache import KernelCache, key
from hexgen.worker.kernels.nvrtc import Compiled, choose_library, target_arch
from hexgen.worker.kernels.source import KernelSpec, read_source
from hexgen.worker.kernels.step import Readers

# Shared memory of a block and of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability".
KIB = 1024
LIMITS = {
    70: DeviceLimits(70, 80, 96 * KIB, 96 * KIB),  # V100
    75: DeviceLimits(75, 40, 64 * KIB, 64 * KIB),  # T4
    80: DeviceLimits(80, 108, 163 * KIB, 164 * KIB),  # A100
    86: DeviceLimits(86, 82, 99 * KIB, 100 * KIB),  # RTX 3090
    89: DeviceLimits(89, 58, 99 * KIB, 100 * KIB),  # L4
    90: DeviceLimits(90, 132, 227 * KIB, 228 * KIB),  # H100, H200
    100: DeviceLimits(100, 148, 227 * KIB, 228 * KIB),  # B200
    120: DeviceLimits(120, 170, 99 * KIB, 100 * KIB),  # RTX 5090
}
DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize(
    ("arch", "dtype", "head", "decode"),
    itertools.product(LIMITS, DTYPES, (16, 64, 80, 96, 128, 256), (False, True)),
)
def test_every_card_has_a_shape_for_every_head(arch: int, dtype: str, head: int, decode: bool) -> None:
    for group in (1, 3, 8, 40):
        shape = tiling(dtype, head, LIMITS[arch], decode, group)
        assert shape.shared_bytes <= LIMITS[arch].block_shared_bytes
        assert shape.threads <= 128
        assert shape.stages == 1 or arch >= 80, "copies are synchronous there: a second buffer buys nothing"
        assert shape.tensor_cores == (dtype == "float16" or (dtype == "bfloat16" and arch >= 80))


def test_what_is_supported() -> None:
    assert supported("float16", 80, (7, 0))
    assert not supported("float16", 72, (9, 0))
    assert not supported("float16", 272, (9, 0))
    assert not supported("float16", 128, (6, 1))
    assert not supported("float64", 128, (9, 0))


@settings(deadline=None, max_examples=60)
@given(
    runs=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 700)), min_size=1, max_size=5),
    heads=st.tuples(st.integers(0, 7), st.integers(1, 12)),
    group=st.integers(1, 5),
    window=st.sampled_from([None, 1, 7, 200]),
    slots=st.sampled_from([1, 40, 396, 10_000]),
    decode=st.booleans(),
)
def test_tasks_cover_every_row_and_key_once(
    runs: list[tuple[int, int]],
    heads: tuple[int, int],
    group: int,
    window: int | None,
    slots: int,
    decode: bool,
) -> None:
    """Whatever the kernel's mask lets through is in exactly one task, for every KV head of an uneven shard too."""
    last = heads[0] + heads[1]
    readers = Readers.make((heads[0], last), (heads[0] // group, (last - 1) // group + 1), group)
    shape = tiling("float16", 64, LIMITS[90], decode, group)
    shapes = [RunShape(*run) for run in runs]
    tasks = plan_tasks(shapes, shape, readers.counts, window, slots, 3)
    covered: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for run, first_row, begin, end, _ in tasks.tasks.tolist():
        covered.setdefault((run - 3, first_row), []).append((begin, end))
    for (run, first_row), pieces in covered.items():
        assert first_row % shape.rows == 0
        pieces.sort()
        assert pieces[0][0] == 0, "the first piece is open"
        assert pieces[-1][1] > shapes[run].start + shapes[run].length
        assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces)), "pieces touch and do not overlap"
    for run, each in enumerate(shapes):
        for count in readers.counts:
            needed = range(0, each.length * count, shape.rows)
            assert all((run, row) in covered for row in needed)
    partials = sorted(task[4] for task in tasks.tasks.tolist() if task[4] >= 0)
    assert partials == list(range(tasks.partials))
    jobs = {(job[0] - 3, job[1]): range(job[2], job[2] + job[3]) for job in tasks.jobs.tolist()}
    for run, first_row, begin, _, partial in tasks.tasks.tolist():
        pieces = covered[run - 3, first_row]
        assert (partial >= 0) == (len(pieces) > 1)
        if partial >= 0:
            assert partial == jobs[run - 3, first_row][[p[0] for p in pieces].index(begin)]


def test_splits_fill_the_card() -> None:
    """One long context is cut until every multiprocessor has work; many are not cut further than helps."""
    alone = choose_chunk([131_072], kv_heads=8, slots=396, tile_keys=64)
    pieces = -(-131_072 // alone)
    assert 0.9 * 396 <= pieces * 8 <= 396, "one full wave"
    assert choose_chunk([8192] * 1024, kv_heads=8, slots=396, tile_keys=64) >= 8192
    assert choose_chunk([100], kv_heads=8, slots=1, tile_keys=64) >= 100


def test_readers_of_an_uneven_shard() -> None:
    readers = Readers.make((3, 10), (0, 3), 4)  # heads 3 | 4 5 6 7 | 8 9
    assert readers.counts == (1, 4, 2)
    assert readers.reads == [0, 1, 1, 1, 1, 2, 2]


# ---- compilers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeNvrtc:
    version: tuple[int, int]
    archs: tuple[int, ...]


TWELVE = FakeNvrtc((12, 9), (50, 60, 70, 75, 80, 86, 89, 90, 100, 120, 121))
THIRTEEN = FakeNvrtc((13, 0), (75, 80, 86, 89, 90, 100, 110, 120, 121))
OLD = FakeNvrtc((12, 4), (50, 60, 70, 75, 80, 86, 89, 90))


@pytest.mark.parametrize(
    ("capability", "driver", "expected"),
    [
        ((7, 0), 13, (TWELVE, 70)),  # CUDA 13 dropped Volta
        ((9, 0), 13, (THIRTEEN, 90)),
        ((9, 0), 12, (TWELVE, 90)),  # a driver for CUDA 12 does not load code of 13
        ((8, 7), 12, (TWELVE, 86)),  # code for 8.6 runs on 8.7
        ((12, 1), 12, (TWELVE, 121)),
        ((11, 0), 13, (THIRTEEN, 110)),
    ],
)
def test_the_compiler_follows_card_and_driver(
    capability: tuple[int, int], driver: int, expected: tuple[FakeNvrtc, int]
) -> None:
    assert choose_library([OLD, THIRTEEN, TWELVE], capability, driver) == expected  # type: ignore[list-item]


def test_no_compiler_for_a_card_says_what_to_install() -> None:
    with pytest.raises(EngineError, match=r"compute capability 7\.0") as caught:
        choose_library([THIRTEEN], (7, 0), 13)  # type: ignore[list-item]
    assert "nvidia-cuda-nvrtc-cu12" in str(caught.value.remedy)
    assert target_arch((90,), (10, 0)) is None


class CountingNvrtc:
    version = (12, 9)

    def __init__(self) -> None:
        self.calls = 0

    def compile(self, spec: KernelSpec, source: object, arch: int) -> Compiled:
        self.calls += 1
        return Compiled(f"{spec.kernel} {arch}".encode() * 100, "log é")


def test_the_cache_keeps_checks_and_evicts(tmp_path: Path) -> None:
    compiler = CountingNvrtc()
    specs = [KernelSpec.make("rms_norm", "rms_norm", dtype) for dtype in DTYPES]
    cache = KernelCache(tmp_path / "kernels")

    def get(spec: KernelSpec, arch: int = 90) -> Compiled:
        return cache.get(compiler, spec, arch)  # type: ignore[arg-type]

    first = get(specs[0])
    assert get(specs[0]) == first == KernelCache(tmp_path / "kernels").get(compiler, specs[0], 90)  # type: ignore[arg-type]
    assert compiler.calls == 1
    get(specs[0], 80)
    get(specs[1])
    assert compiler.calls == 3, "architecture and options are part of the key"
    (path,) = (
        p for p in cache.directory.iterdir() if key(specs[1], read_source("rms_norm"), 90, (12, 9)) in p.name
    )
    path.write_bytes(path.read_bytes()[:-3])
    assert get(specs[1]).cubin == b"rms_norm 90" * 100
    assert compiler.calls == 4, "a truncated entry is made again"
    for i, entry in enumerate(sorted(cache.directory.iterdir())):
        os.utime(entry, (i, i))
    cache.most_bytes = 3000
    get(specs[2])
    sizes = [entry.stat().st_size for entry in cache.directory.iterdir()]
    assert sum(sizes) <= 3000
    calls = compiler.calls
    get(specs[2])
    assert compiler.calls == calls, "the newest is kept"
    assert not list(cache.directory.glob("*.part"))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    cache = KernelCache(blocked / "kernels")
    assert cache.get(CountingNvrtc(), KernelSpec.make("rms_norm", "rms_norm", "float32"), 90).cubin  # type: ignore[arg-type]
