"""The other end of the coordinator's connection, without a model: for what a real engine cannot be asked to do.

It breaks, stalls, refuses and floods on command. Everything that the real engine can show runs on the real engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from hexgen.protocol import Abort, Hello, Refused, Stats, Submit, Tokens, Welcome, encode, read_frame
from hexgen.request import TokenEvent, TokenLogprobs

Script = Callable[[Submit], list[int]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    route: int
    weight: float
    host: str
    port: int


def count_up(submit: Submit) -> list[int]:
    """max_tokens tokens that count up from the prompt's last one."""
    first = submit.prompt[-1] + 1
    return [(first + i) % 200 for i in range(submit.sampling.max_tokens)]


@dataclass
class Live:
    submit: Submit
    tokens: list[int]
    done: int = 0


@dataclass
class ScriptedHead:
    """A route's head that plays ``script`` at one token a sequence and ``step_s``."""

    route: int = 0
    weight: float = 1.0
    secret: str = "5ec2e7"
    script: Script = count_up
    step_s: float = 0.0
    pages: int = 1000
    max_sequences: int = 64
    max_context: int = 1024
    page_size: int = 16
    paused: bool = False
    refuse: str | None = None
    submits: list[Submit] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    live: dict[int, Live] = field(default_factory=dict)
    most_live: int = 0

    async def __aenter__(self) -> ScriptedHead:
        self._writers: list[asyncio.StreamWriter] = []
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.break_connection()
        await self._server.wait_closed()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.route, self.weight, "127.0.0.1", self.port)

    def break_connection(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self.live.clear()

    def stats(self) -> Stats:
        used = sum(-(-(len(s.submit.prompt) + s.done) // self.page_size) for s in self.live.values())
        return Stats(
            route=self.route, free_pages=self.pages - used, total_pages=self.pages, running=len(self.live),
            waiting=0, in_flight=0, steps=1, preemptions=0, cached_tokens=0, prompt_tokens=0, output_tokens=0,
            step_s=0.01, host_s=0.001,
        )  # fmt: skip

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await read_frame(reader)
        if not isinstance(hello, Hello) or hello.secret != self.secret:
            writer.close()
            return
        self._writers.append(writer)
        writer.write(encode(Welcome(self.route, self.max_context, self.pages, self.page_size, self.max_sequences)))
        ticker = asyncio.create_task(self._tick(writer))
        try:
            while (frame := await read_frame(reader)) is not None:
                if isinstance(frame, Submit):
                    self.submits.append(frame)
                    if self.refuse is not None:
                        writer.write(encode(Refused(frame.sequence, self.refuse)))
                        continue
                    self.live[frame.sequence] = Live(frame, self.script(frame))
                    self.most_live = max(self.most_live, len(self.live))
                elif isinstance(frame, Abort):
                    self.aborted.extend(frame.sequences)
                    for sequence in frame.sequences:
                        self.live.pop(sequence, None)
                    writer.write(encode(self.stats()))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            ticker.cancel()
            writer.close()

    async def _tick(self, writer: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if self.paused or not self.live:
                await asyncio.sleep(0.001)
                continue
            events = []
            for number, live in list(self.live.items()):
                token = live.tokens[live.done]
                live.done += 1
                reason = None
                if token in live.submit.stop_token_ids:
                    reason = "stop"
                elif live.done == len(live.tokens):
                    reason = "length"
                logprobs = None
                if live.submit.sampling.logprobs is not None:
                    logprobs = TokenLogprobs(-0.5, ((token, -0.5), (token + 1, -1.5)))
                events.append(TokenEvent(number, token, logprobs, reason))
                if reason is not None:
                    del self.live[number]
            writer.write(encode(Tokens(tuple(events))))
            writer.write(encode(self.stats()))
            await writer.drain()
