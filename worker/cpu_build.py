"""The CPU kernels (``kernels/cpu``) as a shared library: compiled once for a machine, kept on disk, loaded by
ctypes.

A C++ compiler that knows OpenMP is all it takes; where there is none, the layers run on torch alone, slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from hexgen.errors import EngineError
from hexgen.worker.kernels.cache import default_directory
from hexgen.worker.kernels.source import source_directory

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
COMPILE_LIMIT_S = 120.0
_KEPT = 8  # libraries of other versions or machines that stay in the directory
_COMPILERS = ("g++", "c++", "clang++")


@cache
def cpu_library(extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Loads the library, compiling it first (seconds) where this machine has not yet. ``extra``: further compiler
    arguments. ``EngineError`` or ``OSError`` (of a disk): why not.

    torch must be imported before: the library then shares torch's OpenMP threads.
    """
    compiler = find_compiler()
    sources = read_sources()
    name = f"cpu-{key(compiler, sources, extra)}.so"
    directory = _private(default_directory())
    if directory is None:
        directory = Path(tempfile.mkdtemp(prefix="hexgen-cpu-"))  # of no further use once it is loaded
        try:
            return _load(_compile(compiler, directory / name, extra))
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    path = directory / name
    with (directory / "cpu.lock").open("w") as lock:  # ranks of one machine start together: one of them compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            _compile(compiler, path, extra)
            _evict(directory, path)
    with contextlib.suppress(OSError):
        os.utime(path)  # what was used last is evicted last
    return _load(path)


def find_compiler() -> str:
    """``$CXX``, or the first C++ compiler on the path. ``EngineError`` where there is none."""
    named = os.environ.get("CXX")
    found = next((path for name in ((named,) if named else _COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise EngineError("no C++ compiler was found", where=named or "PATH", remedy="install g++")
    return found


def read_sources() -> tuple[tuple[str, str], ...]:
    folder = source_directory() / "cpu"
    return tuple((path.name, path.read_text()) for path in sorted([*folder.glob("*.h"), *folder.glob("*.cpp")]))


def key(compiler: str, sources: tuple[tuple[str, str], ...], extra: tuple[str, ...] = ()) -> str:
    """Everything that the machine code depends on; a home directory may be shared among unlike machines."""
    version = _run([compiler, "--version"], 10.0).stdout
    return hashlib.sha256(
        json.dumps([compiler, version, FLAGS, extra, _processor(), sources]).encode()
    ).hexdigest()[:32]


def _processor() -> str:
    """The instructions that this machine has, as far as it says."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("flags", "Features", "model name", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return platform.machine() + platform.processor()


def _private(directory: Path) -> Path | None:
    """``directory``, made where it is missing; None where others could put a library of theirs into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError:
        return None
    safe = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return directory if safe and os.access(directory, os.W_OK) else None


def _compile(compiler: str, path: Path, extra: tuple[str, ...]) -> Path:
    """Compiles to ``path``, at once as far as other processes can see."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        source = source_directory() / "cpu" / "stage.cpp"
        done = _run([compiler, *FLAGS, *extra, str(source), "-o", str(part)], COMPILE_LIMIT_S)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise EngineError(f"the CPU kernels do not compile: {said}", where=compiler)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _run(command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"the compiler failed: {error}", where=command[0]) from error


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)  # broken: the next start compiles again
        raise EngineError(f"the CPU kernels cannot be loaded: {error}", where=str(path)) from error


def _evict(directory: Path, newest: Path) -> None:
    found = []
    for path in directory.glob("cpu-*.so"):
        with contextlib.suppress(OSError):  # another process may have removed it
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[:-_KEPT]:
        if path != newest:
            path.unlink(missing_ok=True)
