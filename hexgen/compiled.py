"""C++ sources as a shared library: compiled once for a machine by its own compiler, kept on disk, loaded.

Who calls has another way where there is no compiler: every function says why not by ``EngineError``.
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hexgen.errors import EngineError

COMPILE_LIMIT_S = 120.0
_COMPILERS = ("g++", "c++", "clang++")
_KEPT = 8  # libraries of other versions or machines that stay in the directory


@dataclass(frozen=True, slots=True)
class CppSources:
    """``files`` by name; the compiler is given ``main`` of them. ``name``: what the library is called on disk."""

    name: str
    files: Mapping[str, str]
    main: str
    flags: tuple[str, ...]


def user_cache() -> Path:
    """Where programs keep what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hexgen"


def load(sources: CppSources, directory: Path, *, compiling: bool = True) -> ctypes.CDLL:
    """From ``directory``, compiled to there first (seconds) where it is not there yet.

    A directory that others may write to is not used: the library is then compiled every time. ``compiling``: False
    for only what was compiled before. Raises ``EngineError``, or ``OSError`` of a disk.
    """
    compiler = find_compiler()
    name = f"{sources.name}-{key(compiler, sources)}.so"
    private = private_directory(directory)
    if private is None:
        if not compiling:
            raise EngineError("there is no directory to keep it in", where=str(directory))
        with tempfile.TemporaryDirectory(prefix="hexgen-compiled-") as made:  # of no use once it is loaded
            return _opened(compile_to(compiler, sources, Path(made) / name))
    path = private / name
    if not compiling and not path.is_file():
        raise EngineError(f"{sources.name} has not been compiled yet", where=str(private))
    with (private / f"{sources.name}.lock").open("w") as lock:  # of those who start together one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            compile_to(compiler, sources, path)
            _evict(sources.name, private, path)
    with contextlib.suppress(OSError):
        os.utime(path)  # what was used last is evicted last
    return _opened(path)


def find_compiler() -> str:
    """``$CXX``, or the first C++ compiler on the path. ``EngineError`` where there is none."""
    named = os.environ.get("CXX")
    found = next((path for name in ((named,) if named else _COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise EngineError("no C++ compiler was found", where=named or "PATH", remedy="install g++")
    return found


def key(compiler: str, sources: CppSources) -> str:
    """Everything that the machine code depends on; a home directory may be shared among unlike machines."""
    version = _run([compiler, "--version"], 10.0).stdout
    told = [compiler, version, sources.flags, _processor(), sorted(sources.files.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def private_directory(directory: Path) -> Path | None:
    """``directory``, made where it is missing; None where others could put a library of theirs into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError:
        return None
    safe = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return directory if safe and os.access(directory, os.W_OK) else None


def compile_to(compiler: str, sources: CppSources, path: Path) -> Path:
    """Compiles to ``path``, at once as far as other processes can see."""
    with tempfile.TemporaryDirectory(prefix="hexgen-compiled-", dir=path.parent) as made:
        for name, text in sources.files.items():
            (Path(made) / name).write_text(text)
        part = Path(made) / "part.so"
        command = [compiler, *sources.flags, str(Path(made) / sources.main), "-o", str(part)]
        done = _run(command, COMPILE_LIMIT_S)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            said = next((line for line in lines if "error" in line), lines[0])
            raise EngineError(f"{sources.name} does not compile: {said}", where=compiler)
        part.replace(path)
    return path


def _processor() -> str:
    """The instructions that this machine has, as far as it says."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("flags", "Features", "model name", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return platform.machine() + platform.processor()


def _run(command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"the compiler failed: {error}", where=command[0]) from error


def _opened(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)  # broken: the next start compiles again
        raise EngineError(f"the library cannot be loaded: {error}", where=str(path)) from error


def _evict(name: str, directory: Path, newest: Path) -> None:
    found = []
    for path in directory.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError):  # another process may have removed it
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[:-_KEPT]:
        if path != newest:
            path.unlink(missing_ok=True)
