"""What the control group of this process allows: memory, and CPUs by quota. cgroup v1 and v2, nested groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")
# cgroup v1 has no word for "no limit" of memory: a number near 2^63 stands for it.
_NO_LIMIT = 1 << 60


def memory_limit(proc: Path = PROC, root: Path = ROOT) -> int | None:
    """Bytes that this group and those around it may take; None where nothing limits them."""
    found = [
        _integer(group / name)
        for group, name in _groups("memory", "memory.limit_in_bytes", "memory.max", proc, root)
    ]
    return min((limit for limit in found if limit is not None and limit < _NO_LIMIT), default=None)


def cpu_quota(proc: Path = PROC, root: Path = ROOT) -> float | None:
    """CPUs' worth of time that this group may use (0.25: a quarter of one); None where nothing limits it."""
    found = []
    for group, name in _groups("cpu", "cpu.cfs_quota_us", "cpu.max", proc, root):
        if name == "cpu.max":
            quota, _, period = _text(group / name).partition(" ")
        else:
            quota, period = _text(group / name), _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _groups(controller: str, v1: str, v2: str, proc: Path, root: Path) -> Iterator[tuple[Path, str]]:
    """Each directory from this process's group up to the root, with the file's name there."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base, name = root, v2
        elif controller in controllers.split(","):
            base, name = _mount(root, controllers, controller), v1
        else:
            continue
        here = base / path.lstrip("/")
        while True:
            yield here, name
            if here == base or base not in here.parents:
                break
            here = here.parent


def _mount(root: Path, controllers: str, controller: str) -> Path:
    """v1 hierarchies are mounted under all of their controllers' names (``cpu,cpuacct``), or under one."""
    together = root / controllers
    return together if together.is_dir() else root / controller


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _integer(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None
