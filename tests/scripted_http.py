"""An HTTP server that says what a test tells it to: answers of every quality, for clients that must bear them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from served import Loop

Send = Callable[[bytes], Awaitable[None]]
Script = Callable[[int, dict[str, Any], Send], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str = " x", **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": None, **fields}])


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def whole_answer(number: int, fields: dict[str, Any], send: Send) -> None:
    """As many tokens as were asked for, then usage, then the end; the connection stays."""
    tokens = fields["max_tokens"]
    await asyncio.sleep(0.003)
    await send(HEAD)
    for i in range(tokens):
        await send(chunk(token(finish_reason="length" if i == tokens - 1 else None)))
    usage = {"prompt_tokens": len(fields["prompt"]), "completion_tokens": tokens}
    await send(chunk(event(choices=[], usage=usage)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


class ScriptedServer:
    """Runs ``script(number, fields, send)`` for the ``number``-th generation. Returning keeps the connection open;
    raising ``ConnectionError`` cuts it.
    """

    def __init__(self, script: Script, models: bytes | None = None) -> None:
        self.script = script
        self.models = models if models is not None else b'{"data": [{"id": "scripted", "max_model_len": 4096}]}'
        self.asked: list[dict[str, Any]] = []
        self.open = self.most_open = self.connections = 0
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__qualname__", "").endswith("ScriptedServer._serve"):
                task.cancel()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1

        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                length = next((int(v) for k, _, v in (li.partition(":") for li in head.splitlines())
                               if k.lower() == "content-length"), 0)  # fmt: skip
                body = await reader.readexactly(length)
                if method == "GET":
                    found = self.models if path == "/v1/models" else None
                    await send(answer("200 OK", found) if found is not None else answer("404 Not Found", b"no"))
                    continue
                fields = json.loads(body)
                self.asked.append(fields)
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                try:
                    await self.script(len(self.asked) - 1, fields, send)
                finally:
                    self.open -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@contextmanager
def scripted(script: Script = whole_answer, models: bytes | None = None) -> Iterator[ScriptedServer]:
    """The server in a thread of its own."""
    loop = Loop()
    server = ScriptedServer(script, models)
    try:
        loop.run(server.start())
        yield server
        loop.run(server.stop())
    finally:
        loop.close()
