"""The CPU kernels (``kernels/cpu``) as a shared library for this machine.

A C++ compiler that knows OpenMP is all it takes; where there is none, the layers run on torch alone, slower.
"""

from __future__ import annotations

import ctypes
from functools import cache

from hexgen.compiled import CppSources, load
from hexgen.worker.kernels.cache import default_directory
from hexgen.worker.kernels.source import source_directory

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")


@cache
def cpu_library(extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compiled first (seconds) where this machine has not yet. ``extra``: further compiler arguments.

    ``EngineError`` or ``OSError`` (of a disk): why not. torch must be imported before: the library then shares
    torch's OpenMP threads.
    """
    return load(cpu_sources(extra), default_directory())


def cpu_sources(extra: tuple[str, ...] = ()) -> CppSources:
    folder = source_directory() / "cpu"
    files = {path.name: path.read_text() for path in sorted([*folder.glob("*.h"), *folder.glob("*.cpp")])}
    return CppSources("cpu", files, "stage.cpp", (*FLAGS, *extra))
