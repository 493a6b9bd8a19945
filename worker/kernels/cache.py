"""Compiled kernels on disk, so that a second start compiles nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from hexgen.compiled import user_cache
from hexgen.worker.kernels.nvrtc import Compiled, Nvrtc, compile_options
from hexgen.worker.kernels.source import KernelSpec, Source, read_source

MOST_BYTES = 256 * 1024 * 1024
_FORMAT = 1  # raise when the layout of an entry changes
_DIGEST = hashlib.sha256().digest_size


def default_directory() -> Path:
    """``$HEXGEN_KERNEL_CACHE``, or ``hexgen/kernels`` below the user's cache."""
    named = os.environ.get("HEXGEN_KERNEL_CACHE")
    if named:
        return Path(named)
    return user_cache() / "kernels"


class KernelCache:
    """Entries by what they were made from. Safe among processes: written aside and renamed, checked when read.

    A directory that cannot be written to is no error: kernels are then compiled every time.
    """

    def __init__(self, directory: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        self.directory = directory or default_directory()
        self.most_bytes = most_bytes

    def get(self, nvrtc: Nvrtc, spec: KernelSpec, arch: int) -> Compiled:
        """From disk, or compiled now (and kept). ``EngineError`` where it does not compile."""
        source = read_source(spec.file)
        path = self.directory / f"{key(spec, source, arch, nvrtc.version)}.cubin"
        known = self._read(path)
        if known is not None:
            return known
        compiled = nvrtc.compile(spec, source, arch)
        with contextlib.suppress(OSError):
            self._write(path, compiled)
        return compiled

    def _read(self, path: Path) -> Compiled | None:
        try:
            data = path.read_bytes()
            os.utime(path)  # what was used last is evicted last
        except OSError:
            return None
        body = data[_DIGEST:]
        if hashlib.sha256(body).digest() != data[:_DIGEST]:  # a broken disk, or somebody's editor
            path.unlink(missing_ok=True)
            return None
        size = int.from_bytes(body[:8], "little")
        return Compiled(body[8 : 8 + size], body[8 + size :].decode())

    def _write(self, path: Path, compiled: Compiled) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        body = len(compiled.cubin).to_bytes(8, "little") + compiled.cubin + compiled.log.encode()
        with tempfile.NamedTemporaryFile(dir=self.directory, suffix=".part", delete=False) as file:
            try:
                file.write(hashlib.sha256(body).digest() + body)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        self._evict(path)

    def _evict(self, newest: Path) -> None:
        """Remove the entries unused for longest until the rest fit. Another process may remove them meanwhile."""
        entries = []
        for entry in self.directory.glob("*.cubin"):
            with contextlib.suppress(OSError):
                status = entry.stat()
                entries.append((status.st_mtime, status.st_size, entry))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self.most_bytes:
                return
            if entry != newest:
                entry.unlink(missing_ok=True)
                total -= size


def key(spec: KernelSpec, source: Source, arch: int, version: tuple[int, int]) -> str:
    """What an entry is filed under: everything that its machine code depends on."""
    parts = [_FORMAT, spec.file, spec.kernel, compile_options(spec, arch), version, source.text, source.headers]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
