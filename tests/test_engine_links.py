"""Communicators and edges between threads over real sockets: every size takes its way, and strangers none."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import Store

from hexgen.errors import DeploymentError, EngineError
from hexgen.worker.communicator import (
    DIRECT_BYTES,
    Communicator,
    CpuCommunicator,
    HostStagedCommunicator,
    SoloCommunicator,
    connect,
    connect_store,
    serve_store,
)
from hexgen.worker.edge import EdgeReceiver, EdgeSender, open_edge
from hexgen.worker.framing import INLINE_BYTES, FrameKind
from hexgen.worker.links import Links, connect_links, never

HOST = "127.0.0.1"
CPU = torch.device("cpu")


@pytest.fixture
def store() -> tuple[Store, int]:
    return serve_store(HOST)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result(timeout=60) for f in [pool.submit(call) for call in calls]]


def group(port: int, size: int) -> list[Communicator]:
    def join(rank: int) -> Communicator:
        return connect(connect_store(HOST, port), "group", rank, size, device=CPU, listen_host=HOST)

    return at_once([lambda r=r: join(r) for r in range(size)])  # type: ignore[misc]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_collectives_of_every_size_and_dtype(store: tuple[Store, int], size: int) -> None:
    communicators = group(store[1], size)
    shapes = [(1,), (3, 5), (16, 256), (DIRECT_BYTES // 4,), (DIRECT_BYTES // 4 + 1,), (300, 400)]

    def work(rank: int) -> None:
        c = communicators[rank]
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
            for shape in shapes:
                mine = [torch.full(shape, r + 1).to(dtype) for r in range(size)]
                total = mine[rank].clone()
                c.all_reduce(total)
                assert torch.equal(total, torch.full(shape, size * (size + 1) // 2).to(dtype))
                assert all(torch.equal(a, b) for a, b in zip(c.all_gather(mine[rank]), mine, strict=True))
                told = mine[rank].clone()
                c.broadcast(told, size - 1)
                assert torch.equal(told, mine[size - 1])

    at_once([lambda r=r: work(r) for r in range(size)])
    for c in communicators:
        c.close()


def test_ranks_on_one_gpu_go_through_the_host(store: tuple[Store, int]) -> None:
    """The staging itself; tensors that are on the host already take the same way."""
    staged = [HostStagedCommunicator(c) for c in group(store[1], 2) if isinstance(c, CpuCommunicator)]

    def work(rank: int) -> None:
        c = staged[rank]
        x = torch.full((3, 2), float(rank + 1))
        assert [float(part[0, 0]) for part in c.all_gather(x)] == [1.0, 2.0]
        c.broadcast(x, 1)
        assert torch.equal(x, torch.full((3, 2), 2.0))
        c.all_reduce(x)
        assert torch.equal(x, torch.full((3, 2), 4.0))
        if rank == 0:
            c.send(x, 1)
        else:
            y = torch.zeros(3, 2)
            c.recv(y, 0)
            assert torch.equal(x, y)

    at_once([lambda r=r: work(r) for r in range(2)])
    for c in staged:
        c.close()


def test_all_ranks_hold_the_same_bits_after_a_sum(store: tuple[Store, int]) -> None:
    communicators = group(store[1], 4)
    parts = [torch.randn(64, 64, generator=torch.Generator().manual_seed(r)) * 10.0**r for r in range(4)]
    at_once([lambda r=r: communicators[r].all_reduce(parts[r]) for r in range(4)])
    assert all(torch.equal(parts[0], part) for part in parts)
    for c in communicators:
        c.close()


def test_many_collectives_in_a_row_with_ranks_out_of_step(store: tuple[Store, int]) -> None:
    communicators = group(store[1], 3)

    def work(rank: int) -> torch.Tensor:
        total = torch.ones(DIRECT_BYTES // 4)
        for i in range(60):
            if i % 3 == rank:
                time.sleep(0.002)
            communicators[rank].all_reduce(total)
            total /= 3
        return total

    assert all(
        torch.equal(t, torch.ones(DIRECT_BYTES // 4)) for t in at_once([lambda r=r: work(r) for r in range(3)])
    )
    for c in communicators:
        c.close()


def test_a_closed_peer_is_an_error_at_once(store: tuple[Store, int]) -> None:
    first, second = group(store[1], 2)
    closer = threading.Timer(0.1, second._links.shutdown)  # type: ignore[attr-defined]
    closer.start()
    with pytest.raises(EngineError, match="rank 1"):
        first.all_reduce(torch.ones(4))
    closer.join()
    first.close()
    second.close()


def test_a_group_of_one_needs_nobody() -> None:
    solo = SoloCommunicator()
    x = torch.ones(3)
    solo.all_reduce(x)
    assert torch.equal(solo.all_gather(x)[0], torch.ones(3))


def test_waiting_for_a_rank_that_never_comes_can_be_given_up(store: tuple[Store, int]) -> None:
    given_up = threading.Event()
    threading.Timer(0.2, given_up.set).start()
    with pytest.raises(DeploymentError, match="stopped"):
        connect_links(store[0], "nobody", 0, (0, 1), listen_host=HOST, cancelled=given_up.is_set)


def test_a_stranger_cannot_take_a_rank_s_place(store: tuple[Store, int]) -> None:
    import json

    results: list[Links] = []
    thread = threading.Thread(
        target=lambda: results.append(connect_links(store[0], "pair", 0, (0, 1), listen_host=HOST))
    )
    thread.start()
    other = connect_store(HOST, store[1])
    host, port, _ = json.loads(other.get("pair/0"))
    with socket.create_connection((host, port)) as stranger:
        stranger.sendall((1).to_bytes(4, "little") + b"0" * 32)
        assert stranger.recv(1) == b""  # hung up on
    mine = connect_links(other, "pair", 1, (0, 1), listen_host=HOST)
    thread.join()
    mine.send(0, b"it is me")
    got = bytearray(8)
    results[0].recv_into(1, memoryview(got))
    assert bytes(got) == b"it is me"
    for links in (mine, results[0]):
        links.close()


def test_everything_listens_on_the_given_address_only(store: tuple[Store, int]) -> None:
    psutil = pytest.importorskip("psutil")
    communicators = group(store[1], 2)
    listening = {c.laddr.ip for c in psutil.Process().net_connections(kind="inet") if c.status == "LISTEN"}
    assert listening == {HOST}
    for c in communicators:
        c.close()


@pytest.mark.parametrize("tensors", [True, False])
def test_an_edge_carries_steps_small_and_large_in_order(store: tuple[Store, int], tensors: bool) -> None:
    def end(side: int) -> EdgeSender | EdgeReceiver:
        return open_edge(
            connect_store(HOST, store[1]),
            "edge",
            side,
            tensors=tensors,
            device=CPU,
            listen_host=HOST,
            cancelled=never,
        )

    sender, receiver = at_once([lambda: end(0), lambda: end(1)])
    assert isinstance(sender, EdgeSender)
    assert isinstance(receiver, EdgeReceiver)
    receiver.expect(hidden_size=64, max_tokens=8192, dtype=torch.float32)
    rows = (1, 16, 0, INLINE_BYTES // 256, INLINE_BYTES // 256 + 1, 8192, 2) if tensors else (0, 0)
    sent = [(bytes([i]) * (i * 1000), torch.randn(n, 64) if n else None) for i, n in enumerate(rows)]

    def send() -> None:
        for header, hidden in sent:
            if tensors:
                sender.send_step(header, hidden)
            else:
                sender.send_tokens(header)
        sender.send_stop()

    thread = threading.Thread(target=send)
    thread.start()
    for header, hidden in sent:
        received = receiver.receive()
        assert received.frame.header == header
        assert (received.hidden is None) == (hidden is None)
        if hidden is not None and received.hidden is not None:
            assert torch.equal(received.hidden, hidden)
    assert receiver.receive().frame.kind is FrameKind.STOP
    thread.join()
    sender.close()
    with pytest.raises(EngineError, match="closed"):
        receiver.receive()
    receiver.close()
