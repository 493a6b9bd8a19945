"""Frames on a direct socket: a fixed preamble, a header, and a small tensor where there is one.

    preamble: magic, version, kind, dtype, place of the tensor | header bytes | rows | columns
    header:   worker/wire.py
    tensor:   [rows, columns] right behind the header (INLINE), or on the edge's or stage's communicator (APART)

A decode step is one message of a few kilobytes and costs one system call on either side.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

import torch

from hexgen.errors import EngineError
from hexgen.worker.communicator import tensor_bytes
from hexgen.worker.links import send_all

MAGIC = 0x47584548  # "HEXG"
VERSION = 1
MAX_HEADER_BYTES = 64 << 20
INLINE_BYTES = 256 * 1024  # tensors up to this size travel with their header
_PREAMBLE = struct.Struct("<IBBBBIII")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FrameKind(IntEnum):
    STEP = 1
    TOKENS = 2
    STOP = 3  # the sender ends in good order; nothing follows


class Place(IntEnum):
    NONE = 0
    INLINE = 1
    APART = 2


@dataclass(frozen=True, slots=True)
class Frame:
    """``tensor`` is set where it came inline; where it comes apart, ``shape`` and ``dtype`` say what to expect."""

    kind: FrameKind
    header: bytes
    place: Place = Place.NONE
    shape: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    tensor: torch.Tensor | None = None


def write_frame(
    connection: socket.socket,
    kind: FrameKind,
    header: bytes = b"",
    tensor: torch.Tensor | None = None,
    place: Place = Place.NONE,
) -> None:
    """Send one frame. ``tensor`` [rows, columns] is sent too where ``place`` is INLINE (then it must be on the
    CPU).

    Raises ``OSError`` where the peer is gone.
    """
    rows, columns, code = 0, 0, 0
    if tensor is not None:
        rows, columns = tensor.shape
        code = _DTYPES.index(tensor.dtype)
    preamble = _PREAMBLE.pack(MAGIC, VERSION, kind, code, place, len(header), rows, columns)
    if tensor is not None and place is Place.INLINE:
        send_all(connection, (preamble, header, tensor_bytes(tensor)))
    else:
        send_all(connection, (preamble, header))


class FrameReader:
    """Reads frames off one connection; small ones with one system call each.

    ``columns`` is the hidden size and ``dtype`` the type that tensors must have, ``max_rows`` the most tokens
    that a step may have: nothing larger is allocated, whatever the preamble says.
    """

    def __init__(
        self, connection: socket.socket, where: str, *, columns: int, max_rows: int, dtype: torch.dtype
    ) -> None:
        self._connection = connection
        self._where = where
        self._columns = columns
        self._max_rows = max_rows
        self._dtype = dtype
        self._box = bytearray(64 * 1024)
        self._view = memoryview(self._box)
        self._start = 0
        self._end = 0

    def read(self) -> Frame:
        """The next frame; blocks. ``EngineError`` where the peer is gone or sends nonsense."""
        fields = _PREAMBLE.unpack(self._take(_PREAMBLE.size))
        magic, version, kind, code, place, header_bytes, rows, columns = fields
        if magic != MAGIC or version != VERSION:
            raise self._wrong(f"magic {magic:#x}, version {version}")
        try:
            kind, place = FrameKind(kind), Place(place)
        except ValueError as error:
            raise self._wrong(str(error)) from error
        if header_bytes > MAX_HEADER_BYTES or code >= len(_DTYPES):
            raise self._wrong(f"a header of {header_bytes} bytes, dtype code {code}")
        dtype = _DTYPES[code]
        if place is not Place.NONE and not (
            columns == self._columns and 0 < rows <= self._max_rows and dtype == self._dtype
        ):
            raise self._wrong(
                f"a tensor of {rows} x {columns} {dtype}; "
                f"at most {self._max_rows} x {self._columns} {self._dtype} was agreed"
            )
        header = bytes(self._take(header_bytes))
        tensor = None
        if place is Place.INLINE:
            data = self._take(rows * columns * dtype.itemsize)
            tensor = torch.frombuffer(data, dtype=dtype).view(rows, columns)
        return Frame(kind, header, place, (rows, columns), dtype, tensor)

    def _take(self, count: int) -> bytearray:
        """The next ``count`` bytes, in a buffer of their own."""
        have = self._end - self._start
        if have < count <= len(self._box):
            if self._start + count > len(self._box):
                self._view[:have] = self._view[self._start : self._end]
                self._start, self._end = 0, have
            while self._end - self._start < count:
                self._end += self._recv(self._view[self._end :])
            have = self._end - self._start
        if have >= count:
            data = self._box[self._start : self._start + count]
            self._start += count
            if self._start == self._end:
                self._start = self._end = 0
            return data
        data = bytearray(count)  # longer than the buffer: straight into its own
        data[:have] = self._view[self._start : self._end]
        self._start = self._end = 0
        view = memoryview(data)
        while have < count:
            have += self._recv(view[have:])
        return data

    def _recv(self, view: memoryview) -> int:
        try:
            count = self._connection.recv_into(view)
        except OSError as error:
            raise EngineError(f"the connection broke: {error.strerror or error}", where=self._where) from error
        if not count:
            raise EngineError("the peer has closed the connection", where=self._where)
        return count

    def _wrong(self, why: str) -> EngineError:
        return EngineError(f"not a frame of ours: {why}", where=self._where)
