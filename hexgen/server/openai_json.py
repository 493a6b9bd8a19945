"""Answers in OpenAI's shapes. Streamed chunks are put together from ready pieces: they are made once a token."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hexgen.coordinator.stream import Delta
from hexgen.coordinator.tokenizer import Tokenizer
from hexgen.request import CompletionOutput, RequestOutput, TokenLogprobs

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity; this is what OpenAI's own server says instead
_encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Reply:
    """What all chunks of one answer share."""

    id: str
    created: int
    model: str
    chat: bool
    n: int
    tokenizer: Tokenizer | None
    return_token_ids: bool = False
    include_usage: bool = False
    echo: bool = False

    @staticmethod
    def now() -> int:
        return int(time.time())


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    return tokenizer.token_text(token) if tokenizer is not None else f"token_id:{token}"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


# ---- log-probabilities ------------------------------------------------------------------------------------------


def _chat_token(tokenizer: Tokenizer | None, token: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    # A token may be part of a character: then its bytes are not those of the text it shows as.
    octets = None if "\ufffd" in text or tokenizer is None else list(text.encode())
    return {"token": text, "logprob": max(logprob, _LOWEST_LOGPROB), "bytes": octets}


def chat_logprobs(
    tokenizer: Tokenizer | None, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    """OpenAI's ``choice.logprobs`` of a chat."""
    content = []
    for token, entry in zip(token_ids, logprobs, strict=False):
        top = [_chat_token(tokenizer, i, p) for i, p in entry.top]
        content.append({**_chat_token(tokenizer, token, entry.chosen), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer | None, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int
) -> dict[str, Any]:
    """OpenAI's ``choice.logprobs`` of a completion; ``offset`` is where its first token's text begins."""
    texts = [token_text(tokenizer, token) for token in token_ids]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(entry.chosen, _LOWEST_LOGPROB) for entry in logprobs],
        "top_logprobs": [
            {token_text(tokenizer, i): max(p, _LOWEST_LOGPROB) for i, p in entry.top} for entry in logprobs
        ],
        "text_offset": offsets,
    }


# ---- whole answers ----------------------------------------------------------------------------------------------


def whole(reply: Reply, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The answer to a request that does not stream: choices of the first prompt first."""
    choices = [
        _choice(reply, output, choice, position * reply.n + choice.index)
        for position, output in enumerate(outputs)
        for choice in output.outputs
    ]
    return {
        "id": reply.id,
        "object": "chat.completion" if reply.chat else "text_completion",
        "created": reply.created,
        "model": reply.model,
        "choices": choices,
        "usage": usage(
            sum(len(o.prompt_token_ids) for o in outputs),
            sum(len(c.token_ids) for o in outputs for c in o.outputs),
        ),
    }


def _choice(reply: Reply, output: RequestOutput, choice: CompletionOutput, index: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"index": index}
    if reply.chat:
        fields["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
    else:
        fields["text"] = (output.prompt or "") + choice.text if reply.echo else choice.text
    fields["logprobs"] = None
    if choice.logprobs is not None:
        if reply.chat:
            fields["logprobs"] = chat_logprobs(reply.tokenizer, choice.token_ids, choice.logprobs)
        else:
            fields["logprobs"] = completion_logprobs(reply.tokenizer, choice.token_ids, choice.logprobs, 0)
    fields["finish_reason"] = choice.finish_reason
    fields["stop_reason"] = choice.stop_reason
    if reply.return_token_ids:
        fields["prompt_token_ids"] = list(output.prompt_token_ids)
        fields["token_ids"] = list(choice.token_ids)
    return fields


# ---- chunks of a stream -----------------------------------------------------------------------------------------


class Chunks:
    """Server-sent events of one streamed answer."""

    def __init__(self, reply: Reply) -> None:
        kind = "chat.completion.chunk" if reply.chat else "text_completion"
        head = {"id": reply.id, "object": kind, "created": reply.created, "model": reply.model}
        self._reply = reply
        self._head = "data: " + _encode(head)[:-1] + ',"choices":['
        self._tail = "]}\n\n" if not reply.include_usage else '],"usage":null}\n\n'
        self._offsets: dict[int, int] = {}  # characters of token text so far, by choice: for text_offset

    def opening(self, choices: int) -> str:
        """What comes before the first token: a chat's roles."""
        if not self._reply.chat:
            return ""
        role = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return "".join(f'{self._head}{{"index":{i},{role}}}{self._tail}' for i in range(choices))

    def echo(self, prompt: str, index: int, prompt_token_ids: Sequence[int]) -> str:
        ids = f',"prompt_token_ids":{_encode(list(prompt_token_ids))}' if self._reply.return_token_ids else ""
        rest = f'"logprobs":null,"finish_reason":null{ids}'
        return f'{self._head}{{"index":{index},"text":{_encode(prompt)},{rest}}}{self._tail}'

    def delta(self, delta: Delta, index: int) -> str:
        """The event for one delta; empty where it has nothing that the client asked for."""
        reply = self._reply
        if not (delta.text or delta.finish_reason or delta.logprobs or reply.return_token_ids):
            return ""
        text = _encode(delta.text)
        part = f'"delta":{{"content":{text}}}' if reply.chat else f'"text":{text}'
        logprobs = _encode(self._logprobs(delta, index)) if delta.logprobs else "null"
        reason = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
        extra = ""
        if delta.finish_reason is not None:
            extra = f',"stop_reason":{_encode(delta.stop_reason)}'
        if reply.return_token_ids:
            extra += f',"token_ids":{_encode(delta.token_ids)}'
        return (
            f'{self._head}{{"index":{index},{part},"logprobs":{logprobs},"finish_reason":{reason}{extra}}}'
            f"{self._tail}"
        )

    def _logprobs(self, delta: Delta, index: int) -> dict[str, Any]:
        if self._reply.chat:
            return chat_logprobs(self._reply.tokenizer, delta.token_ids, delta.logprobs)
        fields = completion_logprobs(
            self._reply.tokenizer, delta.token_ids, delta.logprobs, self._offsets.get(index, 0)
        )
        self._offsets[index] = fields["text_offset"][-1] + len(fields["tokens"][-1])
        return fields

    def closing(self, prompt_tokens: int, completion_tokens: int) -> str:
        """Usage, where asked for, and the end."""
        if not self._reply.include_usage:
            return "data: [DONE]\n\n"
        numbers = _encode(usage(prompt_tokens, completion_tokens))
        return f'{self._head}],"usage":{numbers}}}\n\ndata: [DONE]\n\n'

    def failure(self, error: dict[str, Any]) -> str:
        return f"data: {_encode(error)}\n\ndata: [DONE]\n\n"
