"""One CUDA device: its limits, its compiled kernels, and launches on torch's current stream."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hexgen.errors import EngineError
from hexgen.worker.kernels.arithmetic import DeviceLimits
from hexgen.worker.kernels.cache import KernelCache
from hexgen.worker.kernels.nvrtc import choose_library, load_libraries
from hexgen.worker.kernels.source import KernelSpec

# NVRTC compiles one program a thread; a start-up needs fewer than ten.
COMPILING_THREADS = 8
_REMEDY = "pip install cuda-core 'cuda-bindings==12.9.*' 'nvidia-cuda-nvrtc-cu12==12.9.*'"


@dataclass(frozen=True, slots=True)
class Launch:
    """Where and how a kernel runs."""

    grid: tuple[int, int]
    threads: int
    shared_bytes: int = 0


class _TorchStream:
    """torch's stream as cuda.core takes foreign ones."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


class KernelDevice:
    """Kernels of one device. Made by ``kernel_device``; one thread launches at a time."""

    def __init__(self, device: torch.device, kernels: KernelCache) -> None:
        """``EngineError`` where cuda.core, the driver or a fitting NVRTC is missing."""
        try:
            from cuda.bindings import driver
            from cuda.core import Device
        except ImportError as error:
            raise EngineError(f"cuda.core is not installed ({error})", remedy=_REMEDY) from error
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        torch.empty(0, device=self.device)  # torch's context, before cuda.core makes it current
        self._driver = driver
        self._core = Device(index)
        self._core.set_current()
        status, version = driver.cuDriverGetVersion()
        if int(status) != 0:
            raise EngineError(f"the CUDA driver does not tell its version (error {int(status)})")
        major, minor = self._core.compute_capability
        self.capability = (int(major), int(minor))
        self.nvrtc, arch = choose_library(load_libraries(), self.capability, version // 1000)
        properties = self._core.properties
        self.limits = DeviceLimits(
            arch,
            int(properties.multiprocessor_count),
            int(properties.max_shared_memory_per_block_optin),
            int(properties.max_shared_memory_per_multiprocessor),
        )
        self._cache = kernels
        self._kernels: dict[KernelSpec, Any] = {}
        self._streams: dict[int, Any] = {}
        self._current = threading.local()

    def prepare(self, specs: Iterable[KernelSpec]) -> None:
        """Compile (or find on disk) all of ``specs``, beside one another, and load them. ``EngineError`` where one
        does not compile or load.
        """
        wanted = [spec for spec in dict.fromkeys(specs) if spec not in self._kernels]
        with ThreadPoolExecutor(COMPILING_THREADS) as pool:
            compiled = list(pool.map(lambda spec: self._cache.get(self.nvrtc, spec, self.limits.arch), wanted))
        from cuda.core import ObjectCode

        for spec, result in zip(wanted, compiled, strict=True):
            try:
                self._kernels[spec] = ObjectCode.from_cubin(result.cubin, name=spec.file).get_kernel(spec.kernel)
            except Exception as error:  # cuda.core's own error types are not public
                raise EngineError(f"does not load: {error}", where=f"kernels/{spec.file}.cu") from error

    def allow_shared(self, spec: KernelSpec, shared_bytes: int) -> None:
        """More than 48 KiB of dynamic shared memory must be asked for, once a kernel."""
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle, device = self._kernel(spec).handle, self._driver.CUdevice(self.device.index)
        (status,) = self._driver.cuKernelSetAttribute(attribute, shared_bytes, handle, device)
        if int(status) != 0:
            raise EngineError(f"{shared_bytes} bytes of shared memory were refused (error {int(status)})")

    def blocks_at_once(self, spec: KernelSpec, threads: int, shared_bytes: int) -> int:
        """Blocks of the kernel that the whole card runs at a time; at least one a multiprocessor."""
        each = self._kernel(spec).occupancy.max_active_blocks_per_multiprocessor(threads, shared_bytes)
        return max(1, int(each)) * self.limits.processors

    def launch(self, spec: KernelSpec, how: Launch, *arguments: object) -> None:
        """On torch's current stream. Tensors go as addresses and must live until the kernel has run (torch's
        allocator sees to that for the same stream); None is a null pointer; numpy scalars go as they are.
        """
        from cuda.core import LaunchConfig, launch

        if how.grid[0] == 0 or how.grid[1] == 0:
            return
        if not getattr(self._current, "done", False):  # a context is current per thread
            self._core.set_current()
            self._current.done = True
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in arguments]
        config = LaunchConfig(grid=how.grid, block=how.threads, shmem_size=how.shared_bytes)
        launch(self._stream(), config, self._kernel(spec), *values)

    def _stream(self) -> Any:
        handle = torch.cuda.current_stream(self.device).cuda_stream
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = self._core.create_stream(_TorchStream(handle))
        return stream

    def _kernel(self, spec: KernelSpec) -> Any:
        if spec not in self._kernels:
            self.prepare([spec])
        return self._kernels[spec]


@cache
def kernel_device(device: torch.device) -> KernelDevice:
    """One a device and process. ``EngineError`` says what is missing."""
    return KernelDevice(device, KernelCache())
