"""Facts about this machine and this installation that need neither torch nor Ray."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Set (to anything): tracebacks of our own errors, and a local Ray instance keeps its logs.
DEBUG_VARIABLE = "HEXGEN_DEBUG"
# On a node of a laboratory: bytes that each of its devices has. Its control group has more, for interpreters.
LAB_MEMORY_VARIABLE = "HEXGEN_LAB_MEMORY"


def debugging() -> bool:
    return bool(os.environ.get(DEBUG_VARIABLE))


def installed_version() -> str:
    try:
        return version("hexgen-engine")
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


def available_memory() -> int:
    """Bytes that new processes can take without swapping, no more than the control group allows."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit = _control_group_room()
    return available if limit is None else min(available, limit)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _control_group_room() -> int | None:
    """Bytes left under a cgroup v2 limit (a container's), None where there is none."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))
