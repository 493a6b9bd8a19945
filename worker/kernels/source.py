"""The CUDA sources, and which instance of them is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hexgen
from hexgen.errors import EngineError

# DType as the sources spell it.
C_TYPES = {"float32": "float", "float16": "half_t", "bfloat16": "bf16_t"}


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel, with everything that is fixed when it is compiled."""

    file: str  # in kernels/, without .cu
    kernel: str  # the entry point
    defines: tuple[tuple[str, str], ...]

    @staticmethod
    def make(file: str, kernel: str, dtype: str, **defines: int) -> KernelSpec:
        """``defines`` in lower case, without the HX_ of the sources."""
        values = {"DTYPE": C_TYPES[dtype]} | {name.upper(): str(value) for name, value in defines.items()}
        return KernelSpec(file, kernel, tuple(sorted((f"HX_{name}", value) for name, value in values.items())))


@dataclass(frozen=True, slots=True)
class Source:
    text: str
    headers: tuple[tuple[str, str], ...]  # (name in #include, text)


def source_directory() -> Path:
    """Where the ``.cu`` files are: beside the package when installed, at the top of a checkout."""
    package = Path(hexgen.__file__).resolve().parent
    for candidate in (package / "kernels", package.parent / "kernels"):
        if (candidate / "intrinsics.cuh").is_file():
            return candidate
    raise EngineError("the CUDA sources are missing", where=str(package / "kernels"), remedy="reinstall hexgen")


@cache
def read_source(file: str) -> Source:
    """``kernels/<file>.cu`` and every header (all of them: they are few, and a change in one counts for all)."""
    directory = source_directory()
    headers = tuple((path.name, path.read_text()) for path in sorted(directory.glob("*.cuh")))
    return Source((directory / f"{file}.cu").read_text(), headers)
