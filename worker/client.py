"""The coordinator's connections to the head of a route."""

from __future__ import annotations

import hmac
import itertools
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from hexgen.errors import EngineError
from hexgen.protocol import MAX_HELLO_BYTES, Abort, Frame, Hello, Submit, Welcome, encode, recv_frame

MAX_CONNECTIONS = 16
MAX_BACKLOG_BYTES = 64 << 20  # unread answers; a client that lets more pile up is gone
_HANDSHAKE_S = 5.0
_ids = itertools.count()


class ClientConnection:
    """One coordinator. Sending never blocks: what the socket does not take at once, a writer thread finishes."""

    def __init__(self, connection: socket.socket) -> None:
        self.id = next(_ids)
        self.socket = connection
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None
        self._closed = False

    def send(self, frame: Frame) -> None:
        """Queue or send ``frame``. A broken connection is no error here: its reader reports it."""
        data = encode(frame)
        with self._changed:
            if self._closed:
                return
            if not self._backlog:
                try:
                    sent = self.socket.send(data, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    return
                if sent == len(data):
                    return
                data = data[sent:]
            self._backlog.append(data)
            self._backlog_bytes += len(data)
            if self._backlog_bytes > MAX_BACKLOG_BYTES:
                self._shut()
                return
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="hexgen-client-writer", daemon=True)
                self._writer.start()
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._shut()
        if self._writer is not None:
            self._writer.join()

    def _shut(self) -> None:
        self._closed = True
        self._backlog.clear()
        with suppress(OSError):  # the client may have closed first
            self.socket.shutdown(socket.SHUT_RDWR)
        self._changed.notify()

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._backlog and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                data = self._backlog[0]  # stays there while it is being sent, so that nothing overtakes it
            try:
                self.socket.sendall(data)
            except OSError:
                with self._changed:
                    self._shut()
                return
            with self._changed:
                if self._backlog:
                    self._backlog.popleft()
                    self._backlog_bytes -= len(data)


class ClientListener:
    """Accepts coordinators on the node's own address and reads what they send.

    ``on_join``, ``on_frame`` and ``on_leave`` are called from the connections' threads; they must only pass on.
    """

    def __init__(
        self,
        listen_host: str,
        secret: str,
        welcome: Welcome,
        *,
        on_join: Callable[[ClientConnection], None],
        on_frame: Callable[[ClientConnection, Submit | Abort], None],
        on_leave: Callable[[ClientConnection], None],
    ) -> None:
        family = socket.AF_INET6 if ":" in listen_host else socket.AF_INET
        self._listener = socket.create_server((listen_host, 0), family=family, backlog=MAX_CONNECTIONS)
        self.port: int = self._listener.getsockname()[1]
        self._secret = secret.encode()
        self._welcome = welcome
        self._on_join, self._on_frame, self._on_leave = on_join, on_frame, on_leave
        self._lock = threading.Lock()
        self._clients: dict[ClientConnection, threading.Thread] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="hexgen-client-listener", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Close every connection and end all threads."""
        with self._lock:
            self._closed = True
            clients = dict(self._clients)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        if self._thread.is_alive():
            self._thread.join()
        for client, thread in clients.items():
            client.close()
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                continue  # the peer was gone before it was accepted
            client = ClientConnection(connection)
            with self._lock:
                if self._closed or len(self._clients) >= MAX_CONNECTIONS:
                    connection.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(client,), name="hexgen-client", daemon=True)
                self._clients[client] = thread
                thread.start()

    def _serve(self, client: ClientConnection) -> None:
        try:
            if self._greet(client):
                self._on_join(client)
                try:
                    self._read(client)
                finally:
                    self._on_leave(client)
        finally:
            client.close()
            client.socket.close()
            with self._lock:
                self._clients.pop(client, None)

    def _greet(self, client: ClientConnection) -> bool:
        client.socket.settimeout(_HANDSHAKE_S)
        try:
            hello = recv_frame(client.socket, MAX_HELLO_BYTES)
        except (EngineError, OSError):
            return False
        if not isinstance(hello, Hello) or not hmac.compare_digest(str(hello.secret).encode(), self._secret):
            return False
        client.socket.settimeout(None)
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.send(self._welcome)
        return True

    def _read(self, client: ClientConnection) -> None:
        while True:
            try:
                frame = recv_frame(client.socket)
            except (EngineError, OSError):  # broken, or it sends nonsense: the connection ends, others go on
                return
            if frame is None:
                return
            if isinstance(frame, Submit | Abort):
                self._on_frame(client, frame)
