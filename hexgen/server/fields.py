"""The fields of OpenAI's requests, with vLLM's additions, as they arrive; and what they mean to the engine."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hexgen.coordinator.tokenizer import check_text
from hexgen.errors import RequestError
from hexgen.request import MAX_LOGPROBS, SamplingParams

MAX_PROMPTS = 128  # in one request
MAX_MESSAGES = 4096
MAX_PARTS = 4096
_MAX_NAME = 512


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None


class _Body(BaseModel):
    """What both kinds of request have. Unknown fields are ignored, as OpenAI's server does."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = Field(None, max_length=_MAX_NAME)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Any = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Any = None
    seed: int | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: Any = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options is not None and self.stream_options.include_usage)


class CompletionBody(_Body):
    """``POST /v1/completions``"""

    prompt: Any = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None  # vLLM's


class ChatBody(_Body):
    """``POST /v1/chat/completions``"""

    messages: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    response_format: Any = None


def parse_completion(fields: dict[str, Any]) -> CompletionBody:
    body = _parse(CompletionBody, fields)
    if body.suffix:
        raise RequestError("is not supported", where="suffix", remedy="leave it out")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("is not supported beyond n", where="best_of", remedy="leave it out")
    if body.echo and body.logprobs is not None:
        raise RequestError("cannot be combined with logprobs", where="echo", remedy="leave one of them out")
    return body


def parse_chat(fields: dict[str, Any]) -> ChatBody:
    body = _parse(ChatBody, fields)
    if body.tools:
        raise RequestError("is not supported", where="tools", remedy="leave it out")
    kind = body.response_format.get("type") if isinstance(body.response_format, dict) else body.response_format
    if kind not in (None, "text"):
        raise RequestError("only text is supported", where="response_format", remedy="leave it out")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("needs logprobs: true", where="top_logprobs")
    return body


B = TypeVar("B", bound=BaseModel)


def _parse(kind: type[B], fields: dict[str, Any]) -> B:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:4]) or "body"
        raise RequestError(first["msg"], where=where) from error


def sampling_of(body: CompletionBody | ChatBody, default_max_tokens: int) -> SamplingParams:
    """The engine's parameters; ranges are checked by ``SamplingParams.validate`` when it is submitted."""
    values: dict[str, Any] = {
        name: value
        for name in (
            "temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p",
            "repetition_penalty", "ignore_eos", "min_tokens",
        )
        if (value := getattr(body, name)) is not None
    }  # fmt: skip
    values["max_tokens"] = body.max_tokens if body.max_tokens is not None else default_max_tokens
    if isinstance(body, ChatBody):
        if body.max_completion_tokens is not None:
            values["max_tokens"] = body.max_completion_tokens
        if body.logprobs:
            values["logprobs"] = body.top_logprobs or 0
    elif body.logprobs is not None:
        values["logprobs"] = body.logprobs
    if (values.get("logprobs") or 0) > MAX_LOGPROBS:
        name = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
        raise RequestError(f"must be at most {MAX_LOGPROBS}", where=name)
    values["stop"] = _strings(body.stop)
    if body.stop_token_ids is not None:
        values["stop_token_ids"] = body.stop_token_ids
    values["logit_bias"] = _bias(body.logit_bias)
    sampling = SamplingParams(**values)
    sampling.validate()
    return sampling


def prompts_of(value: Any) -> list[str | list[int]]:
    """The prompts of a completion request: a text, texts, token ids, or lists of token ids."""
    if isinstance(value, str):
        return [_text(value)]
    if isinstance(value, list) and value:
        if isinstance(value[0], int):
            return [value]  # the coordinator checks every id
        if len(value) > MAX_PROMPTS:
            raise RequestError(
                f"holds {len(value)} prompts, and at most {MAX_PROMPTS} may come at once", where="prompt"
            )
        if all(isinstance(p, str) for p in value):
            return [_text(p) for p in value]
        if all(isinstance(p, list) for p in value):
            return list(value)
    raise RequestError(
        "must be a text, a list of texts, token ids, or a list of lists of token ids", where="prompt"
    )


def messages_of(value: Any) -> list[dict[str, str]]:
    """A conversation as chat templates take it: each message's role and its text."""
    if not isinstance(value, list) or not value:
        raise RequestError("must be a list of at least one message", where="messages")
    if len(value) > MAX_MESSAGES:
        raise RequestError(f"holds more than {MAX_MESSAGES} messages", where="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError("must be an object with role and content", where=where)
    role = message.get("role")
    if not isinstance(role, str) or not 0 < len(role) <= 64:
        raise RequestError("must be a short text, like user", where=f"{where}.role")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        if len(content) > MAX_PARTS:
            raise RequestError(f"holds more than {MAX_PARTS} parts", where=f"{where}.content")
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError("must be a text or a list of text parts", where=f"{where}.content")
    check_text(role, f"{where}.role")
    check_text(content, f"{where}.content")
    return {"role": role, "content": content}


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError('must be {"type": "text", "text": ...}: this model reads text only', where=where)
    return str(part["text"])


def _text(text: str) -> str:
    check_text(text)
    return text


def _strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(s, str) for s in value):
        raise RequestError("must be a string or a list of strings", where="stop")
    return tuple(value)


def _bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError("must map token ids to numbers", where="logit_bias")
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError as error:
        raise RequestError("must map token ids to numbers", where="logit_bias") from error
