"""Latency and bandwidth between two nodes, over the engine's own edges (`hexgen.worker.edge`).

Two edges, one a direction, as two stages that follow each other have them. So whatever delays the engine's
messages delays these too: the network, the sockets' options, a laboratory's own latency in the sender.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch._C._distributed_c10d import Store

from hexgen.discover.records import Wire
from hexgen.discover.timing import least_quarter
from hexgen.errors import EngineError
from hexgen.worker.communicator import connect_store, serve_store
from hexgen.worker.edge import EdgeReceiver, EdgeSender, open_edge
from hexgen.worker.latency import as_if_apart

COLUMNS = 4096
CHUNK_ROWS = 64  # 1 MiB of float32: goes the large tensors' way
MOST_CHUNKS = 64
HEADER = bytes(64)
WARM_UP = 10
PING_S, MOST_PINGS = 0.4, 400
STREAM_S = 0.5
JOIN_TIMEOUT_S = 30.0
_SENDER, _RECEIVER = 0, 1


def wire_side(store: Store, name: str, side: int, listen_host: str, deadline: float) -> Wire | None:
    """Measure with the other side of ``name``; the first side (0) returns what was found, the second None.

    ``deadline`` of time.monotonic() bounds the wait for the other to come. Raises ``HexgenError``.
    """

    def cancelled() -> bool:
        return time.monotonic() > deadline

    def edge(direction: str, role: int) -> EdgeSender | EdgeReceiver:
        return open_edge(
            store,
            f"{name}/{direction}",
            role,
            tensors=True,
            device=torch.device("cpu"),
            listen_host=listen_host,
            cancelled=cancelled,
        )

    forth = edge("forth", _SENDER if side == 0 else _RECEIVER)
    try:
        back = edge("back", _RECEIVER if side == 0 else _SENDER)
    except BaseException:
        forth.close()
        raise
    sender, receiver = (forth, back) if side == 0 else (back, forth)
    out, into = cast(EdgeSender, sender), cast(EdgeReceiver, receiver)
    into.expect(hidden_size=COLUMNS, max_tokens=CHUNK_ROWS, dtype=torch.float32)
    try:
        if side == 0:
            return _ask(out, into)
        _answer(out, into)
        return None
    finally:
        forth.shutdown()
        back.shutdown()
        forth.close()
        back.close()


def _ask(out: EdgeSender, into: EdgeReceiver) -> Wire:
    def ping() -> float:
        started = time.perf_counter()
        out.send_step(HEADER, None)
        into.receive()
        return time.perf_counter() - started

    for _ in range(WARM_UP):
        ping()
    trips: list[float] = []
    began = time.perf_counter()
    while len(trips) < 3 or (time.perf_counter() - began < PING_S and len(trips) < MOST_PINGS):
        trips.append(ping())
    round_trip = least_quarter(trips)  # those that waited least for a core
    one_s = _sent_s(out, into, 1, round_trip)
    chunks = max(1, min(MOST_CHUNKS, int(STREAM_S / one_s)))
    there_s = _sent_s(out, into, chunks, round_trip)
    # The other direction: told by a header how many chunks to send.
    out.send_step(b"send" + chunks.to_bytes(4, "little"), None)
    into.receive()  # it begins
    started = time.perf_counter()
    for _ in range(chunks):
        into.receive()
    back_s = time.perf_counter() - started
    out.send_step(b"stop", None)
    size = chunks * CHUNK_ROWS * COLUMNS * 4
    return Wire(round_trip / 2, size / max(there_s, back_s), len(trips), size)


def _sent_s(out: EdgeSender, into: EdgeReceiver, chunks: int, round_trip: float) -> float:
    """Seconds until the other side has ``chunks`` of hidden states, less the way of its answer."""
    out.send_step(b"take" + chunks.to_bytes(4, "little"), None)
    into.receive()
    hidden = torch.zeros(CHUNK_ROWS, COLUMNS)
    started = time.perf_counter()
    for _ in range(chunks):
        out.send_step(HEADER, hidden)
    into.receive()
    spent = time.perf_counter() - started
    return max(spent - round_trip, spent / 2)


def _answer(out: EdgeSender, into: EdgeReceiver) -> None:
    hidden = torch.zeros(CHUNK_ROWS, COLUMNS)
    while True:
        header = into.receive().frame.header
        word, count = header[:4], int.from_bytes(header[4:8], "little")
        if word == b"stop":
            return
        out.send_step(HEADER, None)
        if word == b"take":
            for _ in range(count):
                into.receive()
            out.send_step(HEADER, None)
        elif word == b"send":
            for _ in range(count):
                out.send_step(HEADER, hidden)


def hop_s(host: str) -> float:
    """One way of a ping-pong between two threads of this process: what software adds to every message."""
    server, port = serve_store(host)
    deadline = time.monotonic() + JOIN_TIMEOUT_S

    def side(number: int) -> Wire | None:
        return wire_side(connect_store(host, port), "hop", number, host, deadline)

    with as_if_apart(host), ThreadPoolExecutor(2) as threads:
        sides: list[Callable[[], Wire | None]] = [threads.submit(side, number).result for number in (0, 1)]
        found = [result() for result in sides]
    del server
    if found[0] is None:
        raise EngineError("an edge to this node itself gave no answer")
    return found[0].one_way_s
