"""The head of a route: drives its batcher and serves the coordinator. Runs on the leader of the first stage."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hexgen.batching.batcher import Batcher
from hexgen.batching.limits import BatchLimits
from hexgen.batching.segments import SampledToken, Step
from hexgen.errors import RequestError
from hexgen.protocol import Abort, Refused, Stats, Submit, Tokens, Welcome
from hexgen.request import TokenEvent
from hexgen.worker.client import ClientConnection, ClientListener
from hexgen.worker.config import RankConfig, RouteRole

STATS_INTERVAL_S = 0.1
_SMOOTHING = 0.05  # weight of the newest step in the reported means


@dataclass(frozen=True, slots=True)
class ClientNote:
    """Something a coordinator's connection brought: ``frame`` is None when it joins (or, ``left``, when it
    ends).
    """

    route: int
    client: ClientConnection
    frame: Submit | Abort | None = None
    left: bool = False


class RouteHead:
    """One route's batcher and its clients. All methods belong to the stage's loop; ``notify`` is how the
    connections' threads reach it.

    Clients number their sequences themselves; on the route a sequence has a number of the head's own, never used
    twice, so that a late token of an aborted sequence meets nobody.
    """

    def __init__(self, config: RankConfig, role: RouteRole, notify: Callable[[ClientNote], None]) -> None:
        self.route = role.route
        self.limits = BatchLimits(
            pages=role.pages,
            page_size=config.page_size,
            token_budget=config.token_budget,
            max_sequences=config.max_sequences,
            max_context=config.max_context,
            depth=role.depth,
            prefix_cache=config.prefix_cache,
        )
        self.ready_since: float | None = None  # since when a step may be formed; None: nothing new to try
        self._vocab_size = config.model.vocab_size
        self._batcher = Batcher(self.limits, role.route)
        self._numbers = itertools.count()
        self._owners: dict[int, tuple[ClientConnection, int]] = {}
        self._by_client: dict[ClientConnection, dict[int, int]] = {}
        self._formed_at: dict[int, float] = {}
        self._step_s = 0.0
        self._host_s = 0.0
        self._stats_sent_at = 0.0
        self._changed = False
        self._listener = ClientListener(
            config.listen_host,
            config.secret,
            Welcome(role.route, self.limits.context, role.pages, config.page_size, config.max_sequences),
            on_join=lambda client: notify(ClientNote(role.route, client)),
            on_frame=lambda client, frame: notify(ClientNote(role.route, client, frame)),
            on_leave=lambda client: notify(ClientNote(role.route, client, left=True)),
        )

    @property
    def port(self) -> int:
        return self._listener.port

    def open(self) -> None:
        self._listener.start()

    def close(self) -> None:
        self._listener.close()

    # ---- what the clients want ---------------------------------------------------------------------------

    def take(self, note: ClientNote) -> None:
        """A client joined, left, submitted or aborted."""
        self._changed = True
        if note.left:
            self._abort(self._by_client.pop(note.client, {}).values())
        elif note.frame is None:
            self._by_client[note.client] = {}
        elif isinstance(note.frame, Submit):
            self._submit(note.client, note.frame)
        else:
            mine = self._by_client.get(note.client, {})
            self._abort([mine.pop(s) for s in note.frame.sequences if s in mine])

    def _submit(self, client: ClientConnection, frame: Submit) -> None:
        mine = self._by_client.get(client)
        if mine is None:
            return
        try:
            if frame.sequence in mine:
                raise RequestError(f"sequence {frame.sequence} is running already")
            frame.sampling.validate(self._vocab_size)
            ids = (*frame.prompt, *frame.stop_token_ids)
            if not all(type(i) is int and 0 <= i < self._vocab_size for i in ids):
                raise RequestError(f"must be between 0 and {self._vocab_size - 1}", where="token ids")
            number = next(self._numbers)
            self._batcher.add(number, frame.prompt, frame.sampling, frame.stop_token_ids)
        except RequestError as error:
            client.send(Refused(frame.sequence, str(error)))
            return
        except TypeError as error:  # a field of the wrong type, from a client that does not validate
            client.send(Refused(frame.sequence, f"a field of the wrong type: {error}"))
            return
        mine[frame.sequence] = number
        self._owners[number] = (client, frame.sequence)
        self._ready()

    def _abort(self, numbers: Iterable[int]) -> None:
        ended = [n for n in numbers if self._owners.pop(n, None) is not None]
        self._batcher.abort(ended)
        self._ready()

    # ---- steps -------------------------------------------------------------------------------------------

    def _ready(self) -> None:
        if self.ready_since is None:
            self.ready_since = time.perf_counter()

    def next_step(self) -> Step | None:
        step = self._batcher.next_step()
        if step is None:
            self.ready_since = None
        else:
            now = time.perf_counter()
            self.ready_since = now
            self._formed_at[step.number] = now
        return step

    def complete(self, number: int, tokens: Sequence[SampledToken]) -> None:
        """The results of a step are back: clients first, everything else afterwards."""
        events = self._batcher.complete(number, tokens)
        answers: dict[ClientConnection, list[TokenEvent]] = defaultdict(list)
        for event in events:
            owner = self._owners.get(event.request)
            if owner is None:
                continue
            client, sequence = owner
            answers[client].append(TokenEvent(sequence, event.token, event.logprobs, event.finish_reason))
            if event.finish_reason is not None:
                del self._owners[event.request]
                self._by_client[client].pop(sequence, None)
        for client, client_events in answers.items():
            client.send(Tokens(tuple(client_events)))
        self._step_s = _smooth(self._step_s, time.perf_counter() - self._formed_at.pop(number))
        self._changed = True
        self._ready()

    def note_host_time(self, seconds: float) -> None:
        """Time of one step that the head spent outside the model."""
        self._host_s = _smooth(self._host_s, seconds)

    # ---- statistics --------------------------------------------------------------------------------------

    def stats_due_at(self) -> float | None:
        """When ``send_stats`` should be called (``time.perf_counter``); None where nothing has changed."""
        return self._stats_sent_at + STATS_INTERVAL_S if self._changed else None

    def send_stats(self, now: float) -> None:
        self._changed = False
        self._stats_sent_at = now
        s = self._batcher.stats()
        frame = Stats(
            route=self.route,
            free_pages=s.free_pages,
            total_pages=s.total_pages,
            running=s.running,
            waiting=s.waiting,
            in_flight=s.in_flight,
            steps=s.steps,
            preemptions=s.preemptions,
            cached_tokens=s.cached_tokens,
            prompt_tokens=s.prompt_tokens,
            output_tokens=s.output_tokens,
            step_s=self._step_s,
            host_s=self._host_s,
        )
        for client in self._by_client:
            client.send(frame)


def _smooth(mean: float, value: float) -> float:
    return value if mean == 0.0 else mean + _SMOOTHING * (value - mean)
