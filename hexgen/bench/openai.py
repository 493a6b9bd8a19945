"""The client of OpenAI's HTTP interface: completions or chats, streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from hexgen.bench.client import AnswerError, RankSeconds, ServerFacts, ServerState
from hexgen.bench.http import BrokenStreamError, Pool, Target, event_lines, whole
from hexgen.bench.record import Record
from hexgen.errors import SpecError, UnavailableError

_MAX_ERROR_BYTES = 1 << 20
_LOOK_S = 10.0
_RETURNS_IDS = ("hexgen", "vllm")  # whose servers know `return_token_ids`: an event for every token, text or not
_KINDS = ("compute", "wait", "transfer", "host")


@dataclass(frozen=True, slots=True)
class AskOptions:
    """How every request is asked."""

    model: str | None = None  # None: the first that the server names
    chat: bool = False
    ignore_eos: bool = True
    api_key: str | None = None


class OpenAIClient:
    """One server; connections are kept and used again."""

    def __init__(self, target: Target, options: AskOptions) -> None:
        self._pool = Pool(target)
        self._options = options
        self._model = options.model
        self._path = "/v1/chat/completions" if options.chat else "/v1/completions"
        self._extra: dict[str, Any] = {"ignore_eos": True} if options.ignore_eos else {}
        self._headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}

    @property
    def backend(self) -> str:
        return "openai-chat" if self._options.chat else "openai"

    @property
    def where(self) -> str:
        target = self._pool.target
        return f"{'https' if target.tls else 'http'}://{target.authority}{target.path}"

    async def look(self) -> ServerFacts:
        try:
            status, body = await self._get("/v1/models")
        except (UnavailableError, BrokenStreamError) as error:
            reason = error.message if isinstance(error, UnavailableError) else str(error)
            raise UnavailableError(
                f"no server answers: {reason}",
                where=self.where,
                remedy="start one with `hexgen serve`, or say where it is with --url",
            ) from error
        if status in (401, 403):
            raise SpecError("the server refuses us", where=self.where, remedy="give its key with --api-key")
        models = _models(body) if status == 200 else []
        found = next((m for m in models if m.get("id") == self._options.model), models[0] if models else {})
        self._model = self._options.model or found.get("id")
        if not isinstance(self._model, str):
            raise SpecError(
                f"the server does not name its models (status {status})", where=self.where, remedy="give --model"
            )
        owner = str(found.get("owned_by", ""))
        if owner in _RETURNS_IDS and not self._options.chat:
            self._extra["return_token_ids"] = True
        return ServerFacts(
            self._model, _positive(found.get("max_model_len")), _positive(found.get("vocab_size")), owner
        )

    async def answer(self, record: Record) -> None:
        ask = record.ask
        prompt = ask.prompt if isinstance(ask.prompt, str) else ask.prompt.tolist()
        fields: dict[str, Any] = {
            "model": self._model,
            "max_tokens": ask.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }
        fields |= {"messages": [{"role": "user", "content": prompt}]} if self._options.chat else {"prompt": prompt}
        body = json.dumps(fields, separators=(",", ":")).encode()
        record.sent_s = time.perf_counter()
        try:
            connection, status, pieces = await self._pool.send("POST", self._path, self._headers, body)
            try:
                if status != 200:
                    reason = _error_text(await whole(pieces, _MAX_ERROR_BYTES))
                    raise AnswerError(f"HTTP {status}: {reason}")
                await self._read(pieces, record)
            finally:
                self._pool.done(connection)
        except UnavailableError as error:
            raise AnswerError(error.message) from error
        except BrokenStreamError as error:
            begun = "the stream broke off" if record.times else "no answer"
            raise AnswerError(f"{begun}: {error}") from error

    async def _read(self, pieces: AsyncIterator[bytes], record: Record) -> None:
        """To the end of the stream: only then can the connection be used again."""
        tokens, ended, counted = 0, False, None
        async for line in event_lines(pieces):
            now_s = time.perf_counter()
            if line == b"[DONE]":
                ended = True
                continue
            event = _event(line)
            if event.get("error"):
                raise AnswerError(f"error in the stream: {_message(event['error'])}")
            choices = event.get("choices")
            if choices:
                # As `vllm bench serve` does, a piece counts whatever its text is: it may be half a character.
                # A chat begins with its role, which is no token.
                choice = choices[0]
                delta = choice.get("delta") or {}
                if not (self._options.chat and not delta.get("content") and not choice.get("finish_reason")):
                    record.times.append(now_s)
                    tokens += len(choice.get("token_ids") or (None,))
                ended = ended or bool(choice.get("finish_reason"))
            usage = event.get("usage")
            if isinstance(usage, dict):
                counted = usage
        if not record.times:
            raise AnswerError("the answer has no token")
        if not ended:
            raise AnswerError("the stream broke off: it has no end")
        record.output_tokens = _positive((counted or {}).get("completion_tokens")) or tokens
        record.prompt_tokens = _positive((counted or {}).get("prompt_tokens")) or record.ask.prompt_tokens or 0

    async def state(self) -> ServerState:
        try:
            status, body = await self._get("/metrics")
        except (UnavailableError, BrokenStreamError):
            return ServerState()
        return state_of(body.decode("utf-8", "replace")) if status == 200 else ServerState()

    async def close(self) -> None:
        self._pool.close()

    async def _get(self, path: str) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(_LOOK_S):
                connection, status, pieces = await self._pool.send("GET", path, self._headers)
                try:
                    return status, await whole(pieces)
                finally:
                    self._pool.done(connection)
        except TimeoutError as error:
            raise BrokenStreamError(f"nothing within {_LOOK_S:.0f} s") from error


def state_of(exposition: str) -> ServerState:
    """What is ours in Prometheus' text; empty where it is none, or another server's."""
    from prometheus_client.parser import text_string_to_metric_families

    ranks: dict[tuple[str, int], dict[str, float]] = {}
    totals: dict[str, float] = {}
    layers: dict[str, tuple[int, int]] = {}
    with contextlib.suppress(ValueError, KeyError):
        for family in text_string_to_metric_families(exposition):
            if not family.name.startswith("hexgen_"):
                continue
            for sample in family.samples:
                name = sample.name.removeprefix("hexgen_")
                if name.startswith("stage_"):
                    key = (sample.labels.get("stage", ""), int(sample.labels.get("rank", "0")))
                    short = name.removeprefix("stage_").removesuffix("_total")
                    ranks.setdefault(key, {})[short] = sample.value
                elif name == "layers":
                    layers[sample.labels["stage"]] = int(sample.labels["first"]), int(sample.labels["end"])
                elif name.endswith(("_sum", "_count", "_total")):
                    totals[name] = totals.get(name, 0.0) + sample.value
    found = tuple(
        RankSeconds(stage, rank, int(v.get("steps", 0)), *(v.get(f"{kind}_seconds", 0.0) for kind in _KINDS))
        for (stage, rank), v in sorted(ranks.items())
    )
    return ServerState(found, totals, layers)


def _models(body: bytes) -> list[dict[str, Any]]:
    try:
        found = json.loads(body)
        return [model for model in found["data"] if isinstance(model, dict)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AnswerError("an event of the stream is not JSON") from error
    if not isinstance(event, dict):
        raise AnswerError("an event of the stream is no object")
    choices = event.get("choices")
    if choices and not (isinstance(choices, list) and isinstance(choices[0], dict)):
        raise AnswerError("an event of the stream has no choices in it")
    return event


def _message(error: Any) -> str:
    if isinstance(error, dict):
        error = error.get("message", "no reason given")
    return str(error)


def _error_text(body: bytes) -> str:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body[:200].decode("utf-8", "replace") or "no reason given"
    return _message(value.get("error", value.get("message", value)) if isinstance(value, dict) else value)


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
