"""A stage's loop: next work -> share it with the stage's ranks -> run -> pass on.

Work comes from two sides. Incoming edges bring steps that other stages have begun; the heads of the routes that
begin here form new ones. The oldest goes first. Receiver threads only receive and queue: everything else, the
batcher and the clients' answers included, happens on the loop's one thread, which sleeps when there is nothing
to do.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch

from hexgen.batching.segments import Step
from hexgen.errors import EngineError
from hexgen.worker.config import RouteRole
from hexgen.worker.edge import EdgeReceiver, EdgeSender, Received
from hexgen.worker.framing import FrameKind
from hexgen.worker.group import Followers, Leader
from hexgen.worker.head import ClientNote, RouteHead
from hexgen.worker.step_runner import StepRunner
from hexgen.worker.wire import decode_step, decode_tokens, encode_step, encode_tokens


@dataclass(frozen=True, slots=True)
class Arrival:
    """A frame from an edge; ``at`` is when it came (``time.perf_counter``)."""

    received: Received
    at: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """Somebody asked for the end: this rank's owner (``error`` None), a peer's goodbye, or a failure."""

    error: EngineError | None = None


Event = Arrival | ClientNote | Stopped


@dataclass(frozen=True, slots=True)
class _Work:
    step: Step
    header: bytes | None  # as it came; None for a step that was formed here
    received: Received | None


def receive_into(receiver: EdgeReceiver, inbox: SimpleQueue[Event]) -> None:
    """A receiver thread: queue what comes until the peer says goodbye (or raise ``EngineError``)."""
    while True:
        received = receiver.receive()
        if received.frame.kind is FrameKind.STOP:
            inbox.put(Stopped())
            return
        inbox.put(Arrival(received, time.perf_counter()))


class LeaderLoop:
    """Rank 0 of a stage. ``senders`` by (stage, kind)."""

    def __init__(
        self,
        runner: StepRunner,
        roles: Mapping[int, RouteRole],
        heads: Mapping[int, RouteHead],
        senders: Mapping[tuple[str, str], EdgeSender],
        followers: Followers | None,
        inbox: SimpleQueue[Event],
    ) -> None:
        self._runner = runner
        self._clock = runner.clock
        self._roles = roles
        self._heads = heads
        self._senders = senders
        self._followers = followers
        self._inbox = inbox
        self._incoming: deque[tuple[_Work, float]] = deque()

    def run(self) -> None:
        """Until ``Stopped`` comes. Raises what went wrong (``EngineError`` of a peer's death, a bug's own
        exception).
        """
        with torch.inference_mode():
            event: Event | None = None
            while True:
                busy_since = time.perf_counter()
                if event is not None and self._stops(event):
                    return
                if self._drain():
                    return
                work = self._next_work()
                if work is not None:
                    self._process(work, busy_since)
                    event = None
                    continue
                self._clock.busy_s += time.perf_counter() - busy_since
                event = self._wait()

    # ---- what came in ------------------------------------------------------------------------------------

    def _wait(self) -> Event | None:
        """Sleep until something comes, or statistics are due."""
        started = time.perf_counter()
        due = [at for head in self._heads.values() if (at := head.stats_due_at()) is not None]
        try:
            event = self._inbox.get(timeout=max(0.0, min(due) - started) if due else None)
        except Empty:
            event = None
        now = time.perf_counter()
        self._clock.wait_s += now - started
        for head in self._heads.values():
            at = head.stats_due_at()
            if event is None and at is not None and at <= now:
                head.send_stats(now)
        return event

    def _drain(self) -> bool:
        """Take in everything that has come; True at the end."""
        while True:
            try:
                event = self._inbox.get_nowait()
            except Empty:
                return False
            if self._stops(event):
                return True

    def _stops(self, event: Event) -> bool:
        """Take in one event; True where it is the end."""
        if isinstance(event, Arrival):
            self._arrived(event)
        elif isinstance(event, ClientNote):
            self._heads[event.route].take(event)
        else:
            if event.error is not None:
                raise event.error
            return True
        return False

    def _arrived(self, arrival: Arrival) -> None:
        frame = arrival.received.frame
        if frame.kind is FrameKind.TOKENS:
            route, number, tokens = decode_tokens(frame.header)
            head = self._heads.get(route)
            if head is None:
                raise EngineError(f"tokens of route {route}, which does not begin here")
            head.complete(number, tokens)
        else:
            work = _Work(decode_step(frame.header), frame.header, arrival.received)
            self._incoming.append((work, arrival.at))

    # ---- what to do next ---------------------------------------------------------------------------------

    def _next_work(self) -> _Work | None:
        oldest_at = self._incoming[0][1] if self._incoming else float("inf")
        waiting = [(h.ready_since, h.route) for h in self._heads.values() if h.ready_since is not None]
        for ready_since, route in sorted(waiting):
            if ready_since > oldest_at:
                break
            step = self._heads[route].next_step()
            if step is not None:
                return _Work(step, None, None)
        return self._incoming.popleft()[0] if self._incoming else None

    def _process(self, work: _Work, busy_since: float) -> None:
        clock, step = self._clock, work.step
        role = self._roles.get(step.route)
        if role is None:
            raise EngineError(f"a step of route {step.route}, which does not pass here")
        compute_before, transfer_before = clock.compute_s, clock.transfer_s
        header = work.header
        if header is None and (self._followers is not None or not role.samples):
            header = encode_step(step)
        hidden = _on_this_stream(work.received) if work.received is not None else None
        if self._followers is not None and header is not None:
            with _Timer() as timer:
                self._followers.share(header, hidden)
            clock.transfer_s += timer.seconds
        result = self._runner.run(step, hidden)
        if role.samples and role.embeds:
            self._heads[step.route].complete(step.number, result.tokens)
        elif role.samples:
            tokens = encode_tokens(step.route, step.number, result.tokens)
            with _Timer() as timer:
                self._sender(role.first, "tokens").send_tokens(tokens)
            clock.transfer_s += timer.seconds
        elif header is not None and role.next is not None:
            with _Timer() as timer:
                self._sender(role.next, "hidden").send_step(header, result.hidden)
            clock.transfer_s += timer.seconds
        busy = time.perf_counter() - busy_since
        clock.steps += 1
        clock.busy_s += busy
        head = self._heads.get(step.route)
        if head is not None:
            outside = clock.compute_s - compute_before + clock.transfer_s - transfer_before
            head.note_host_time(busy - outside)
            at = head.stats_due_at()
            if at is not None and at <= time.perf_counter():
                head.send_stats(time.perf_counter())

    def _sender(self, stage: str, kind: str) -> EdgeSender:
        sender = self._senders.get((stage, kind))
        if sender is None:
            raise EngineError(f"there is no {kind!r} edge to stage {stage}")
        return sender


class FollowerLoop:
    """Every other rank of a stage: run what the leader says."""

    def __init__(self, runner: StepRunner, leader: Leader) -> None:
        self._runner = runner
        self._leader = leader

    def run(self) -> None:
        """Until the leader says goodbye; raises as ``LeaderLoop.run`` does."""
        clock = self._runner.clock
        with torch.inference_mode():
            while True:
                started = time.perf_counter()
                frame, hidden = self._leader.receive()
                received = time.perf_counter()
                clock.wait_s += received - started
                if frame.kind is FrameKind.STOP:
                    return
                self._runner.run(decode_step(frame.header), hidden)
                clock.steps += 1
                clock.busy_s += time.perf_counter() - received


class _Timer:
    """Seconds spent in a ``with`` block."""

    seconds = 0.0

    def __enter__(self) -> _Timer:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started


def _on_this_stream(received: Received) -> torch.Tensor | None:
    """The hidden states, safe to read on the current CUDA stream (nothing to do on a CPU)."""
    hidden = received.hidden
    if hidden is not None and received.ready is not None:
        stream = torch.cuda.current_stream(hidden.device)
        stream.wait_event(received.ready)
        hidden.record_stream(stream)
    return hidden
