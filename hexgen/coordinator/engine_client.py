"""The coordinator's connection to the head of one route: frames out, frames in, and what a break means."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Protocol

from hexgen.errors import EngineError, HexgenError
from hexgen.protocol import Frame, Hello, Welcome, encode, read_frame

log = logging.getLogger("hexgen.coordinator")

_HANDSHAKE_TIMEOUT_S = 20.0
_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 15.0
# A head that does not read: beyond this much unsent, the connection counts as broken.
_MAX_UNSENT_BYTES = 256 * 1024 * 1024


class Endpoint(Protocol):
    """Where a route's head listens, and the plan's weight of the route."""

    @property
    def route(self) -> int: ...
    @property
    def weight(self) -> float: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


class RouteListener(Protocol):
    """Who wants to know. All calls come on the event loop."""

    def route_up(self, welcome: Welcome) -> None: ...
    def route_down(self, route: int, reason: str) -> None: ...
    def route_frame(self, route: int, frame: Frame) -> None: ...


class RouteConnection:
    """Keeps one connection to a head; connects again, ever more patiently, after it broke."""

    def __init__(self, endpoint: Endpoint, secret: str, listener: RouteListener) -> None:
        self.route = endpoint.route
        self.where = f"route {endpoint.route} at {endpoint.host}:{endpoint.port}"
        self._endpoint = endpoint
        self._secret = secret
        self._listener = listener
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect and shake hands once (``EngineError`` where that fails), then keep the connection."""
        reader = await self._connect()
        self._task = asyncio.create_task(self._run(reader), name=self.where)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The task only ends when cancelled; anything else is a fault of ours, and the route must not look up."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: the connection's task failed", self.where, exc_info=error)
            self._listener.route_down(self.route, f"internal error: {error}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self._hang_up()

    def send(self, frame: Frame) -> None:
        """Write ``frame`` without waiting; dropped where the connection is down (``route_down`` says so)."""
        if self._writer is None:
            return
        self._writer.write(encode(frame))
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            log.error("%s does not read what it is sent; hanging up", self.where)
            self._writer.transport.abort()

    async def _connect(self) -> asyncio.StreamReader:
        try:
            async with asyncio.timeout(_HANDSHAKE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(self._endpoint.host, self._endpoint.port)
                self._writer = writer
                writer.write(encode(Hello(self._secret)))
                frame = await read_frame(reader)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            await self._hang_up()
            raise EngineError(f"cannot be reached: {error or 'no answer'}", where=self.where) from error
        except HexgenError:
            await self._hang_up()
            raise
        if not isinstance(frame, Welcome) or frame.route != self.route:
            await self._hang_up()
            raise EngineError("is not the head of this route", where=self.where)
        self._listener.route_up(frame)
        return reader

    async def _run(self, reader: asyncio.StreamReader | None) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            if reader is not None:
                reason = await self._read(reader)
                await self._hang_up()
                log.warning("%s is down: %s", self.where, reason)
                self._listener.route_down(self.route, reason)
                retry_s = _FIRST_RETRY_S
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)
            try:
                reader = await self._connect()
                log.warning("%s is up again", self.where)
            except EngineError as error:
                reader = None
                log.info("%s", error)

    async def _read(self, reader: asyncio.StreamReader) -> str:
        """Pass frames on until the connection ends; the reason why it did."""
        try:
            while (frame := await read_frame(reader)) is not None:
                self._listener.route_frame(self.route, frame)
        except (OSError, asyncio.IncompleteReadError, HexgenError) as error:
            return f"the connection broke ({error})"
        return "the head closed the connection"

    async def _hang_up(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
