"""Latency that is not there: a laboratory's links, on kernels that cannot delay packets (no ``netem``).

``hexgen lab`` sets ``HEXGEN_LAB_LATENCY`` in the environment of each of its nodes: seconds by the address of the
other node. Whoever sends between ranks then hands its bytes to a thread of its own, which writes them to the
socket when they are due; the sender goes on at once, as it would if the bytes were on a wire. Everywhere else
nothing is set, and nothing here runs.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

VARIABLE = "HEXGEN_LAB_LATENCY"
# Beyond the latency: how long a closing socket waits for what is still under way, if the peer does not read.
_DRAIN_S = 2.0
_LEAST_S = 1e-6


def latency_setting(by_address: Mapping[str, float]) -> str:
    """The variable's text; links without latency are left out."""
    return ",".join(f"{address}={seconds:.9g}" for address, seconds in by_address.items() if seconds > 0)


def parse_setting(text: str) -> dict[str, float]:
    """Seconds by address. ``ValueError`` on anything that ``latency_setting`` does not write."""
    pairs = (part.rpartition("=") for part in text.split(",") if part)
    found = {address: float(seconds) for address, _, seconds in pairs}
    if not all(address and 0 < seconds < 60 for address, seconds in found.items()):
        raise ValueError(f"{VARIABLE} is to be ADDRESS=SECONDS,...")
    return found


_ADDED_S = parse_setting(os.environ.get(VARIABLE, ""))  # read once


def added_latency_s(address: str) -> float:
    """What is added to each message from here to ``address``; 0.0 outside of a lab."""
    return _ADDED_S.get(address, 0.0)


def latency_to_peer_s(connection: socket.socket) -> float:
    """What is added on the link to whoever is at the other end; 0.0 outside of a lab."""
    return added_latency_s(connection.getpeername()[0]) if _ADDED_S else 0.0


@contextmanager
def as_if_apart(address: str) -> Iterator[None]:
    """In a lab, connections made to ``address`` meanwhile send as those to other nodes do, through a thread that
    costs processor time; with no latency to speak of. For whoever measures that time.
    """
    if not _ADDED_S or address in _ADDED_S:
        yield
        return
    _ADDED_S[address] = _LEAST_S
    try:
        yield
    finally:
        del _ADDED_S[address]


def delayed(connection: socket.socket) -> socket.socket:
    """``connection`` itself, or in a lab the same connection with the latency of its link."""
    latency_s = latency_to_peer_s(connection)
    return DelayedSocket(connection, latency_s) if latency_s else connection


class DelayedSocket(socket.socket):
    """A connected socket whose sends return at once and arrive ``latency_s`` later; takes ``connection`` over.

    Bytes keep their order; how many may be under way is left to the caller, who waits for answers. A send that
    broke is raised by the next one. ``shutdown`` and ``close`` first let arrive what is under way, within two
    seconds more than the latency.
    """

    def __init__(self, connection: socket.socket, latency_s: float) -> None:
        super().__init__(connection.family, connection.type, connection.proto, fileno=connection.detach())
        self._latency_s = latency_s
        self._queue: deque[tuple[float, bytes]] = deque()
        self._changed = threading.Condition()
        self._broken: OSError | None = None
        self._ending = False
        self._thread = threading.Thread(target=self._deliver, name="hexgen-latency", daemon=True)
        self._thread.start()

    def sendmsg(self, buffers: Iterable[Any], *_: Any, **__: Any) -> int:
        data = b"".join(buffers)  # a copy: the caller may use its buffers again
        with self._changed:
            if self._broken is not None:
                raise self._broken
            self._queue.append((time.monotonic() + self._latency_s, data))
            self._changed.notify_all()
        return len(data)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        self.sendmsg([data])

    def shutdown(self, how: int, /) -> None:
        self._drain()
        super().shutdown(how)

    def close(self) -> None:
        if not self._ending:
            self._drain()
            with self._changed:
                self._ending = True
                self._changed.notify_all()
        super().close()

    def _drain(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._queue or self._broken, self._latency_s + _DRAIN_S)

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ending)
                if self._ending:
                    return
                due, data = self._queue[0]  # stays there until it has been sent, so that a drain waits for it
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                super().sendall(data)
            except OSError as error:
                with self._changed:
                    self._broken = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._queue.popleft()
                self._changed.notify_all()
