"""The CUDA kernels compiled for the host (tests/kernel_host) and called on CPU tensors: logic without a GPU."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from hexgen.worker.kernels.arithmetic import DeviceLimits
from hexgen.worker.kernels.device import Launch
from hexgen.worker.kernels.source import KernelSpec, source_directory

COMPILER = shutil.which("g++")
_HOST = Path(__file__).parent / "kernel_host"


@cache
def _directory() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hexgen-emulated-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compile(arch: int, *arguments: str) -> None:
    assert COMPILER is not None
    flags = ["-std=c++17", "-O0", "-fPIC", "-w", f"-D__CUDA_ARCH__={arch}0"]
    subprocess.run([COMPILER, *flags, *arguments], check=True, timeout=240)


@cache
def _header(arch: int) -> Path:
    """The emulation, precompiled: the standard library's headers take longer than any kernel."""
    path = _directory() / str(arch) / "emulation.h"
    path.parent.mkdir()
    shutil.copy(_HOST / "emulation.h", path)
    _compile(arch, "-x", "c++-header", str(path), "-o", f"{path}.gch")
    return path


@cache
def emulated(spec: KernelSpec, arch: int) -> ctypes._CFuncPtr:
    """A function (grid x, grid y, threads, bytes of shared memory, the kernel's parameters)."""
    name = hashlib.sha256(f"{spec}{arch}".encode()).hexdigest()[:16]
    path = _directory() / f"{name}.so"
    defines = [f'-DHX_SOURCE="{spec.file}.cu"', f"-DHX_KERNEL={spec.kernel}"]
    defines += [f"-D{key}={value}" for key, value in spec.defines]
    where = ["-include", str(_header(arch)), f"-I{source_directory()}", str(_HOST / "launch.cpp")]
    _compile(arch, "-shared", *defines, *where, "-o", str(path))
    library = ctypes.CDLL(str(path))
    return ctypes.CFUNCTYPE(None)(ctypes.c_void_p.in_dll(library, "hexgen_emulated").value)


class EmulatedDevice:
    """What ``KernelDevice`` is to the launchers, on the host: tensors stay on the CPU."""

    def __init__(self, limits: DeviceLimits, slots: int) -> None:
        """``slots``: blocks that the card is said to run at once; more of them, more splits."""
        self.limits = limits
        self._slots = slots
        self.launched: list[str] = []

    def prepare(self, specs: Iterable[KernelSpec]) -> None:
        """Nothing: compiled when first launched."""

    def allow_shared(self, spec: KernelSpec, shared_bytes: int) -> None:
        assert shared_bytes <= self.limits.block_shared_bytes

    def blocks_at_once(self, spec: KernelSpec, threads: int, shared_bytes: int) -> int:
        return self._slots

    def launch(self, spec: KernelSpec, how: Launch, *arguments: object) -> None:
        self.launched.append(spec.kernel)
        numbers = (ctypes.c_int(value) for value in (*how.grid, how.threads, how.shared_bytes))
        emulated(spec, self.limits.arch)(*numbers, *map(_argument, arguments))


def _argument(value: object) -> object:
    """As cuda.core takes it: a tensor's address, None as null, numpy's scalars as they are."""
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    kinds = {np.int32: ctypes.c_int, np.int64: ctypes.c_longlong, np.float32: ctypes.c_float}
    return kinds[type(value)](value)  # type: ignore[index]
