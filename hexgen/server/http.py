"""OpenAI's HTTP interface, with health and metrics beside it."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hexgen.coordinator.coordinator import Coordinator
from hexgen.coordinator.stream import RequestStream
from hexgen.errors import HexgenError, ModelNotFoundError, RequestError
from hexgen.request import SamplingParams
from hexgen.server.auth import authorized
from hexgen.server.body import MAX_BODY_BYTES, BodyReader
from hexgen.server.event_stream import EventStream, aborting_on_disconnect, collect
from hexgen.server.fields import (
    ChatBody,
    CompletionBody,
    messages_of,
    parse_chat,
    parse_completion,
    prompts_of,
    sampling_of,
)
from hexgen.server.http_errors import error_response, plain_error
from hexgen.server.openai_json import Chunks, Reply, whole

log = logging.getLogger("hexgen.server")

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default


def build_app(
    coordinator: Coordinator, api_key: str | None = None, max_body_bytes: int = MAX_BODY_BYTES
) -> FastAPI:
    """The ASGI application over ``coordinator``; with ``api_key``, everything but ``/health`` asks for it."""
    app = FastAPI(title="hexgen", docs_url=None, redoc_url=None, openapi_url=None)
    api = _Api(coordinator, max_body_bytes)
    app.add_api_route("/v1/completions", api.completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", api.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", api.model, methods=["GET"], response_model=None)
    app.add_api_route("/health", api.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", api.metrics, methods=["GET"], response_model=None)
    app.add_exception_handler(HexgenError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    app.add_middleware(_KeyCheck, api_key=api_key)
    return app


class _KeyCheck:
    """Refuses whoever lacks the API key before anything is read."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            header = next((v for k, v in scope["headers"] if k == b"authorization"), None)
            if not authorized(header, self._api_key):
                message = "the API key is missing or wrong (send it as Authorization: Bearer KEY)"
                refusal = plain_error(401, message, "authentication_error", "invalid_api_key")
                refusal.headers["www-authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Api:
    def __init__(self, coordinator: Coordinator, max_body_bytes: int) -> None:
        self._coordinator = coordinator
        self._bodies = BodyReader(max_body_bytes)

    async def completions(self, request: Request) -> Response:
        body = parse_completion(await self._bodies.read_json(request))
        self._check_model(body.model)
        sampling = sampling_of(body, _COMPLETION_MAX_TOKENS)
        prompts = prompts_of(body.prompt)
        ids = [await self._ids(p, body.add_special_tokens is not False) for p in prompts]
        echoes = [self._text(p) if body.echo else None for p in prompts]
        return await self._answer(request, body, ids, sampling, echoes, chat=False)

    async def chat(self, request: Request) -> Response:
        body = parse_chat(await self._bodies.read_json(request))
        self._check_model(body.model)
        messages = messages_of(body.messages)
        tokenizer = self._coordinator.tokenizer
        if tokenizer is None:
            raise RequestError(
                "this model has no tokenizer", where="messages", remedy="send token ids to /v1/completions"
            )
        ids = await self._coordinator.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        # As much as fits is what a chat gets where it does not say.
        sampling = sampling_of(body, max(1, self._coordinator.max_context - len(ids)))
        return await self._answer(request, body, [ids], sampling, [None], chat=True)

    async def _answer(
        self,
        request: Request,
        body: CompletionBody | ChatBody,
        prompts: list[tuple[int, ...]],
        sampling: SamplingParams,
        echoes: list[str | None],
        *,
        chat: bool,
    ) -> Response:
        streams = await self._submit(prompts, sampling)
        reply = Reply(
            id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            created=Reply.now(),
            model=body.model or self._coordinator.model.name,
            chat=chat,
            n=sampling.n,
            tokenizer=self._coordinator.tokenizer,
            return_token_ids=bool(body.return_token_ids),
            include_usage=body.include_usage,
            echo=isinstance(body, CompletionBody) and bool(body.echo),
        )
        if body.stream:
            return EventStream(Chunks(reply), streams, sampling.n, echoes)
        async with aborting_on_disconnect(request.receive, streams):
            outputs = await collect(streams, echoes)
        return JSONResponse(whole(reply, outputs))

    async def _submit(self, prompts: list[tuple[int, ...]], sampling: SamplingParams) -> list[RequestStream]:
        """All of them, or none."""
        streams: list[RequestStream] = []
        try:
            for prompt in prompts:
                streams.append(await self._coordinator.submit(prompt, sampling))
        except HexgenError:
            for stream in streams:
                stream.abort()
            raise
        return streams

    async def _ids(self, prompt: str | list[int], add_special_tokens: bool) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await self._coordinator.encode(prompt, add_special_tokens)
        return tuple(prompt)

    def _text(self, prompt: str | list[int]) -> str | None:
        if isinstance(prompt, str) or self._coordinator.tokenizer is None:
            return prompt if isinstance(prompt, str) else None
        self._coordinator.check_ids(prompt)
        return self._coordinator.tokenizer.decode(prompt)

    def _check_model(self, name: str | None) -> None:
        model = self._coordinator.model
        if name is not None and not model.answers_to(name):
            raise ModelNotFoundError(
                f"the model {name!r} is not served here", where="model", remedy=f"this server has {model.name!r}"
            )

    def _model_fields(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(self._coordinator.started_s),
            "owned_by": "hexgen",
            "max_model_len": self._coordinator.max_context,
            "vocab_size": self._coordinator.model.vocab_size,
        }

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_fields(self._coordinator.model.name)]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return JSONResponse(self._model_fields(name))

    async def health(self) -> Response:
        states = list(self._coordinator.route_states)
        healthy = self._coordinator.healthy
        fields = {
            "status": "ok" if healthy else "unavailable",
            "routes": len(states),
            "routes_up": sum(s.up for s in states),
        }
        return JSONResponse(fields, 200 if healthy else 503)

    async def metrics(self) -> Response:
        await self._coordinator.ranks.refresh()
        return Response(self._coordinator.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


async def _on_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, HexgenError):
        raise error
    return error_response(error)


async def _on_http_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    response = plain_error(error.status_code, error.detail, "invalid_request_error", None)
    response.headers.update(error.headers or {})
    return response


async def _on_fault(request: Request, error: Exception) -> Response:
    log.error("a fault while answering %s", request.url.path, exc_info=error)
    return plain_error(500, "internal error", "server_error", "server_error")
