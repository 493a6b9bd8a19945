"""NVRTC, the compiler as a library: found, chosen by what it can compile for, and called.

Called through ctypes and not through a binding of one CUDA major version: a cluster may need NVRTC 12 for a V100
(CUDA 13 dropped it) and 13 for a newer card, and both have the same dozen C functions. No toolkit and no headers
are needed beside the library, which comes with CUDA builds of torch, or from PyPI (``nvidia-cuda-nvrtc-cu12``).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hexgen.errors import EngineError
from hexgen.worker.kernels.source import KernelSpec, Source

# The fewest options that change code. Fast maths is not among them: what is approximate says so in the source.
OPTIONS = ("-std=c++17", "--ptxas-options=-v")


@dataclass(frozen=True, slots=True)
class Compiled:
    cubin: bytes
    log: str  # with ptxas's word on registers, stack and spills


class Nvrtc:
    """One NVRTC library. Calls may come from several threads; compiling releases the interpreter's lock."""

    def __init__(self, path: str) -> None:
        """``EngineError`` where the library cannot be loaded."""
        try:
            self._library = ctypes.CDLL(path)
            major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
            self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
            self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
            archs = (ctypes.c_int * count.value)()
            self._call("nvrtcGetSupportedArchs", archs)
        except (OSError, AttributeError) as error:
            raise EngineError(f"NVRTC cannot be loaded: {error}", where=path) from error
        self.path = path
        self.version = (major.value, minor.value)
        self.archs = tuple(archs)  # 70 for sm_70

    def compile(self, spec: KernelSpec, source: Source, arch: int) -> Compiled:
        """Machine code for sm_``arch``. ``EngineError`` with the compiler's words where it does not compile."""
        program = ctypes.c_void_p()
        names = _strings(name for name, _ in source.headers)
        texts = _strings(text for _, text in source.headers)
        name = f"{spec.file}.cu".encode()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.text.encode(),
            name,
            len(source.headers),
            texts,
            names,
        )
        try:
            options = _strings(compile_options(spec, arch))
            status = self._library.nvrtcCompileProgram(program, len(options), options)
            log = self._bytes("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program).rstrip(b"\0").decode()
            if status != 0:
                raise EngineError(f"does not compile for sm_{arch}:\n{log}", where=f"kernels/{spec.file}.cu")
            return Compiled(self._bytes("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program), log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, size_of: str, get: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_of, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(get, program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            text = self._library.nvrtcGetErrorString
            text.restype = ctypes.c_char_p
            raise EngineError(f"{name} failed: {text(status).decode()}")


def compile_options(spec: KernelSpec, arch: int) -> list[str]:
    defines = [f"-D{name}={value}" for name, value in spec.defines]
    return [f"--gpu-architecture=sm_{arch}", *OPTIONS, *defines]


def find_libraries() -> list[str]:
    """Paths (or bare names for the system's loader) of NVRTC libraries, as pip and CUDA install them."""
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec is not None else ():
        for folder in ("cu13", "cuda_nvrtc"):
            library = Path(root) / folder / "lib"
            found += [str(path) for path in sorted(library.glob("libnvrtc.so.[0-9]*"))]
    return [*found, "libnvrtc.so.13", "libnvrtc.so.12"]


@cache
def load_libraries() -> tuple[Nvrtc, ...]:
    """Every NVRTC that can be loaded, one of each version."""
    by_version: dict[tuple[int, int], Nvrtc] = {}
    for path in find_libraries():
        try:
            library = Nvrtc(path)
        except EngineError:
            continue
        by_version.setdefault(library.version, library)
    return tuple(by_version.values())


def target_arch(archs: Iterable[int], capability: tuple[int, int]) -> int | None:
    """What to compile for: the card's own architecture, or the closest below it with the same major version, whose
    machine code it runs too (CUDA C++ Programming Guide, "Binary Compatibility").
    """
    wanted = capability[0] * 10 + capability[1]
    fitting = [arch for arch in archs if arch // 10 == capability[0] and arch <= wanted]
    return max(fitting, default=None)


def choose_library(
    libraries: Iterable[Nvrtc], capability: tuple[int, int], driver_major: int
) -> tuple[Nvrtc, int]:
    """The newest NVRTC that reaches the card and whose code the driver loads (same major version or older), and
    the architecture to compile for.
    """
    fitting = []
    for library in libraries:
        arch = target_arch(library.archs, capability)
        if arch is not None and library.version[0] <= driver_major:
            fitting.append((arch, library.version, library))
    if not fitting:
        raise EngineError(
            f"no NVRTC here compiles for compute capability {capability[0]}.{capability[1]} under a driver "
            f"for CUDA {driver_major}",
            remedy="pip install 'nvidia-cuda-nvrtc-cu12==12.9.*' reaches every card from sm_50 to sm_121",
        )
    arch, _, library = max(fitting, key=lambda entry: entry[:2])
    return library, arch


def _strings(values: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [value.encode() for value in values]
    return (ctypes.c_char_p * len(encoded))(*encoded)
