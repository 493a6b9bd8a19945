"""Removing a lab by its number alone: processes, namespaces, control groups, files; whoever died, and how."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

from hexgen.errors import DeploymentError
from hexgen.lab import namespaces
from hexgen.lab.claims import Claim, claim, known
from hexgen.lab.groups import Groups
from hexgen.lab.names import MAX_LABS, LabName, number_of

_KILL_WITHIN_S = 10.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Removed:
    """What a clean-up found and removed."""

    processes: int
    namespaces: int
    groups: int
    folders: int

    def __bool__(self) -> bool:
        return bool(self.processes or self.namespaces or self.groups or self.folders)

    def __str__(self) -> str:
        counts = (
            (self.processes, "process", "processes"),
            (self.namespaces, "network namespace", "network namespaces"),
            (self.groups, "control group", "control groups"),
            (self.folders, "folder", "folders"),
        )
        found = [f"{count} {one if count == 1 else many}" for count, one, many in counts if count]
        return ", ".join(found) or "nothing"


def clean(lab: LabName, groups: Groups) -> Removed:
    """Remove all of the lab; the caller holds its claim. ``DeploymentError`` where something cannot be removed."""
    mine = [name for name in namespaces.existing() if number_of(name) == lab.number]
    killed = _kill_all(lab, groups, mine)
    for name in mine:
        namespaces.delete(name)
    removed = groups.remove(lab.number)
    folder = lab.folder.is_dir()
    shutil.rmtree(lab.folder, ignore_errors=True)
    return Removed(killed, len(mine), removed, int(folder))


def leftovers(groups: Groups) -> list[int]:
    """The numbers of all labs of which something is there, alive or dead."""
    found = groups.labs() | known()
    found |= {number for name in namespaces.existing() if (number := number_of(name)) is not None}
    return sorted(found)


def clean_dead(groups: Groups) -> list[tuple[LabName, Removed]]:
    """Clean up after every lab that has nobody any more; what was found of each."""
    done = []
    for number in leftovers(groups):
        found = claim(number)
        if found is None:
            continue  # it lives
        try:
            removed = clean(found.lab, groups)
        finally:
            found.release()
        if removed:
            done.append((found.lab, removed))
    return done


def claim_free(groups: Groups) -> Claim:
    """The first number that nobody has; clean up after the dead before."""
    for number in range(MAX_LABS):
        found = claim(number)
        if found is not None:
            return found
    raise DeploymentError(f"there are {MAX_LABS} labs already", remedy="end some")


def start_watchdog(lab: LabName) -> tuple[subprocess.Popen[bytes], int]:
    """A process that cleans up if this one is killed before it can. It waits for the end of a pipe, whose other
    end (the returned descriptor) is ours alone: it closes with us, even by ``kill -9``.
    """
    read, write = os.pipe()
    try:
        watchdog = subprocess.Popen(
            [sys.executable, "-m", "hexgen.lab.watchdog", str(lab.number)],
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to our whole group must not reach it
        )
    finally:
        os.close(read)
    return watchdog, write


def _kill_all(lab: LabName, groups: Groups, mine: list[str]) -> int:
    """Kill until nobody is left: a process may be forking while it is looked at."""
    seen: set[int] = set()
    deadline = time.monotonic() + _KILL_WITHIN_S
    while True:
        alive = groups.processes(lab.number)
        for name in mine:
            with suppress(DeploymentError):  # its namespace is broken; it is deleted all the same
                alive |= namespaces.processes_in(name)
        alive -= {os.getpid(), 0}
        if not alive:
            return len(seen)
        if time.monotonic() > deadline:
            raise DeploymentError(
                f"{len(alive)} processes do not end, the first is {min(alive)}", where=lab.text, remedy="see `ps`"
            )
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        seen |= alive
        time.sleep(_POLL_S)
