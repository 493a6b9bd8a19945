"""The latency of a lab's links, as the engine's own edges and collectives show it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from hexgen.worker.communicator import DIRECT_BYTES, connect, connect_store, serve_store
from hexgen.worker.edge import EdgeReceiver, EdgeSender, open_edge
from hexgen.worker.framing import INLINE_BYTES, FrameKind
from hexgen.worker.latency import added_latency_s, as_if_apart
from hexgen.worker.links import never

HOST = "127.0.0.1"
CPU = torch.device("cpu")
LATENCY_S = 0.15


@pytest.fixture(autouse=True)
def far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hexgen.worker.latency._ADDED_S", {HOST: LATENCY_S})


def test_a_lab_s_own_address_can_be_had_as_if_it_were_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert added_latency_s("10.0.0.1") == 0
    with as_if_apart("10.0.0.1"):
        assert 0 < added_latency_s("10.0.0.1") < 1e-4
    assert added_latency_s("10.0.0.1") == 0
    with as_if_apart(HOST):
        assert added_latency_s(HOST) == LATENCY_S
    assert added_latency_s(HOST) == LATENCY_S
    monkeypatch.setattr("hexgen.worker.latency._ADDED_S", {})  # no lab
    with as_if_apart("10.0.0.1"):
        assert added_latency_s("10.0.0.1") == 0


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result(timeout=60) for f in [pool.submit(call) for call in calls]]


def test_steps_arrive_late_and_whole_while_the_sender_goes_on() -> None:
    store, port = serve_store(HOST)

    def end(side: int) -> EdgeSender | EdgeReceiver:
        return open_edge(
            connect_store(HOST, port), "edge", side, tensors=True, device=CPU, listen_host=HOST, cancelled=never
        )

    sender, receiver = at_once([lambda: end(0), lambda: end(1)])
    assert isinstance(sender, EdgeSender)
    assert isinstance(receiver, EdgeReceiver)
    receiver.expect(hidden_size=64, max_tokens=8192, dtype=torch.float32)
    steps = [
        (bytes([i]) * 100, torch.randn(rows, 64)) for i, rows in enumerate((1, 16, INLINE_BYTES // 256 + 1, 2))
    ]
    began = time.perf_counter()

    def send() -> float:
        for header, hidden in steps:
            sender.send_step(header, hidden)
        sent_after_s = time.perf_counter() - began
        sender.send_stop()
        return sent_after_s

    def receive() -> float:
        for header, hidden in steps:
            received = receiver.receive()
            if header[0] == 0:
                first_after_s = time.perf_counter() - began
            assert received.frame.header == header
            assert received.hidden is not None
            assert torch.equal(received.hidden, hidden)
        assert receiver.receive().frame.kind is FrameKind.STOP
        return first_after_s

    sent_after_s, first_after_s = at_once([send, receive])
    assert sent_after_s < LATENCY_S <= first_after_s
    at_once([sender.shutdown, receiver.shutdown])
    at_once([sender.close, receiver.close])
    del store


@pytest.mark.parametrize(("numbers", "hops"), [(16, 1), (DIRECT_BYTES // 4 + 1, 2)])
def test_an_all_reduce_takes_its_hops(numbers: int, hops: int) -> None:
    store, port = serve_store(HOST)

    def work(rank: int) -> float:
        communicator = connect(connect_store(HOST, port), "group", rank, 2, device=CPU, listen_host=HOST)
        communicator.all_reduce(torch.ones(1))  # both are there
        tensor = torch.full((numbers,), float(rank + 1))
        began = time.perf_counter()
        communicator.all_reduce(tensor)
        took_s = time.perf_counter() - began
        assert torch.equal(tensor, torch.full((numbers,), 3.0))
        communicator.close()
        return took_s

    # The slower of the two: the other may have been waited for.
    assert max(at_once([lambda: work(0), lambda: work(1)])) >= hops * LATENCY_S * 0.99
    del store
