"""All updates of one request, put together."""

from __future__ import annotations

from dataclasses import dataclass, field

from hexgen.coordinator.stream import Delta, RequestStream, RequestUpdate
from hexgen.request import CompletionOutput, FinishReason, RequestOutput, TokenLogprobs


@dataclass(slots=True)
class _Part:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        if delta.text:
            self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Answer:
    """Collects a request's updates into a ``RequestOutput``."""

    def __init__(self, stream: RequestStream, prompt: str | None = None) -> None:
        self._stream = stream
        self._prompt = prompt
        self._parts = tuple(_Part() for _ in stream.sequences)

    def add(self, update: RequestUpdate) -> None:
        for delta in update.deltas:
            self._parts[delta.index].add(delta)

    def output(self) -> RequestOutput:
        """What has come so far; complete once the request has finished."""
        wants_logprobs = self._stream.sampling.logprobs is not None
        return RequestOutput(
            request_id=self._stream.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._stream.prompt_token_ids,
            outputs=tuple(
                CompletionOutput(
                    index=index,
                    text="".join(part.texts),
                    token_ids=tuple(part.token_ids),
                    finish_reason=part.finish_reason,
                    stop_reason=part.stop_reason,
                    logprobs=tuple(part.logprobs) if wants_logprobs else None,
                )
                for index, part in enumerate(self._parts)
            ),
            timing=self._stream.timing,
        )
