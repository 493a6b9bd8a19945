"""What the engine's own loop costs beside the model: forming batches and answering, and passing steps on.

A route of one stage and a route of two run here as they do in service (`hexgen.worker`): loops, heads, edges over
sockets, receiver threads. Only the model computes nothing: it reads memory instead, as layers leave nothing else
in its caches. What is counted is the processor time of each stage's own threads, less that reading: neither
the client's nor other programs' is in it.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue

import torch

from hexgen.batching.segments import SampledToken, Step
from hexgen.discover.alone import PAGE_SIZE, TOKEN_BUDGET, solo_config
from hexgen.errors import EngineError
from hexgen.model import DType, ModelSpec
from hexgen.protocol import Hello, Submit, Tokens, Welcome, encode, recv_frame
from hexgen.request import SamplingParams
from hexgen.worker.checkpoint import torch_dtype
from hexgen.worker.communicator import serve_store
from hexgen.worker.config import EdgeSpec, RankConfig, RouteRole
from hexgen.worker.connections import Connections, open_connections
from hexgen.worker.head import RouteHead
from hexgen.worker.latency import as_if_apart
from hexgen.worker.report import StepClock
from hexgen.worker.stage import Event, LeaderLoop, Stopped, receive_into
from hexgen.worker.step_runner import StepResult

PROMPT_TOKENS = 8
SWEPT_BYTES = 4 << 20  # beyond what a core's own caches hold
WARM_UP_S, WINDOW_S = 0.1, 0.3
LIMIT_S = 20.0  # for connecting, and for each answer of a head


@dataclass(frozen=True, slots=True)
class LoopTimes:
    """Processor seconds of one step, by sequences in it. ``batching``: of the head, which every first stage has.
    ``passing``: of a stage that takes a step from another and passes its outcome on.
    """

    sequences: tuple[int, ...]
    batching: tuple[float, ...]
    passing: tuple[float, ...]


def loop_times(model: ModelSpec, dtype: DType, host: str, sequences: Sequence[int]) -> LoopTimes:
    """Takes about a second for each of ``sequences``. Raises ``HexgenError`` where a connection breaks."""
    batching, passing = [], []
    for count in sequences:
        (alone,) = _run(model, dtype, host, count, 1)
        first, last = _run(model, dtype, host, count, 2)
        batching.append(alone)
        # Both ends of a route take one message and send one; a first stage has its head's work besides.
        passing.append(max(0.0, (last + max(0.0, first - alone)) / 2))
    return LoopTimes(tuple(sequences), tuple(batching), tuple(passing))


class _Idle:
    """In place of a `StepRunner`: the shapes of its results, and nothing computed."""

    def __init__(self, model: ModelSpec, dtype: DType, samples: bool) -> None:
        self.clock = StepClock()
        self.swept_s = 0.0  # processor time of reading memory
        self._width, self._dtype, self._samples = model.hidden_size, torch_dtype(dtype), samples
        self._memory = torch.zeros(SWEPT_BYTES // 4)

    def run(self, step: Step, hidden: torch.Tensor | None) -> StepResult:
        if not step.segments:
            return StepResult(None, ())
        before = time.thread_time()
        self._memory.add_(1.0)
        self.swept_s += time.thread_time() - before
        if self._samples:
            return StepResult(None, tuple(SampledToken(segment.sequence, 1) for segment in step.sampled))
        return StepResult(torch.zeros(step.tokens, self._width, dtype=self._dtype), ())


class _Stage:
    """One stage's loop and its threads."""

    def __init__(self, config: RankConfig) -> None:
        self.config = config
        role = config.routes[0]
        self.connections: Connections = open_connections(config, lambda: False)
        self._inbox: SimpleQueue[Event] = SimpleQueue()
        self.runner = _Idle(config.model, config.dtype, role.samples)
        self.head = RouteHead(config, role, self._inbox.put) if role.embeds else None
        self.threads: list[threading.Thread] = []
        self.carrying: list[threading.Thread] = []  # of connections, until these are closed

    def start(self) -> None:
        before = set(threading.enumerate())
        config = self.config
        for receiver in self.connections.receivers:
            self._spawn(partial(receive_into, receiver, self._inbox))
        heads = {0: self.head} if self.head is not None else {}
        loop = LeaderLoop(
            self.runner,  # type: ignore[arg-type]
            {role.route: role for role in config.routes},
            heads,
            self.connections.senders,
            None,
            self._inbox,
        )
        if self.head is not None:
            self.head.open()
        self._spawn(loop.run)
        self.threads = [thread for thread in threading.enumerate() if thread not in before]

    def _spawn(self, work: partial[None] | object) -> None:
        def guarded() -> None:
            try:
                work()  # type: ignore[operator]
            except EngineError:
                return  # the other side has closed: the measurement is over

        threading.Thread(target=guarded, daemon=True).start()

    def stop(self) -> None:
        self._inbox.put(Stopped())
        if self.head is not None:
            self.head.close()
        self.connections.shutdown()
        for thread in self.threads:
            thread.join(LIMIT_S)
        self.connections.close()


def _run(model: ModelSpec, dtype: DType, host: str, count: int, stages: int) -> tuple[float, ...]:
    """Processor seconds a step of each stage, with ``count`` sequences in a step."""
    store, port = serve_store(host)
    configs = _configs(model, dtype, host, port, count, stages)
    before = set(threading.enumerate())
    with as_if_apart(host), ThreadPoolExecutor(stages) as pool:
        made = list(pool.map(_Stage, configs))
    # A lab's. Half of them are the other stage's, which makes no difference: the sum of both is what counts.
    made[0].carrying = [thread for thread in threading.enumerate() if thread not in before]
    try:
        for stage in made:
            stage.start()
        return _measured(made, host, configs[0].secret, count * stages)
    finally:
        for stage in made:
            stage.stop()
        del store


def _configs(
    model: ModelSpec, dtype: DType, host: str, port: int, count: int, stages: int
) -> tuple[RankConfig, ...]:
    names = ("a", "b")[:stages]
    deployment, secret = secrets.token_hex(8), secrets.token_hex(16)
    pages = stages * count * -(-model.max_context // PAGE_SIZE)
    found = []
    for number, name in enumerate(names):
        first, last = number == 0, number == stages - 1
        role = RouteRole(0, (0, 1), pages, stages, first, last, None if last else "b", names[-1], "a")
        edges: tuple[EdgeSpec, ...] = ()
        if stages == 2:
            other = names[1 - number]
            edges = (
                EdgeSpec("a>b:hidden", other, number, "hidden"),
                EdgeSpec("b>a:tokens", other, 1 - number, "tokens"),
            )
        found.append(
            replace(
                solo_config(model, dtype, "cpu", 1, layers=1, pages=pages, max_sequences=stages * count),
                deployment=deployment,
                stage=name,
                routes=(role,),
                edges=edges,
                token_budget=max(TOKEN_BUDGET, count * PROMPT_TOKENS),
                store_host=host,
                store_port=port,
                listen_host=host,
                secret=secret,
            )
        )
    return tuple(found)


def _measured(made: Sequence[_Stage], host: str, secret: str, sequences: int) -> tuple[float, ...]:
    head = made[0].head
    if head is None:
        raise EngineError("the first stage has no head")
    before = set(threading.enumerate())
    with socket.create_connection((host, head.port), timeout=LIMIT_S) as client:
        client.sendall(encode(Hello(secret)))
        if not isinstance(recv_frame(client), Welcome):
            raise EngineError("the head did not welcome its client")
        made[0].threads += [thread for thread in threading.enumerate() if thread not in before]
        longest = made[0].config.max_context - PROMPT_TOKENS
        sampling = SamplingParams(max_tokens=longest, temperature=0.0, ignore_eos=True)
        number = 0

        def submit() -> None:
            nonlocal number
            client.sendall(encode(Submit(number, (1,) * PROMPT_TOKENS, sampling)))
            number += 1

        def serve(seconds: float) -> None:
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                frame = recv_frame(client)
                if frame is None:
                    raise EngineError("the head has ended")
                if isinstance(frame, Tokens):
                    for event in frame.events:
                        if event.finish_reason is not None:
                            submit()

        for _ in range(sequences):
            submit()
        serve(WARM_UP_S)
        spent, steps = [_spent_s(stage) for stage in made], [stage.runner.clock.steps for stage in made]
        serve(WINDOW_S)
        return tuple(
            (_spent_s(stage) - s) / max(1, stage.runner.clock.steps - n)
            for stage, s, n in zip(made, spent, steps, strict=True)
        )


def _spent_s(stage: _Stage) -> float:
    """Processor time of all of the stage's threads so far, less the reading of memory."""
    spent_s = sum(
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in (*stage.threads, *stage.carrying)
        if thread.ident is not None and thread.is_alive()
    )
    return spent_s - stage.runner.swept_s
