"""The compiled loop (``core/``) as a shared library: translated and compiled once for a version, kept on disk.

It needs a C++ compiler of 2020 or later. Where there is none, everything is simulated by Python alone, slower.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from hexgen.batching import policy
from hexgen.compiled import CppSources, load, user_cache
from hexgen.errors import EngineError
from hexgen.scheduler.simulation import layout, record
from hexgen.scheduler.simulation.translate import TranslationError, constants_text, module_text
from hexgen.scheduler.simulation.translate_cost import CostCode

# Sums and products exactly as written: the same results as Python's, to the last bit. Where translated code would
# put a fraction into a whole number, that is an error.
_FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Werror=float-conversion")
_SOURCES = Path(__file__).parent / "core"


@cache
def cost_code() -> CostCode:
    return CostCode()


@cache
def sources() -> CppSources:
    """Raises ``EngineError`` where the policy or the cost model say what is not translated."""
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
        raise EngineError(f"the simulator's loop is not translated: {error}") from error
    return CppSources("simulator", {**found, "translated.inc": translated}, "run.cpp", _FLAGS)


_found: dict[bool, ctypes.CDLL | EngineError] = {}  # by `compiling`: what did not work is not tried again


def library(compiling: bool = True) -> ctypes.CDLL:
    """Raises ``EngineError``: why not. ``compiling``: False for only what was compiled before."""
    for known in {True, compiling}:
        if isinstance(found := _found.get(known), ctypes.CDLL):
            return found
    if compiling not in _found:
        try:
            _found[compiling] = load(sources(), user_cache() / "simulator", compiling=compiling)
        except OSError as error:
            _found[compiling] = EngineError(f"the simulator's loop cannot be kept: {error}")
        except EngineError as error:
            _found[compiling] = error
    found = _found[compiling]
    if isinstance(found, EngineError):
        raise found
    return found
