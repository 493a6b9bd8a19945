"""A tiny synchronous client of a deployment's heads, and plans to try it on."""

from __future__ import annotations

import itertools
import socket
from collections import defaultdict
from collections.abc import Sequence

from hexgen.cluster import Cluster, DeviceType, Link, Node
from hexgen.deploy.base import RouteEndpoint
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.protocol import Abort, Frame, Hello, Refused, Stats, Submit, Tokens, Welcome, encode, recv_frame
from hexgen.request import SamplingParams, TokenEvent

TIMEOUT_S = 60.0
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


class EngineClient:
    """Speaks hexgen.protocol with one head. ``outputs``: tokens so far by sequence; ``finished``: why each
    ended.
    """

    def __init__(self, endpoint: RouteEndpoint, secret: str) -> None:
        self.socket = socket.create_connection((endpoint.host, endpoint.port), timeout=TIMEOUT_S)
        self.socket.sendall(encode(Hello(secret)))
        welcome = recv_frame(self.socket)
        assert isinstance(welcome, Welcome)
        self.welcome = welcome
        self.outputs: dict[int, list[int]] = defaultdict(list)
        self.events: dict[int, list[TokenEvent]] = defaultdict(list)
        self.finished: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        self.stats: Stats | None = None
        self._numbers = itertools.count()

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams = GREEDY,
        stop_token_ids: Sequence[int] = (),
        number: int | None = None,
    ) -> int:
        number = next(self._numbers) if number is None else number
        self.socket.sendall(encode(Submit(number, tuple(prompt), sampling, tuple(stop_token_ids))))
        return number

    def abort(self, *numbers: int) -> None:
        self.socket.sendall(encode(Abort(numbers)))

    def step(self) -> Frame:
        """Take in one frame; ConnectionError where the head has closed the connection."""
        frame = recv_frame(self.socket)
        if frame is None:
            raise ConnectionError("the head has closed the connection")
        if isinstance(frame, Tokens):
            for event in frame.events:
                assert event.request not in self.finished, "a token after the last"
                self.outputs[event.request].append(event.token)
                self.events[event.request].append(event)
                if event.finish_reason is not None:
                    self.finished[event.request] = event.finish_reason
        elif isinstance(frame, Refused):
            self.refused[frame.sequence] = frame.message
        elif isinstance(frame, Stats):
            self.stats = frame
        return frame

    def wait(self, *numbers: int) -> None:
        while not all(n in self.finished or n in self.refused for n in numbers):
            self.step()

    def wait_end(self) -> None:
        """Until the head closes the connection."""
        try:
            while True:
                self.step()
        except ConnectionError:
            return

    def wait_idle(self) -> Stats:
        """Until the head reports that nothing runs, waits or is in flight."""
        while True:
            frame = self.step()
            if isinstance(frame, Stats) and not (frame.running or frame.waiting or frame.in_flight):
                return frame

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams = GREEDY, stagger: int = 0
    ) -> list[list[int]]:
        """All outputs, in order. With ``stagger``, so many tokens arrive between one submission and the next."""
        numbers = []
        for prompt in prompts:
            numbers.append(self.submit(prompt, sampling))
            seen = sum(map(len, self.outputs.values()))
            while stagger and sum(map(len, self.outputs.values())) < seen + stagger:
                if all(n in self.finished for n in numbers):
                    break
                self.step()
        self.wait(*numbers)
        assert not self.refused
        return [self.outputs[n] for n in numbers]

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cpu_cluster(devices: int, memory_bytes: int = 2_000_000_000) -> Cluster:
    """One node ``n`` of CPU devices, one thread each."""
    cpu = DeviceType("cpu", memory_bytes, 10e9, 0.0, 50e9, 50e9, None, "cpu")
    link = Link(10e9, 10e-6)
    node = Node("n", cpu, devices, link, "cpu", threads=1)
    return Cluster("test", (node,), link)


def make_plan(
    cluster: Cluster,
    model: str,
    stages: Sequence[tuple[tuple[int, int], int] | tuple[tuple[int, int], Sequence[float]]],
    routes: Sequence[Sequence[tuple[int, tuple[int, int]]]] | None = None,
    *,
    kv_tokens: int | None = 1024,
    **engine: object,
) -> Plan:
    """Stages as (layers, width or shares), routes as [(stage index, layers), ...] (default: one over all
    stages).
    """
    device = itertools.count()
    made = []
    for i, (layers, width) in enumerate(stages):
        shares = None if isinstance(width, int) else tuple(float(w) for w in width)
        count = width if isinstance(width, int) else len(width)
        made.append(Stage(f"s{i}", layers, tuple(f"n/{next(device)}" for _ in range(count)), shares))
    if routes is None:
        routes = [[(i, stage.layers) for i, stage in enumerate(made)]]
    paths = [tuple(Hop(f"s{i}", layers) for i, layers in route) for route in routes]
    options = EngineOptions(**{"page_size": 4, "token_budget": 32, **engine})  # type: ignore[arg-type]
    return Plan(model, cluster, tuple(made), tuple(Route(path, 1.0, kv_tokens) for path in paths), options)
