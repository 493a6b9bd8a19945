"""Requests to routes: the waiting queue, the choice of a route, sequence numbers, and what the heads answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hexgen.coordinator.admission import AdmissionLimits, AdmissionQueue
from hexgen.coordinator.engine_client import Endpoint, RouteConnection
from hexgen.coordinator.metrics import Metrics
from hexgen.coordinator.stream import OutputSequence, RequestStream
from hexgen.errors import EngineError, HexgenError, RequestError, UnavailableError
from hexgen.protocol import Abort, Frame, Refused, Stats, Submit, Tokens, Welcome
from hexgen.request import MAX_SEED
from hexgen.route_speeds import RouteSpeeds
from hexgen.routing import Router, RouteState


class Dispatcher:
    """Owns the connections to the heads and every accepted request until it has finished."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        secret: str,
        eos_token_ids: tuple[int, ...],
        limits: AdmissionLimits,
        metrics: Metrics,
        predicted_tokens_s: Mapping[int, float] | None = None,
    ) -> None:
        """``predicted_tokens_s``: of each route when it is full, where a plan says so."""
        self.router = Router(())
        self.queue: AdmissionQueue[RequestStream] = AdmissionQueue(limits)
        self.streams: dict[str, RequestStream] = {}  # accepted and not finished, by request id
        self.stats: dict[int, Stats] = {}  # the last of each route
        self.idle = asyncio.Event()  # set while no request is unfinished
        self.idle.set()
        self._eos_token_ids = eos_token_ids
        self._metrics = metrics
        self._weights = {e.route: e.weight for e in endpoints}
        self.speeds = RouteSpeeds(self._weights, predicted_tokens_s)
        self._connections = {e.route: RouteConnection(e, secret, self) for e in endpoints}
        self._running: dict[int, tuple[RequestStream, OutputSequence]] = {}  # by sequence number
        self._next_sequence = 1

    async def open(self) -> None:
        """Connect to every route; ``EngineError`` where one does not answer."""
        try:
            await asyncio.gather(*(c.open() for c in self._connections.values()))
        except HexgenError:
            await self.close()
            raise

    async def close(self) -> None:
        """Abort what is left and hang up."""
        self.abort_all()
        await asyncio.gather(*(c.close() for c in self._connections.values()))

    def abort_all(self) -> None:
        for stream in tuple(self.streams.values()):
            self.abort(stream)

    # ---- out ---------------------------------------------------------------------------------------------------

    def place(self, stream: RequestStream) -> None:
        """Send ``stream`` on its way if a route has room and nobody is before it, else queue it.

        ``QueueFullError`` where too much is waiting, ``UnavailableError`` where no route could ever take it.
        """
        if not self.router.able(stream.need):
            raise UnavailableError("no route can take the request now", remedy="try again later")
        route = self.router.choose(stream.need) if not len(self.queue) else None
        if route is None:
            self.queue.push(stream, time.monotonic())
        self.streams[stream.request_id] = stream
        self.idle.clear()
        self._metrics.prompt_tokens.inc(len(stream.prompt_token_ids))
        if route is not None:
            self._dispatch(stream, route)
        else:
            self._pump()

    def _pump(self) -> None:
        """Send waiting requests to routes with room, in order; never past one that waits for the same route."""
        blocked: set[int] = set()
        up = self.router.up
        for stream in self.queue.snapshot():
            if up and blocked >= up:
                return
            able = self.router.able(stream.need)
            if not able:
                self.queue.remove(stream)
                self._end(stream, "unavailable", UnavailableError("no route can take the request any more"))
                continue
            route = self.router.choose(stream.need, blocked)
            if route is None:
                blocked |= able
                continue
            self.queue.remove(stream)
            self._dispatch(stream, route)

    def _dispatch(self, stream: RequestStream, route: int) -> None:
        state = self.router.routes[route]
        connection = self._connections[route]
        stream.route, stream.admitted_s = route, time.monotonic()
        stream.reserved_pages = state.pages(stream.need)
        state.starting_pages += stream.reserved_pages
        state.outstanding += len(stream.sequences)
        self._metrics.queue_s.observe(stream.admitted_s - stream.arrived_s)
        sampling = stream.sampling
        seed = secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed
        stops = sampling.stop_token_ids
        if not sampling.ignore_eos:
            stops = tuple(dict.fromkeys((*stops, *self._eos_token_ids)))
        for sequence in stream.sequences:
            number, self._next_sequence = self._next_sequence, self._next_sequence + 1
            stream.numbers[number] = sequence
            self._running[number] = (stream, sequence)
            one = replace(sampling, n=1, seed=derive_seed(seed, sequence.index), stop=())
            connection.send(Submit(number, stream.prompt_token_ids, one, stops))

    # ---- in ----------------------------------------------------------------------------------------------------

    def route_up(self, welcome: Welcome) -> None:
        before = self.router.routes.get(welcome.route)
        self.router.routes[welcome.route] = RouteState(
            route=welcome.route,
            weight=self._weights[welcome.route],
            max_context=welcome.max_context,
            total_pages=welcome.total_pages,
            page_size=welcome.page_size,
            max_sequences=welcome.max_sequences,
            free_pages=welcome.total_pages,
            speed=self.speeds.factor(welcome.route),
            credit=0.0 if before is None else before.credit,
        )
        self._pump()

    def route_down(self, route: int, reason: str) -> None:
        """Fail what ran there; the other routes go on, and waiting requests that could still run keep waiting."""
        self.router.routes[route].up = False
        self.stats.pop(route, None)
        self.speeds.lost(route)
        for stream in [s for s in self.streams.values() if s.route == route]:
            if stream.first_token_s is None:
                error: HexgenError = UnavailableError(f"route {route} went down: {reason}", remedy="try again")
            else:
                error = EngineError(f"route {route} went down in the middle of the answer: {reason}")
            self._end(stream, "error", error)
        self._pump()

    def route_frame(self, route: int, frame: Frame) -> None:
        if isinstance(frame, Tokens):
            self._on_tokens(frame)
        elif isinstance(frame, Stats):
            self.stats[route] = frame
            state = self.router.routes[route]
            state.free_pages, state.total_pages = frame.free_pages, frame.total_pages
            state.waiting, state.running = frame.waiting, frame.running
            self.speeds.observe(route, time.monotonic(), frame.output_tokens, state.full)
            state.speed = self.speeds.factor(route)
            if len(self.queue):
                self._pump()
        elif isinstance(frame, Refused):
            found = self._running.get(frame.sequence)
            if found is not None:
                self._end(found[0], "error", RequestError(frame.message), cancel=True)
                self._pump()
        else:
            raise EngineError(f"a head must not send {type(frame).__name__}")

    def _on_tokens(self, frame: Tokens) -> None:
        now_s = time.monotonic()
        moved = False
        for event in frame.events:
            found = self._running.get(event.request)
            if found is None:  # aborted, or ended by a stop string, while the token was on its way
                continue
            stream, sequence = found
            if stream.first_token_s is None:
                stream.first_token_s = now_s
                moved = True
                self._release_reservation(stream)
            cut = sequence.push(event, stream.delta(sequence.index))
            if cut:
                self._send_abort(stream, (event.request,))
            if sequence.finished:
                moved = True
                self._forget_sequence(stream, event.request)
                if not stream.numbers:
                    self._end(stream, "finished")
                    continue
            stream.wake()
        if moved and len(self.queue):
            self._pump()

    # ---- ends --------------------------------------------------------------------------------------------------

    def abort(self, stream: RequestStream) -> None:
        if stream.finished or stream.request_id not in self.streams:
            return
        for sequence in stream.sequences:
            if not sequence.finished:
                sequence.cancel(stream.delta(sequence.index))
        self._end(stream, "aborted", cancel=True)
        self._pump()

    def _end(
        self, stream: RequestStream, outcome: str, error: HexgenError | None = None, *, cancel: bool = False
    ) -> None:
        """Take the request off every list; ``cancel``: tell the head to forget what still runs."""
        now_s = time.monotonic()
        if cancel and stream.numbers:
            self._send_abort(stream, tuple(stream.numbers))
        for number in tuple(stream.numbers):
            self._forget_sequence(stream, number)
        self._release_reservation(stream)
        if stream.route is None:
            self.queue.remove(stream)
        self.streams.pop(stream.request_id, None)
        stream.finish(now_s, error)
        self._observe(stream, outcome, now_s)
        if not self.streams:
            self.idle.set()

    def _observe(self, stream: RequestStream, outcome: str, now_s: float) -> None:
        self._metrics.requests.labels(outcome).inc()
        tokens = stream.output_tokens
        self._metrics.output_tokens.inc(tokens)
        if stream.first_token_s is not None:
            self.queue.rate.finished(now_s)
            self._metrics.ttft_s.observe(stream.first_token_s - stream.arrived_s)
            self._metrics.latency_s.observe(now_s - stream.arrived_s)
            each = tokens // len(stream.sequences)
            if each > 1:
                self._metrics.tpot_s.observe((now_s - stream.first_token_s) / (each - 1))

    def _forget_sequence(self, stream: RequestStream, number: int) -> None:
        del stream.numbers[number]
        del self._running[number]
        if stream.route is not None:
            self.router.routes[stream.route].outstanding -= 1

    def _release_reservation(self, stream: RequestStream) -> None:
        pages, stream.reserved_pages = stream.reserved_pages, 0
        if pages and stream.route is not None:
            state = self.router.routes[stream.route]
            state.starting_pages -= pages
            # The head's next Stats tell; until then these pages are taken.
            state.free_pages = max(0, state.free_pages - pages)

    def _send_abort(self, stream: RequestStream, numbers: tuple[int, ...]) -> None:
        if stream.route is not None:
            self._connections[stream.route].send(Abort(numbers))


def derive_seed(seed: int, index: int) -> int:
    """The seed of sequence ``index`` of a request: its own for the first, well mixed for the others.

    SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014, section 4).
    """
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & MAX_SEED
