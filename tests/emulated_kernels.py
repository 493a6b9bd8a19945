"""The CUDA kernels compiled for the host (tests/kernel_host) and called on CPU tensors: logic without a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from hexgen.worker.batch_inputs import BatchInputs
from hexgen.worker.kernels.arithmetic import DeviceLimits, Tasks, Tiling, attention_kernel, tiling
from hexgen.worker.kernels.source import KernelSpec, source_directory
from hexgen.worker.kernels.step import Readers, host_tables
from hexgen.worker.kv import KVLayer

COMPILER = shutil.which("g++")
_HOST = Path(__file__).parent / "kernel_host"
_LOG2_E = 1.4426950408889634


@cache
def _directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="hexgen-emulated-"))


@cache
def emulated(spec: KernelSpec, arch: int) -> ctypes._CFuncPtr:
    """A function (grid x, grid y, threads, bytes of shared memory, the kernel's parameters)."""
    assert COMPILER is not None
    name = hashlib.sha256(f"{spec}{arch}".encode()).hexdigest()[:16]
    path = _directory() / f"{name}.so"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror"]
    command += [f"-D__CUDA_ARCH__={arch}0", f'-DHX_SOURCE="{spec.file}.cu"', f"-DHX_KERNEL={spec.kernel}"]
    command += [f"-D{key}={value}" for key, value in spec.defines]
    command += ["-include", str(_HOST / "emulation.h"), f"-I{source_directory()}", str(_HOST / "launch.cpp")]
    subprocess.run([*command, "-o", str(path)], check=True, timeout=240)
    library = ctypes.CDLL(str(path))
    return ctypes.CFUNCTYPE(None)(ctypes.c_void_p.in_dll(library, "hexgen_emulated").value)


def call(
    spec: KernelSpec, arch: int, grid: tuple[int, int], threads: int, shared_bytes: int, *arguments: object
) -> None:
    """Tensors and arrays go as addresses, None as a null pointer, int as int32, float as float32."""
    function = emulated(spec, arch)
    function(*(ctypes.c_int(value) for value in (*grid, threads, shared_bytes)), *map(_argument, arguments))


def _argument(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return value if isinstance(value, ctypes._SimpleCData) else ctypes.c_int(int(value))  # type: ignore[call-overload]


def emulated_attention(
    q: torch.Tensor,
    layer: KVLayer,
    batch: BatchInputs,
    window: int | None,
    readers: Readers,
    limits: DeviceLimits,
    slots: int,
    tree: np.ndarray | None = None,
) -> torch.Tensor:
    """``[tokens, query heads, head_dim]`` from ``q`` of that shape; keys and values are in their pages already.

    Everything that a kernel must write is poisoned before.
    """
    pool = layer.pool
    dtype = str(pool.dtype).removeprefix("torch.")
    group = max(readers.counts)
    shapes = {decode: tiling(dtype, pool.head_dim, limits, decode, group) for decode in (False, True)}
    tables = host_tables(batch, window, readers, shapes[False], shapes[True], slots, slots)
    out = torch.full((q.shape[0], readers.query_heads, pool.head_dim), float("nan"), dtype=pool.dtype)
    for tasks, decode in ((tables.long, False), (tables.short, True)):
        if tasks is not None:
            _launch(q, layer, out, window, readers, limits.arch, shapes[decode], decode, tasks, tables, tree)
    return out


def _launch(
    q: torch.Tensor,
    layer: KVLayer,
    out: torch.Tensor,
    window: int | None,
    readers: Readers,
    arch: int,
    shape: Tiling,
    decode: bool,
    tasks: Tasks,
    tables: object,
    tree: np.ndarray | None,
) -> None:
    pool = layer.pool
    dtype = str(pool.dtype).removeprefix("torch.")
    rows = max(1, tasks.partials) * pool.kv_heads * shape.rows
    partial_out = np.full(rows * pool.head_dim, np.nan, dtype=np.float32)
    partial_stats = np.full(rows * 2, np.nan, dtype=np.float32)
    parameters = (
        q,
        layer.rows,
        out,
        tables.runs,  # type: ignore[attr-defined]
        tasks.tasks,
        tables.pages,  # type: ignore[attr-defined]
        partial_out,
        partial_stats,
        tree,
        ctypes.c_longlong(q.stride(0)),
        readers.query_heads,
        readers.kv_heads,
        readers.group,
        readers.shift,
        window or 0,
        0 if tree is None else tree.shape[1],
        pool.head_dim**-0.5 * _LOG2_E,
    )
    spec = attention_kernel(dtype, pool.head_dim, pool.page_size, shape, decode)
    grid = (len(tasks.tasks), pool.kv_heads)
    call(spec, arch, grid, shape.threads, shape.shared_bytes, *parameters)
    if tasks.partials:
        reduce = KernelSpec.make("attention_reduce", "attention_reduce", dtype, head=pool.head_dim)
        grid = (len(tasks.jobs) * shape.rows, pool.kv_heads)
        call(reduce, arch, grid, 128, 0, tasks.jobs, shape.rows, *parameters)
