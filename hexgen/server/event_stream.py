"""Sending answers, and noticing when nobody reads them any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hexgen.coordinator.answer import Answer
from hexgen.coordinator.stream import RequestStream, RequestUpdate, merge
from hexgen.errors import HexgenError
from hexgen.request import RequestOutput
from hexgen.server.http_errors import error_object, error_response
from hexgen.server.openai_json import Chunks

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect what must leave at once
]


@contextlib.asynccontextmanager
async def aborting_on_disconnect(receive: Receive, streams: Sequence[RequestStream]) -> AsyncIterator[None]:
    """Abort ``streams`` as soon as the client is gone, and in any case on leaving."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for stream in streams:
            stream.abort()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        for stream in streams:
            stream.abort()


async def collect(streams: Sequence[RequestStream], prompts: Sequence[str | None]) -> list[RequestOutput]:
    """The whole answers, in the order of ``streams``."""
    answers = [Answer(stream, prompt) for stream, prompt in zip(streams, prompts, strict=True)]
    async for position, update in merge(streams):
        answers[position].add(update)
    return [answer.output() for answer in answers]


class EventStream(Response):
    """A streamed answer: every update leaves as it comes. Leaves early: the requests are aborted.

    The response begins with the first update, so that what fails before it has its own status.
    """

    def __init__(
        self, chunks: Chunks, streams: Sequence[RequestStream], n: int, echoes: Sequence[str | None]
    ) -> None:
        super().__init__()
        self._chunks = chunks
        self._streams = streams
        self._n = n
        self._echoes = echoes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aborting_on_disconnect(receive, self._streams):
            updates = merge(self._streams)
            try:
                first = await anext(updates)
            except HexgenError as error:
                await error_response(error)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            opening = self._chunks.opening(self._n * len(self._streams)) + self._echo()
            await _send(send, opening + self._events(*first))
            try:
                async for position, update in updates:
                    await _send(send, self._events(position, update))
                prompt_tokens = sum(len(s.prompt_token_ids) for s in self._streams)
                closing = self._chunks.closing(prompt_tokens, sum(s.output_tokens for s in self._streams))
            except HexgenError as error:
                closing = self._chunks.failure(error_object(error)[1])
            await send({"type": "http.response.body", "body": closing.encode(), "more_body": False})

    def _events(self, position: int, update: RequestUpdate) -> str:
        base = position * self._n
        return "".join([self._chunks.delta(delta, base + delta.index) for delta in update.deltas])

    def _echo(self) -> str:
        return "".join(
            self._chunks.echo(prompt, position * self._n + i, self._streams[position].prompt_token_ids)
            for position, prompt in enumerate(self._echoes)
            if prompt is not None
            for i in range(self._n)
        )


async def _send(send: Send, text: str) -> None:
    if text:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
