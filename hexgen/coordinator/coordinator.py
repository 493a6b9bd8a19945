"""The coordinator: takes requests, finds each a route, turns what the heads send into text for whoever asked."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hexgen.coordinator.admission import AdmissionLimits, check_prompt
from hexgen.coordinator.dispatcher import Dispatcher
from hexgen.coordinator.engine_client import Endpoint
from hexgen.coordinator.metrics import Metrics
from hexgen.coordinator.rank_times import RankTimes
from hexgen.coordinator.stream import RequestStream, RequestUpdate
from hexgen.coordinator.tokenizer import Tokenizer
from hexgen.errors import QueueFullError, RequestError, UnavailableError
from hexgen.plan import Plan
from hexgen.protocol import Stats
from hexgen.request import SamplingParams
from hexgen.routing import RouteState
from hexgen.worker.report import RankReport

MAX_REQUEST_ID_CHARS = 128
_THREAD_CHARS = 8192  # a longer text is tokenized beside the event loop


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What requests may call the model, and what the door must know of it."""

    name: str
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()

    def answers_to(self, name: str) -> bool:
        return name == self.name or name in self.aliases


@dataclass(frozen=True, slots=True)
class CoordinatorLimits:
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)


class Coordinator:
    """One a deployment; lives on one event loop, and every method is called there.

    ``endpoints`` are the routes' heads, ``secret`` is the deployment's. Without a ``tokenizer``, prompts are token
    ids and answers have no text. ``reports`` asks the deployment where its ranks' time went; it may block.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        secret: str,
        model: ServedModel,
        tokenizer: Tokenizer | None = None,
        limits: CoordinatorLimits | None = None,
        plan: Plan | None = None,
        reports: Callable[[], Mapping[str, RankReport]] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.started_s = time.time()
        self.ranks = RankTimes(reports)
        self.metrics = Metrics(self)
        self._dispatcher = Dispatcher(
            endpoints,
            secret,
            model.eos_token_ids,
            (limits or CoordinatorLimits()).admission,
            self.metrics,
            _predicted_tokens_s(plan),
        )
        self._stopping = False

    # ---- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect to every route; ``EngineError`` where one does not answer."""
        await self._dispatcher.open()

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; let the accepted ones finish for ``timeout_s`` seconds, then abort them."""
        self._stopping = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._dispatcher.idle.wait()
        except TimeoutError:
            self._dispatcher.abort_all()

    async def close(self) -> None:
        """Abort what is left and hang up. The deployment itself is stopped by who started it."""
        self._stopping = True
        await self._dispatcher.close()

    # ---- state, for servers and metrics ----------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests that wait for a route."""
        return len(self._dispatcher.queue)

    @property
    def running(self) -> int:
        """Requests that were sent to a route and have not finished."""
        return len(self._dispatcher.streams) - self.waiting

    @property
    def route_states(self) -> Iterable[RouteState]:
        return self._dispatcher.router.routes.values()

    def route_stats(self, route: int) -> Stats | None:
        return self._dispatcher.stats.get(route)

    def route_tokens_s(self, route: int) -> float | None:
        """Output tokens/s that the route was seen to do when full; None where that is not known."""
        return self._dispatcher.speeds.measured_tokens_s(route)

    @property
    def rank_reports(self) -> tuple[RankReport, ...]:
        """As of the last ``ranks.refresh()``."""
        return self.ranks.last

    @property
    def healthy(self) -> bool:
        return bool(self._dispatcher.router.up) and not self._stopping

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together, on the route that takes most."""
        return self._dispatcher.router.max_context

    # ---- requests --------------------------------------------------------------------------------------------

    async def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt; ``RequestError`` where there is no tokenizer or the text cannot fit."""
        if self.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer", where="prompt", remedy="send token ids instead of text"
            )
        if not text:
            raise RequestError("is empty", where="prompt", remedy="send at least one token")
        # A normalizer may shorten the text (composed characters): four times is beyond what any does.
        most = 4 * self.max_context * self.tokenizer.longest_token_chars
        if len(text) > most:
            raise RequestError(
                f"has {len(text)} characters, which cannot fit a context of {self.max_context} tokens",
                where="prompt",
            )
        if len(text) > _THREAD_CHARS:
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        return self.tokenizer.encode(text, add_special_tokens)

    def check_ids(self, ids: Sequence[int]) -> None:
        """``RequestError`` where ``ids`` are no prompt for this model."""
        check_prompt(ids, self.model.vocab_size, self.max_context)

    async def submit(
        self, prompt: str | Sequence[int], sampling: SamplingParams, request_id: str | None = None
    ) -> RequestStream:
        """Accept a request, or raise: ``RequestError``, ``QueueFullError``, ``UnavailableError``."""
        arrived_s = time.monotonic()
        try:
            if self._stopping:
                raise UnavailableError("the server is stopping")
            sampling.validate(self.model.vocab_size)
            if sampling.stop and self.tokenizer is None:
                raise RequestError("needs a tokenizer, which this model lacks", where="stop")
            ids = await self.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
            self.check_ids(ids)
            stream = RequestStream(
                self._new_id(request_id), ids, sampling, self.tokenizer, arrived_s, self._dispatcher.abort
            )
            self._dispatcher.place(stream)
        except RequestError:
            self.metrics.requests.labels("invalid").inc()
            raise
        except QueueFullError:
            self.metrics.requests.labels("refused").inc()
            raise
        except UnavailableError:
            self.metrics.requests.labels("unavailable").inc()
            raise
        return stream

    async def generate(
        self, prompt: str | Sequence[int], sampling: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[RequestUpdate]:
        """Updates until the request has finished. Closing the iterator early aborts it."""
        stream = await self.submit(prompt, sampling, request_id)
        try:
            async for update in stream:
                yield update
        finally:
            stream.abort()

    def abort(self, request_id: str) -> bool:
        """Abort a request by its id; False where there is none such."""
        stream = self._dispatcher.streams.get(request_id)
        if stream is None:
            return False
        self._dispatcher.abort(stream)
        return True

    def _new_id(self, request_id: str | None) -> str:
        if request_id is None or request_id == "":
            return uuid.uuid4().hex
        if len(request_id) > MAX_REQUEST_ID_CHARS or not request_id.isprintable():
            raise RequestError(f"must be at most {MAX_REQUEST_ID_CHARS} printable characters", where="request_id")
        if request_id in self._dispatcher.streams:
            raise RequestError("is in use by a request that has not finished", where="request_id")
        return request_id


def _predicted_tokens_s(plan: Plan | None) -> dict[int, float]:
    """What the plan expects of each route when it is full: its weight's share of the whole."""
    if plan is None or plan.predicted is None:
        return {}
    total = sum(route.weight for route in plan.routes)
    return {i: plan.predicted.tokens_s * route.weight / total for i, route in enumerate(plan.routes)}
