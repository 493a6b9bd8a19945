"""The compiled loop (``core/``) as a shared library: translated and compiled once for a version, kept on disk.

It needs a C++ compiler of 2020 or later. Where there is none, everything is simulated by Python alone, slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from hexgen.batching import policy
from hexgen.scheduler.simulation import layout, record
from hexgen.scheduler.simulation.translate import TranslationError, constants_text, module_text
from hexgen.scheduler.simulation.translate_cost import CostCode

# Sums and products exactly as written: the same results as Python's, to the last bit. Where translated code would
# put a fraction into a whole number, that is an error.
_FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Werror=float-conversion")
_LIMIT_S = 120.0
_COMPILERS = ("g++", "c++", "clang++")
_SOURCES = Path(__file__).parent / "core"


class NativeError(Exception):
    """Why there is no compiled loop."""


@cache
def cost_code() -> CostCode:
    return CostCode()


@cache
def sources() -> dict[str, str]:
    """All files by name. Raises ``NativeError`` where the policy or the cost model say what is not translated."""
    constants = {
        "CELL_TOKENS": layout.CELL_TOKENS,
        "GAP_BINS": record.GAP_BINS,
        "GAP_LEAST_S": record.GAP_LEAST_S,
        "GAP_LOG_WIDTH": record.GAP_LOG_WIDTH,
        "SAMPLES": record.SAMPLES,
    }
    try:
        translated = f"{constants_text(constants)}\n{module_text(policy)}\n{cost_code().text}"
        found = {path.name: path.read_text() for path in sorted(_SOURCES.iterdir())}
    except (TranslationError, OSError) as error:  # a Python without its sources, too
        raise NativeError(str(error)) from error
    return {**found, "translated.inc": translated}


_found: dict[bool, ctypes.CDLL | NativeError] = {}  # by `compiling`: what did not work is not tried again


def library(compiling: bool = True) -> ctypes.CDLL:
    """Raises ``NativeError``: why not. ``compiling``: False for only what was compiled before."""
    for known in {True, compiling}:
        if isinstance(found := _found.get(known), ctypes.CDLL):
            return found
    if compiling not in _found:
        try:
            _found[compiling] = _made(compiling)
        except NativeError as error:
            _found[compiling] = error
    found = _found[compiling]
    if isinstance(found, NativeError):
        raise found
    return found


def _made(compiling: bool) -> ctypes.CDLL:
    compiler = _compiler()
    directory = _private(_directory())
    if directory is None:
        if not compiling:
            raise NativeError("there is no place to keep it")
        with tempfile.TemporaryDirectory(prefix="hexgen-simulator-") as made:
            return _load(_compile(compiler, Path(made) / "simulator.so"))
    path = directory / f"simulator-{_key(compiler)}.so"
    if not path.is_file():
        if not compiling:
            raise NativeError("it has not been compiled yet")
        _compile(compiler, path)
        for other in directory.glob("simulator-*.so"):
            if other != path:
                other.unlink(missing_ok=True)
    return _load(path)


def _compiler() -> str:
    named = os.environ.get("CXX")
    found = next((path for name in ((named,) if named else _COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise NativeError("no C++ compiler was found")
    return found


def _directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hexgen" / "simulator"


def _private(directory: Path) -> Path | None:
    """``directory``, made where it is missing; None where others could put a library of theirs into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError:
        return None
    safe = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return directory if safe and os.access(directory, os.W_OK) else None


def _key(compiler: str) -> str:
    told = [compiler, platform.machine(), *_FLAGS, *(part for item in sources().items() for part in item)]
    with contextlib.suppress(OSError):
        told.append(str(Path(compiler).resolve().stat().st_mtime_ns))  # another version of it
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:32]


def _compile(compiler: str, path: Path) -> Path:
    """To ``path``, at once as far as other processes can see."""
    with tempfile.TemporaryDirectory(prefix="hexgen-simulator-", dir=path.parent) as made:
        for name, text in sources().items():
            (Path(made) / name).write_text(text)
        part = Path(made) / "part.so"
        command = [compiler, *_FLAGS, str(Path(made) / "run.cpp"), "-o", str(part)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeError(f"{compiler} failed: {error}") from error
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise NativeError(f"{compiler}: {said[0]}")
        part.replace(path)
    return path


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)  # broken: the next start compiles again
        raise NativeError(f"{path}: {error}") from error
