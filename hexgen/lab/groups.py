"""Control groups: how much of the processor and of the memory a node's processes get. Both versions of them.

With version 1 each controller has a tree of its own (``cpu.cfs_quota_us``, ``memory.limit_in_bytes``), with
version 2 there is one (``cpu.max``, ``memory.max``). A lab has one group, and in it one for each node and one,
without limits, for the command.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hexgen.errors import DeploymentError
from hexgen.lab.names import LabName, number_of

COMMAND = "command"  # no clash with a node of this name: those begin with "node."
# A stalled node sleeps until its next period begins: the shorter the period, the smoother the speed. The kernel
# takes no quota below 1 ms; its tick (1 to 10 ms) bounds how exactly one period is kept, debts are carried over.
PERIOD_US = 10_000
_LEAST_QUOTA_US = 1_000
_LONGEST_PERIOD_US = 1_000_000
LEAST_CORES = _LEAST_QUOTA_US / _LONGEST_PERIOD_US


def quota(cores: float) -> tuple[int, int]:
    """(quota, period) in microseconds for that many cores' time; ``ValueError`` below a thousandth."""
    if not LEAST_CORES <= cores < 1e6:
        raise ValueError(f"{cores:g} cores are less than {LEAST_CORES:g}, the least that a control group can give")
    period_us = PERIOD_US
    if cores * period_us < _LEAST_QUOTA_US:
        period_us = min(_LONGEST_PERIOD_US, math.ceil(_LEAST_QUOTA_US / cores))
    return max(_LEAST_QUOTA_US, round(cores * period_us)), period_us


@dataclass(frozen=True, slots=True)
class Groups:
    """Where control groups are made. ``cpu`` and ``memory`` are the same folder with version 2; ``memory`` is None
    where this machine has no such controller.
    """

    version: int
    cpu: Path
    memory: Path | None
    mounts: tuple[Path, ...]  # where labs are looked for: an earlier one may have begun in another group than we

    def create(self, lab: LabName, members: Sequence[str]) -> None:
        for root in self._roots():
            with _explained(root):
                (root / lab.group).mkdir()
                if self.version == 2:
                    self._delegate(root)
                    self._delegate(root / lab.group)
                for member in members:
                    (root / lab.group / member).mkdir()

    def set_cores(self, lab: LabName, member: str, cores: float | None) -> None:
        """``cores`` None: as many as there are."""
        quota_us, period_us = quota(cores) if cores is not None else (-1, PERIOD_US)
        folder = self.cpu / lab.group / member
        with _explained(folder):
            if self.version == 2:
                (folder / "cpu.max").write_text(f"{quota_us if cores is not None else 'max'} {period_us}")
            else:
                if cores is not None:  # the period first: a quota is checked against it
                    (folder / "cpu.cfs_period_us").write_text(str(period_us))
                (folder / "cpu.cfs_quota_us").write_text(str(quota_us))

    def set_weights(self, lab: LabName, threads: Mapping[str, int]) -> None:
        """Against everything else on the machine, a lab counts as its threads would without groups: by itself a
        group, whatever runs in it, weighs as much as a single thread.
        """
        base, most, name = (100, 10_000, "cpu.weight") if self.version == 2 else (1024, 262_144, "cpu.shares")
        whole = {"": sum(threads.values()), **threads}
        for member, count in whole.items():
            folder = self.cpu / lab.group / member
            with _explained(folder):
                (folder / name).write_text(str(min(most, base * count)))

    def set_memory(self, lab: LabName, member: str, limit_bytes: int) -> None:
        if self.memory is None:
            return
        folder = self.memory / lab.group / member
        name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
        with _explained(folder):
            (folder / name).write_text(str(limit_bytes))

    def doors(self, lab: LabName, member: str) -> tuple[Path, ...]:
        """The files that a process writes its id into, to become a member."""
        return tuple(root / lab.group / member / "cgroup.procs" for root in self._roots())

    def used_memory_bytes(self, lab: LabName, member: str) -> int:
        if self.memory is None:
            return 0
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        return int((self.memory / lab.group / member / name).read_text())

    def processes(self, number: int) -> set[int]:
        """Everything that runs in the groups of this lab."""
        found: set[int] = set()
        for folder in self._of(number):
            for file in folder.rglob("cgroup.procs"):
                with suppress(OSError):  # a group that has just been removed
                    found.update(int(pid) for pid in file.read_text().split())
        return found

    def remove(self, number: int) -> int:
        """Remove this lab's groups, which must be empty; how many there were."""
        removed = 0
        for folder in self._of(number):
            for path in [path for path, _, _ in os.walk(folder, topdown=False)]:
                with _explained(folder), suppress(FileNotFoundError):
                    os.rmdir(path)
                    removed += 1
        return removed

    def labs(self) -> set[int]:
        """The numbers of the labs that have groups."""
        return {number for folder in self._lab_folders() if (number := number_of(folder.name)) is not None}

    def _of(self, number: int) -> list[Path]:
        return [folder for folder in self._lab_folders() if number_of(folder.name) == number]

    def _lab_folders(self) -> Iterator[Path]:
        for mount in self.mounts:
            for path, names, _ in os.walk(mount):
                for name in [name for name in names if number_of(name) is not None]:
                    yield Path(path, name)
                    names.remove(name)

    def _roots(self) -> tuple[Path, ...]:
        if self.memory is None or self.memory == self.cpu:
            return (self.cpu,)
        return (self.cpu, self.memory)

    def _delegate(self, folder: Path) -> None:
        """Version 2: let the groups below have their own shares of processor and memory."""
        (folder / "cgroup.subtree_control").write_text("+cpu" if self.memory is None else "+cpu +memory")


def find_groups(proc: Path = Path("/proc/self")) -> Groups:
    """Of this machine; ``DeploymentError`` where it has none that can shape the processor's time."""
    mounts: dict[str, Path] = {}
    unified: Path | None = None
    for line in (proc / "mounts").read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup":
            for option in options.split(","):
                mounts.setdefault(option, Path(folder))
        elif kind == "cgroup2" and unified is None:
            unified = Path(folder)
    if "cpu" in mounts:
        own = _own_groups((proc / "cgroup").read_text())
        memory = mounts.get("memory")
        return Groups(
            1,
            _below(mounts["cpu"], own.get("cpu", "/")),
            memory and _below(memory, own.get("memory", "/")),
            tuple({mounts["cpu"], memory or mounts["cpu"]}),
        )
    if unified is not None:
        with suppress(OSError):
            controllers = (unified / "cgroup.controllers").read_text().split()
            if "cpu" in controllers:
                return Groups(2, unified, unified if "memory" in controllers else None, (unified,))
    raise DeploymentError(
        "there is no control group for the processor's time",
        where=str(proc / "mounts"),
        remedy="mount cgroup2 at /sys/fs/cgroup, with the cpu controller",
    )


def _own_groups(text: str) -> dict[str, str]:
    """Version 1: the group that this process is in, by controller."""
    found = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _below(mount: Path, path: str) -> Path:
    """Our own group where it can be seen (in a container it may not), so that limits on us hold for the lab
    too.
    """
    own = mount / path.lstrip("/")
    return own if own.is_dir() else mount


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """``OSError`` of a control group's files as one clear line."""
    try:
        yield
    except OSError as error:
        raise DeploymentError(
            f"cannot be set: {error.strerror}",
            where=f"control group {error.filename or folder}",
            remedy="in a container, a lab needs its control groups writable (--privileged, or a cgroup namespace)",
        ) from error
