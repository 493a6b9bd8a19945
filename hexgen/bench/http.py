"""As much of HTTP/1.1 as a load generator needs: bounded, and light, because it shares the server's cores.

A client library of the usual kind spends more CPU on each streamed token than the server does (docs/bench.md). No
redirects, no proxies, no compression: what is measured is the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from hexgen.errors import SpecError, UnavailableError

CONNECT_S = 10.0
MAX_LINE_BYTES = 1 << 20  # a header, or one event of a stream
MAX_HEADERS = 100
MAX_BODY_BYTES = 64 << 20  # of an answer that is read whole
_READ_BYTES = 1 << 16


class BrokenStreamError(Exception):
    """The server has closed the connection before the end of its answer, or does not speak HTTP."""


class ClosedError(BrokenStreamError):
    """The connection ended before the first byte of an answer: so ends one that was idle for too long."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL points; ``path`` has no slash at its end."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def target_of(url: str, cafile: str | None = None) -> Target:
    """``http://HOST[:PORT][/PATH]`` or ``https://...``; a path of ``/v1`` may be there or not."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        port = parts.port
    except ValueError as error:
        raise SpecError(f"{url[:200]!r} is no address: {error}", where="--url") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or not full.isprintable():
        raise SpecError(
            f"{url[:200]!r} is no address of a server", where="--url", remedy="give one like http://127.0.0.1:8000"
        )
    context = None
    if parts.scheme == "https":
        try:
            context = ssl.create_default_context(cafile=cafile)
        except OSError as error:
            raise SpecError(f"{cafile} cannot be read as certificates: {error}", where="--tls-ca") from error
    path = parts.path.rstrip("/").removesuffix("/v1")
    if " " in path:
        raise SpecError(f"{url[:200]!r} has a blank in it", where="--url")
    return Target(parts.hostname, port or (443 if context else 80), context, path)


class Connection:
    """One connection; one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.reusable = False  # the last answer was read to its end, and the server keeps the connection

    @classmethod
    async def open(cls, target: Target) -> Connection:
        """``UnavailableError`` where nobody listens."""
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(
                    target.host, target.port, ssl=target.tls, limit=MAX_LINE_BYTES
                )
        except TimeoutError as error:
            raise UnavailableError(f"no connection within {CONNECT_S:.0f} s", where=target.authority) from error
        except ssl.SSLError as error:
            raise UnavailableError(f"TLS: {error.reason or error}", where=target.authority) from error
        except OSError as error:
            text = error.strerror or str(error)
            raise UnavailableError(
                "connection refused" if "Connect call failed" in text else text, where=target.authority
            ) from error
        return cls(reader, writer)

    async def send(
        self, target: Target, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
    ) -> tuple[int, AsyncIterator[bytes]]:
        """The status, and the body in pieces as they come. ``BrokenStreamError`` where the server hangs up."""
        lines = [
            f"{method} {target.path}{path} HTTP/1.1",
            f"host: {target.authority}",
            "accept-encoding: identity",
        ]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body:
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        self.reusable = False
        try:
            self._writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            await self._writer.drain()
            if not (first := await self._reader.read(1)):
                raise ClosedError("the server closed the connection")
        except OSError as error:
            raise ClosedError(f"the connection broke: {error.strerror or error}") from error
        try:
            status, fields = await self._head(first)
            while status in (100, 102, 103):
                status, fields = await self._head()
        except OSError as error:
            raise BrokenStreamError(f"the connection broke: {error.strerror or error}") from error
        return status, self._body(status, fields)

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # broken already, or its loop has ended
            self._writer.close()

    # ---- parsing -----------------------------------------------------------------------------------------

    async def _line(self) -> bytes:
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            raise BrokenStreamError("the server closed the connection") from error
        except asyncio.LimitOverrunError as error:
            raise BrokenStreamError("a line without an end") from error
        return line.rstrip(b"\r\n")

    async def _head(self, begun: bytes = b"") -> tuple[int, dict[str, str]]:
        line = begun + await self._line()
        parts = line.split(None, 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit() or len(parts[1]) != 3:
            raise BrokenStreamError("this is no HTTP server")
        fields: dict[str, str] = {}
        for _ in range(MAX_HEADERS):
            line = await self._line()
            if not line:
                if parts[0] == b"HTTP/1.0":
                    fields.setdefault("connection", "close")
                return int(parts[1]), fields
            name, _, value = line.partition(b":")
            fields[name.decode("latin-1").strip().lower()] = value.decode("latin-1").strip()
        raise BrokenStreamError("too many headers")

    async def _body(self, status: int, fields: Mapping[str, str]) -> AsyncIterator[bytes]:
        keeps = fields.get("connection", "").lower() != "close"
        try:
            if fields.get("transfer-encoding", "").lower().endswith("chunked"):
                async for piece in self._chunks():
                    yield piece
            elif status == 204 or "content-length" in fields:
                async for piece in self._counted(fields.get("content-length", "0")):
                    yield piece
            else:
                keeps = False
                while piece := await self._reader.read(_READ_BYTES):
                    yield piece
        except OSError as error:
            raise BrokenStreamError(f"the connection broke: {error.strerror or error}") from error
        self.reusable = keeps

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            size_text = (await self._line()).partition(b";")[0].strip()
            try:
                size = int(size_text, 16)
            except ValueError as error:
                raise BrokenStreamError("a chunk without a size") from error
            if not 0 <= size <= MAX_BODY_BYTES:
                raise BrokenStreamError("a chunk of an impossible size")
            if size == 0:
                while await self._line():  # trailers
                    pass
                return
            try:
                piece = await self._reader.readexactly(size + 2)
            except asyncio.IncompleteReadError as error:
                raise BrokenStreamError("the server closed the connection") from error
            yield piece[:-2]

    async def _counted(self, text: str) -> AsyncIterator[bytes]:
        left = int(text) if text.isdigit() and len(text) < 18 else -1
        if left < 0:
            raise BrokenStreamError("an answer without a length")
        while left:
            piece = await self._reader.read(min(left, _READ_BYTES))
            if not piece:
                raise BrokenStreamError("the server closed the connection")
            left -= len(piece)
            yield piece


class Pool:
    """Connections that wait for their next request."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._idle: list[Connection] = []

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
    ) -> tuple[Connection, int, AsyncIterator[bytes]]:
        """On an idle connection, or a new one; give it back with ``done``."""
        while self._idle:
            connection = self._idle.pop()
            try:
                return connection, *await connection.send(self.target, method, path, headers, body)
            except ClosedError:  # while it was idle
                connection.close()
            except BaseException:
                connection.close()
                raise
        connection = await Connection.open(self.target)
        try:
            return connection, *await connection.send(self.target, method, path, headers, body)
        except BaseException:
            connection.close()
            raise

    def done(self, connection: Connection) -> None:
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


async def whole(pieces: AsyncIterator[bytes], most: int = MAX_BODY_BYTES) -> bytes:
    """A body in one piece; ``BrokenStreamError`` beyond ``most`` bytes."""
    found: list[bytes] = []
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > most:
            raise BrokenStreamError(f"an answer of more than {most} bytes")
        found.append(piece)
    return b"".join(found)


async def event_lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The ``data:`` lines of a stream of server-sent events, as soon as each is there."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise BrokenStreamError("an event without an end")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
