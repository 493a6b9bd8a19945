"""What the control group of this process allows: memory, and CPUs by quota. cgroup v1 and v2, nested groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")
# cgroup v1 has no word for "no limit" of memory: a number near 2^63 stands for it.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """Of the control group that leaves the least: its limit, and what its processes could still take."""

    limit_bytes: int
    room_bytes: int


def memory_room(proc: Path = PROC, root: Path = ROOT) -> MemoryRoom | None:
    """Among this process's group and those around it; None where nothing limits them."""
    found = []
    for group, name in _groups("memory", "memory.limit_in_bytes", "memory.max", proc, root):
        limit = _text(group / name)
        if limit.isdigit() and int(limit) < _NO_LIMIT:
            used = _text(group / ("memory.current" if name == "memory.max" else "memory.usage_in_bytes"))
            held = (int(used) if used.isdigit() else 0) - _reclaimable(group)
            found.append(MemoryRoom(int(limit), max(0, int(limit) - max(0, held))))
    return min(found, key=lambda room: room.room_bytes, default=None)


def _reclaimable(group: Path) -> int:
    """Cached files that nobody has used of late: counted as used, and given up before anybody is refused."""
    for line in _text(group / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


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


def hidden(controller: str, proc: Path = PROC, root: Path = ROOT) -> bool:
    """This process is in a group of ``controller`` ("cpu", "memory") whose files cannot be seen from here.

    So it is where another mount namespace has its own /sys without the control groups (`ip netns exec`).
    """
    v1, v2 = ("cpu.cfs_quota_us", "cpu.max") if controller == "cpu" else ("memory.limit_in_bytes", "memory.max")
    if all(path == "/" for _, path in _lines(controller, proc)):
        return False
    return not any((group / name).exists() for group, name in _groups(controller, v1, v2, proc, root))


def _lines(controller: str, proc: Path) -> list[tuple[str | None, str]]:
    """(controllers of a v1 hierarchy with ``controller``, or None for v2; this process's group there)."""
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return []
    return [
        (controllers or None, path)
        for number, controllers, path in lines
        if (number == "0" and not controllers) or controller in controllers.split(",")
    ]


def _groups(controller: str, v1: str, v2: str, proc: Path, root: Path) -> Iterator[tuple[Path, str]]:
    """Each directory from this process's group up to the root, with the file's name there."""
    for controllers, path in _lines(controller, proc):
        base, name = (root, v2) if controllers is None else (_mount(root, controllers, controller), v1)
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
