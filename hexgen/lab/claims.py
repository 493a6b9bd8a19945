"""Which labs are alive: each holds a lock on a file for as long as its process lives, however it ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hexgen.lab.names import FOLDER, LabName


@dataclass(slots=True)
class Claim:
    """The right to make, or to clean up, the lab of this number."""

    lab: LabName
    _file: int
    _path: Path

    def release(self) -> None:
        """Give the number back; nothing of the lab may be left. May be called twice."""
        if self._file < 0:
            return
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._file)
        self._file = -1
        with suppress(OSError):  # others' claims are in it
            self._path.parent.rmdir()


def claim(number: int) -> Claim | None:
    """None where a living lab (or somebody who cleans up after it) has this number."""
    path = FOLDER / f"{number}.lock"
    while True:
        FOLDER.mkdir(mode=0o700, exist_ok=True)
        try:
            file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the folder has just been removed by the last one who left
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        try:
            same = os.fstat(file).st_ino == os.stat(path).st_ino
        except FileNotFoundError:
            same = False
        if same:
            return Claim(LabName(number), file, path)
        os.close(file)  # its owner removed it between our two calls


def known() -> set[int]:
    """Numbers that have a lock file, whether or not anybody holds it, or a folder."""
    if not FOLDER.is_dir():
        return set()
    return {int(path.stem) for path in FOLDER.iterdir() if path.stem.isdigit()}
