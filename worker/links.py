"""Direct sockets between ranks: what carries headers and small tensors.

gloo's own latency has a heavy tail: its polling thread may spin a whole scheduler slice (4 ms) while the thread
that it waits for has no core (docs/communication.md has the measurement). A blocking socket has no third
thread: the kernel wakes the reader when the bytes are there. So everything small goes this way, and gloo or
NCCL carry what is large. A closed socket is also how the death of a peer is noticed at once.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from torch._C._distributed_c10d import Store

from hexgen.errors import DeploymentError, EngineError
from hexgen.worker.latency import delayed

CONNECT_TIMEOUT_S = 120.0
_POLL_S = 0.02  # between looks at the store while a peer is still starting
_GREETING = struct.Struct("<I32s")  # rank, token
Buffer = bytes | bytearray | memoryview


def never() -> bool:
    return False


class Links:
    """One connected socket to each neighbour, by rank. Sends and receives block; one thread a direction."""

    def __init__(self, sockets: dict[int, socket.socket], name: str) -> None:
        self._sockets = sockets
        self._name = name

    @property
    def peers(self) -> tuple[int, ...]:
        return tuple(self._sockets)

    def socket(self, peer: int) -> socket.socket:
        return self._sockets[peer]

    def send(self, peer: int, *buffers: Buffer) -> None:
        """Write ``buffers`` one after the other. ``EngineError`` where the peer is gone."""
        try:
            send_all(self._sockets[peer], buffers)
        except OSError as error:
            raise self._gone(peer, error) from error

    def recv_into(self, peer: int, view: memoryview) -> None:
        """Fill ``view``. ``EngineError`` where the peer is gone."""
        connection = self._sockets[peer]
        try:
            while view:
                count = connection.recv_into(view)
                if not count:
                    raise self._gone(peer, None)
                view = view[count:]
        except OSError as error:
            raise self._gone(peer, error) from error

    def shutdown(self) -> None:
        """Wake whoever is blocked on one of the sockets, on either side."""
        for connection in self._sockets.values():
            with suppress(OSError):  # the peer may have closed first
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all sockets; nobody may be blocked on one any more."""
        for connection in self._sockets.values():
            connection.close()

    def _gone(self, peer: int, error: OSError | None) -> EngineError:
        cause = f": {error.strerror or error}" if error else ""
        return EngineError(f"rank {peer} has closed its connection{cause}", where=self._name)


def send_all(connection: socket.socket, buffers: Sequence[Buffer]) -> None:
    """``sendall`` over several buffers with one system call where they fit."""
    views = [memoryview(b) for b in buffers]
    sent = connection.sendmsg(views)
    for view in views:
        if sent >= len(view):
            sent -= len(view)
            continue
        connection.sendall(view[sent:])
        sent = 0


def connect_links(
    store: Store,
    name: str,
    rank: int,
    neighbours: Iterable[int],
    *,
    listen_host: str,
    cancelled: Callable[[], bool] = never,
) -> Links:
    """Connect to every neighbour; blocks until all of them are there, ``cancelled()`` or two minutes have passed.

    The lower rank listens, on its node's own address, and leaves port and a random token in the store; the higher
    rank connects and shows the token. ``name`` is the store's prefix and the place named in errors.
    """
    lower = [n for n in neighbours if n < rank]
    higher = {n for n in neighbours if n > rank}
    deadline = time.monotonic() + CONNECT_TIMEOUT_S

    def check(waiting_for: object) -> None:
        if cancelled():
            raise DeploymentError("stopped while it was connecting", where=name)
        if time.monotonic() > deadline:
            raise DeploymentError(
                f"rank {waiting_for} did not come within {CONNECT_TIMEOUT_S:.0f} s",
                where=name,
                remedy="see that rank's own error, and whether its node's ports can be reached from here",
            )

    sockets: dict[int, socket.socket] = {}
    family = socket.AF_INET6 if ":" in listen_host else socket.AF_INET
    try:
        if higher:
            with socket.create_server((listen_host, 0), family=family, backlog=len(higher)) as listener:
                token = secrets.token_hex(16)
                store.set(f"{name}/{rank}", json.dumps([listen_host, listener.getsockname()[1], token]))
                listener.settimeout(_POLL_S)
                while higher - sockets.keys():
                    check(min(higher - sockets.keys()))
                    with suppress(TimeoutError):
                        _accept(listener, token, higher, sockets)
        for peer in lower:
            key = f"{name}/{peer}"
            while not store.check([key]):
                check(peer)
                time.sleep(_POLL_S)
            sockets[peer] = _call(store.get(key), rank, name)
    except BaseException:
        Links(sockets, name).close()
        raise
    for connection in sockets.values():
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _notice_dead_nodes(connection)
    return Links({peer: delayed(sockets[peer]) for peer in sorted(sockets)}, name)


def _notice_dead_nodes(connection: socket.socket) -> None:
    """A killed process closes its sockets; a node that lost its power does not. Probe after 10 s, give up after
    30.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _accept(listener: socket.socket, token: str, expected: set[int], sockets: dict[int, socket.socket]) -> None:
    connection, _ = listener.accept()
    connection.settimeout(5.0)
    greeting = bytearray()
    with suppress(OSError):  # a stranger that says nothing, or hangs up
        while len(greeting) < _GREETING.size and (chunk := connection.recv(_GREETING.size - len(greeting))):
            greeting += chunk
    if len(greeting) == _GREETING.size:
        rank, shown = _GREETING.unpack(greeting)
        if hmac.compare_digest(shown, token.encode()) and rank in expected and rank not in sockets:
            sockets[rank] = connection
            return
    connection.close()


def _call(entry: bytes, rank: int, name: str) -> socket.socket:
    host, port, token = json.loads(entry)
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
    except OSError as error:
        raise DeploymentError(
            f"cannot connect to {host}:{port}: {error.strerror or error}",
            where=name,
            remedy="is the address of that node right, and open between the nodes?",
        ) from error
    connection.sendall(_GREETING.pack(rank, token.encode()))
    return connection
