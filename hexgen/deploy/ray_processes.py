"""Processes of this machine, as far as ending what we started needs it (Linux's /proc, no dependency)."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.02
KILLED_WITHIN_S = 5.0  # the kernel takes a killed process down, memory and all


@dataclass(frozen=True, slots=True)
class Process:
    """A process id with its start time, so that a later process with the same id is not taken for it."""

    pid: int
    started: str


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def identify(pid: int) -> Process | None:
    """The running process with this id; None where there is none (or only its exit status, a zombie)."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else Process(pid, fields[19])


def descendants(pid: int) -> list[Process]:
    """All processes below ``pid``, itself included."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields is not None:
            children[int(fields[1])].append(int(entry.name))
    found, pending = [], [pid]
    while pending:
        current = pending.pop()
        pending += children[current]
        process = identify(current)
        if process is not None:
            found.append(process)
    return found


def children_about(text: str) -> list[int]:
    """This process's own children whose command line holds ``text``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields is None or int(fields[1]) != os.getpid():
            continue
        try:
            if text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


def end_processes(processes: list[Process], grace_s: float) -> list[Process]:
    """Wait until all have ended; after ``grace_s`` those still there are killed. Returns the killed ones."""
    left = _still_running(processes, grace_s)
    for process in left:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    _still_running(left, KILLED_WITHIN_S)
    return left


def _still_running(processes: list[Process], wait_s: float) -> list[Process]:
    deadline = time.monotonic() + wait_s
    left = processes
    while True:
        left = [process for process in left if identify(process.pid) == process]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(POLL_S)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name: state, parent, ...; the start time is number 19."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()
