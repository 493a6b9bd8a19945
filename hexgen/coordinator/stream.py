"""One request while it runs: its sequences turn tokens into text, and whoever asked takes updates out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from hexgen.coordinator.detokenizer import Detokenizer
from hexgen.coordinator.stops import StopMatcher
from hexgen.coordinator.tokenizer import Tokenizer
from hexgen.errors import HexgenError
from hexgen.request import FinishReason, RequestTiming, SamplingParams, TokenEvent, TokenLogprobs
from hexgen.routing import Need


@dataclass(slots=True)
class Delta:
    """What came for one of a request's ``n`` sequences since the last update."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a token, where asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the request's own stop id or string that ended it


@dataclass(frozen=True, slots=True)
class RequestUpdate:
    """News of one request. ``finished``: no more will come."""

    request_id: str
    deltas: tuple[Delta, ...]
    finished: bool


class OutputSequence:
    """One of the ``n`` sequences: detokenizes, and ends at a stop string wherever the tokens' boundaries fall."""

    __slots__ = ("_detokenizer", "_min_tokens", "_own_stops", "_stops", "finished", "index", "tokens")

    def __init__(
        self, index: int, prompt: Sequence[int], sampling: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.index = index
        self.tokens = 0
        self.finished = False
        self._detokenizer = Detokenizer(tokenizer, prompt) if tokenizer is not None else None
        self._stops = StopMatcher(sampling.stop) if sampling.stop else None
        self._own_stops = sampling.stop_token_ids
        self._min_tokens = sampling.min_tokens

    def push(self, event: TokenEvent, delta: Delta) -> bool:
        """Add one token to ``delta``; True where a stop string ended what the engine would go on with."""
        reason = event.finish_reason
        self.tokens += 1
        delta.token_ids.append(event.token)
        if event.logprobs is not None:
            delta.logprobs.append(event.logprobs)
        if reason == "stop" and event.token in self._own_stops:
            delta.stop_reason = event.token
        cut = False
        if self._detokenizer is not None:
            # The token that stops is reported by its id; it is no part of the text.
            text = "" if reason == "stop" else self._detokenizer.push(event.token)
            if reason is not None:
                text += self._detokenizer.flush()
            if self._stops is not None and self.tokens > self._min_tokens:
                text = self._stops.push(text)
                if self._stops.matched is not None:
                    cut = reason is None
                    reason, delta.stop_reason = "stop", self._stops.matched
                elif reason is not None:
                    text += self._stops.flush()
            if text:
                delta.text += text
        if reason is not None:
            delta.finish_reason = reason
            self.finished = True
        return cut

    def cancel(self, delta: Delta) -> None:
        """End without a token: aborted."""
        if self._detokenizer is not None:
            text = self._detokenizer.flush()
            if self._stops is not None:
                text = self._stops.push(text) + self._stops.flush()
            delta.text += text
        delta.finish_reason = "abort"
        self.finished = True


class RequestStream:
    """An accepted request. Iterate over it for updates; leaving it early (``aclose``) aborts it.

    A consumer that is slower than the engine gets fewer, larger updates: nothing queues up but the tokens.
    """

    def __init__(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
        arrived_s: float,
        on_abort: Callable[[RequestStream], None],
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt
        self.sampling = sampling
        self.need = Need(len(prompt), sampling.n)
        self.sequences = tuple(OutputSequence(i, prompt, sampling, tokenizer) for i in range(sampling.n))
        self.route: int | None = None  # set when it leaves the waiting queue
        self.numbers: dict[int, OutputSequence] = {}  # by sequence number on the route, while they run
        self.reserved_pages = 0  # counted against the route until the first token shows in its Stats
        self.arrived_s = arrived_s
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self._on_abort = on_abort
        self._outbox: dict[int, Delta] = {}
        self._error: HexgenError | None = None
        self._wake = asyncio.Event()

    # ---- the engine's side -------------------------------------------------------------------------------

    def delta(self, index: int) -> Delta:
        """Where the news of sequence ``index`` collects until it is taken."""
        delta = self._outbox.get(index)
        if delta is None:
            delta = self._outbox[index] = Delta(index)
        return delta

    def wake(self) -> None:
        self._wake.set()

    def finish(self, now_s: float, error: HexgenError | None = None) -> None:
        """No more comes; with ``error``, the consumer gets it after what came before."""
        if self.finished_s is None:
            self.finished_s = now_s
            self._error = error
        self._wake.set()

    # ---- the consumer's side -----------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.finished_s is not None

    @property
    def output_tokens(self) -> int:
        return sum(s.tokens for s in self.sequences)

    @property
    def timing(self) -> RequestTiming:
        """Of what has happened so far; a step not reached yet reads as the latest moment known."""
        admitted = self.admitted_s if self.admitted_s is not None else self.arrived_s
        first = self.first_token_s if self.first_token_s is not None else admitted
        return RequestTiming(self.arrived_s, admitted, first, self.finished_s or first)

    def take(self) -> RequestUpdate | None:
        """What has come since the last call, or None. Raises the request's error once all before it is out."""
        if self._outbox:
            deltas = tuple(self._outbox.values())
            self._outbox = {}
            return RequestUpdate(self.request_id, deltas, self.finished and self._error is None)
        if self._error is not None:
            raise self._error
        return None

    def share_wake(self, event: asyncio.Event) -> None:
        """Let one consumer wait for several requests: all set the same ``event``."""
        if self._wake.is_set():
            event.set()
        self._wake = event

    def abort(self) -> None:
        """Stop generating; sequences that were running finish with ``abort``. Harmless when finished."""
        self._on_abort(self)

    async def __aiter__(self) -> AsyncIterator[RequestUpdate]:
        async for _, update in merge((self,)):
            yield update


async def merge(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, RequestUpdate]]:
    """Updates of several requests as they come, with their stream's position. Aborts all when left early."""
    event = asyncio.Event()
    for stream in streams:
        stream.share_wake(event)
    try:
        live = dict(enumerate(streams))
        while live:
            event.clear()
            for position, stream in tuple(live.items()):
                while (update := stream.take()) is not None:
                    yield position, update
                if stream.finished:
                    del live[position]
            if live and not event.is_set():
                await event.wait()
    finally:
        for stream in streams:
            stream.abort()
