"""Both servers in one event loop: ready, serving, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from hexgen.coordinator.coordinator import Coordinator
from hexgen.errors import DeploymentError, SpecError
from hexgen.server.body import MAX_BODY_BYTES
from hexgen.server.grpc_server import GrpcServer
from hexgen.server.http import build_app

log = logging.getLogger("hexgen.server")

_BACKLOG = 2048
_HEALTH_EVERY_S = 0.5
_CLOSE_S = 2.0  # for connections to close once their answers are out


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where to listen and whom to answer. Ports of 0 take any free one."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 50051
    api_key: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain_s: float = 5.0  # running requests may finish for so long at the end; then they are aborted
    max_body_bytes: int = MAX_BODY_BYTES


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: whoever calls ``serve`` decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    coordinator: Coordinator,
    options: ServeOptions,
    stop: asyncio.Event,
    on_ready: Callable[[str, str], None] | None = None,
) -> None:
    """Answer over HTTP and gRPC until ``stop`` is set.

    ``on_ready`` is called once with both addresses (``host:port``) when requests are answered. The coordinator
    must have been started, and is drained but not closed. ``DeploymentError`` where a port is busy.
    """
    tls = _read_tls(options)
    http_socket = _listen(options.host, options.port)
    try:
        grpc_server = GrpcServer(coordinator, options.host, options.grpc_port, api_key=options.api_key, tls=tls)
        http_server = _HttpServer(_http_config(coordinator, options))
        await grpc_server.start()
        http_task = asyncio.create_task(http_server.serve(sockets=[http_socket]))
        try:
            while not http_server.started and not http_task.done():
                await asyncio.sleep(0.005)
            if not http_task.done():
                _warn_if_open(options)
                if on_ready is not None:
                    http_port = http_socket.getsockname()[1]
                    on_ready(_address(options.host, http_port), _address(options.host, grpc_server.port))
                await _until(stop, http_task, grpc_server)
        finally:
            await coordinator.drain(options.drain_s)
            await grpc_server.refresh_health()
            http_server.should_exit = True
            await asyncio.gather(grpc_server.stop(_CLOSE_S), http_task)
    finally:
        http_socket.close()


async def _until(stop: asyncio.Event, http_task: asyncio.Task[None], grpc_server: GrpcServer) -> None:
    stopped = asyncio.create_task(stop.wait())
    try:
        while not stopped.done() and not http_task.done():
            await asyncio.wait((stopped, http_task), timeout=_HEALTH_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            await grpc_server.refresh_health()
    finally:
        stopped.cancel()


def _http_config(coordinator: Coordinator, options: ServeOptions) -> uvicorn.Config:
    return uvicorn.Config(
        build_app(coordinator, options.api_key, options.max_body_bytes),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        timeout_graceful_shutdown=round(_CLOSE_S),
        backlog=_BACKLOG,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything starts so that a busy port is found at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise DeploymentError(
            f"cannot listen for HTTP: {error}",
            where=_address(host, port),
            remedy="choose another with --host and --port (0 takes any free one)",
        ) from error
    listener.setblocking(False)
    return listener


def _read_tls(options: ServeOptions) -> tuple[bytes, bytes] | None:
    if options.tls_cert is None and options.tls_key is None:
        return None
    if options.tls_cert is None or options.tls_key is None:
        raise SpecError("TLS needs both a certificate and a key", remedy="give --tls-cert and --tls-key")
    try:
        pair = options.tls_cert.read_bytes(), options.tls_key.read_bytes()
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=str(error.filename)) from error
    try:
        # An encrypted key fails here rather than asking for its password on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_cert, options.tls_key, password="")
    except ssl.SSLError as error:
        raise SpecError(
            f"not a TLS certificate and its key: {error.reason or error}",
            where=f"{options.tls_cert}, {options.tls_key}",
            remedy="both must be PEM, the key unencrypted, and belong together",
        ) from error
    return pair


def _warn_if_open(options: ServeOptions) -> None:
    try:
        loopback = ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        loopback = options.host == "localhost"
    if not loopback and options.api_key is None:
        log.warning("%s is reachable by others, and no API key is set", options.host)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
