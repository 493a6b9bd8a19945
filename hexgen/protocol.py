"""Frames between the coordinator and the head of a route (the leader of its first stage).

A frame is a 4-byte big-endian length and that many bytes of JSON: an object whose ``"type"`` names one of the
classes below. Both sides bound the length before they read. The coordinator connects, sends ``Hello`` with the
deployment's secret, and gets ``Welcome``; anything else before that closes the connection.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import struct
from dataclasses import dataclass
from typing import Any

from hexgen.errors import EngineError
from hexgen.request import SamplingParams, TokenEvent, TokenLogprobs

MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_HELLO_BYTES = 4096  # what a peer may send before it has shown the secret
_LENGTH = struct.Struct(">I")
_SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class Hello:
    secret: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the route can take."""

    route: int
    max_context: int  # tokens
    total_pages: int
    page_size: int  # tokens
    max_sequences: int


@dataclass(frozen=True, slots=True)
class Submit:
    """A sequence to generate. ``sampling.n`` is 1 and ``sampling.seed`` is set; stop strings stay behind."""

    sequence: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()  # the request's own and, unless ignored, the model's eos


@dataclass(frozen=True, slots=True)
class Abort:
    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one step sampled."""

    events: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A submitted sequence was not taken; the others are unharmed."""

    sequence: int
    message: str


@dataclass(frozen=True, slots=True)
class Stats:
    """The head's state, sent with changes (at most some ten times a second)."""

    route: int
    free_pages: int  # unreferenced pages, cached ones included
    total_pages: int
    running: int
    waiting: int
    in_flight: int
    steps: int
    preemptions: int
    cached_tokens: int  # prompt tokens served from the prefix cache, since the start
    prompt_tokens: int  # since the start
    output_tokens: int  # since the start
    step_s: float  # mean duration of recent steps, from forming to results
    host_s: float  # mean time of recent steps spent outside the model, on the head


Frame = Hello | Welcome | Submit | Abort | Tokens | Refused | Stats
_TYPES: dict[str, type[Any]] = {
    c.__name__.lower(): c for c in (Hello, Welcome, Submit, Abort, Tokens, Refused, Stats)
}


def encode(frame: Frame) -> bytes:
    body = json.dumps({"type": type(frame).__name__.lower(), **_plain(frame)}, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {len(body)} bytes is above {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Frame:
    """The frame in ``body`` (without its length); ``EngineError`` where it is none."""
    try:
        fields = json.loads(body)
        kind = _TYPES[fields.pop("type")]
        if kind is Tokens:
            return Tokens(tuple(_event(e) for e in fields["events"]))
        if kind is Submit:
            return Submit(
                sequence=int(fields["sequence"]),
                prompt=tuple(fields["prompt"]),
                sampling=sampling_from_plain(fields["sampling"]),
                stop_token_ids=tuple(fields["stop_token_ids"]),
            )
        if kind is Abort:
            return Abort(tuple(fields["sequences"]))
        frame: Frame = kind(**fields)
        return frame
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(f"not a frame of ours: {error}") from error


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame, or None where the other side has closed between frames."""
    try:
        head = await reader.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise EngineError("the connection broke inside a frame") from error
        return None
    return decode(await reader.readexactly(_bounded(head)))


def recv_frame(connection: socket.socket, max_bytes: int = MAX_FRAME_BYTES) -> Frame | None:
    """Blocking twin of ``read_frame``; ``EngineError`` on a frame above ``max_bytes``."""
    head = _recv_exactly(connection, _LENGTH.size)
    if head is None:
        return None
    body = _recv_exactly(connection, _bounded(head, max_bytes))
    if body is None:
        raise EngineError("the connection broke inside a frame")
    return decode(body)


def _bounded(head: bytes, max_bytes: int = MAX_FRAME_BYTES) -> int:
    (length,) = _LENGTH.unpack(head)
    if length > max_bytes:
        raise EngineError(f"a frame of {length} bytes is above {max_bytes}")
    return int(length)


def _recv_exactly(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        chunk = connection.recv(min(count - len(data), 1 << 20))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def _plain(frame: Frame) -> dict[str, Any]:
    if isinstance(frame, Tokens):  # the hot one: flat lists instead of objects
        return {
            "events": [
                [
                    e.request,
                    e.token,
                    e.finish_reason,
                    None if e.logprobs is None else [e.logprobs.chosen, e.logprobs.top],
                ]
                for e in frame.events
            ]
        }
    if isinstance(frame, Submit):
        return {
            "sequence": frame.sequence,
            "prompt": frame.prompt,
            "sampling": sampling_to_plain(frame.sampling),
            "stop_token_ids": frame.stop_token_ids,
        }
    return dataclasses.asdict(frame)


def _event(fields: list[Any]) -> TokenEvent:
    sequence, token, reason, logprobs = fields
    if logprobs is not None:
        logprobs = TokenLogprobs(logprobs[0], tuple((int(i), float(p)) for i, p in logprobs[1]))
    return TokenEvent(int(sequence), int(token), logprobs, reason)


def sampling_to_plain(sampling: SamplingParams) -> dict[str, Any]:
    """What JSON can say; ``sampling_from_plain`` reads it back."""
    return {name: getattr(sampling, name) for name in _SAMPLING_FIELDS}


def sampling_from_plain(fields: dict[str, Any]) -> SamplingParams:
    """Not validated. ``KeyError``, ``TypeError``, ``ValueError`` or ``AttributeError`` where it is nothing of
    the kind.
    """
    fields["logit_bias"] = {int(k): float(v) for k, v in fields["logit_bias"].items()}
    fields["stop"] = tuple(fields["stop"])
    fields["stop_token_ids"] = tuple(fields["stop_token_ids"])
    return SamplingParams(**fields)
