"""The driver's connection: to a Ray cluster that runs already, or to a local instance of its own."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from hexgen.deploy.ray_local import (
    LOOPBACK,
    LocalRay,
    forget_token_of_local_instance,
    start_local_ray,
)
from hexgen.errors import DeploymentError

REACH_TIMEOUT_S = 5.0


@dataclass(slots=True)
class RayConnection:
    """``host`` is this process's address as the workers see it."""

    address: str
    host: str
    local: LocalRay | None  # the instance we started, if any
    owned: bool  # False: the caller had connected before, so it is theirs to end
    _closed: bool = False

    def close(self) -> None:
        """Disconnect; a local instance ends with all of its processes and files. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if not self.owned:
            return
        import ray

        try:
            ray.shutdown()
        finally:
            if self.local is not None:
                self.local.end()


def connect_ray(address: str | None = None, *, cpus: int | None = None) -> RayConnection:
    """Join the cluster at ``address`` (default: ``RAY_ADDRESS``); start a local instance where there is neither.

    ``cpus`` is what a local instance offers (default: what the machine has); a cluster decides for itself.
    Raises ``DeploymentError`` where the cluster cannot be joined or the instance does not come up.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return _existing(address)
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None or address == "local":
        with keeping_sigterm():
            local = start_local_ray(cpus)
        connection = RayConnection(local.address, LOOPBACK, local, owned=True)
        atexit.register(connection.close)
        return connection
    if "://" in address:
        raise DeploymentError(
            "a Ray client address cannot carry the engine's own connections",
            where=address,
            remedy="run this on a machine of the cluster and give HOST:PORT of its head node",
        )
    return _join(address)


def _existing(address: str | None) -> RayConnection:
    import ray

    current = str(ray.get_runtime_context().gcs_address)
    if address not in (None, "auto", "local", current):
        raise DeploymentError(
            f"this process is connected to another Ray cluster already, {current}",
            where=address,
            remedy="call ray.shutdown() first, or leave the address out",
        )
    return RayConnection(current, _node_address(), None, owned=False)


def _join(address: str) -> RayConnection:
    _check_reachable(address)
    import ray

    forget_token_of_local_instance()
    logging.getLogger("ray").setLevel(logging.ERROR)
    with tempfile.TemporaryFile() as said:
        try:
            with keeping_sigterm(), _native_stderr_to(said):
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
            said.seek(0)
            wrong_token = b"InvalidAuthToken" in said.read()
            reason = "it wants another token than this process has" if wrong_token else str(error)
            raise _cannot_join(address, reason) from error
    connection = RayConnection(address, _node_address(), None, owned=True)
    atexit.register(connection.close)
    return connection


def _check_reachable(address: str) -> None:
    """Ray itself would try for many minutes before it says that nobody is there."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit() or int(port) > 65535:
        raise DeploymentError("is no HOST:PORT", where=f"Ray at {address}", remedy="for example 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        raise _cannot_join(address, error.strerror or str(error)) from error


def _cannot_join(address: str, reason: str) -> DeploymentError:
    lines = reason.strip().splitlines() or ["no reason given"]
    return DeploymentError(
        f"cannot join this Ray cluster: {lines[0]}",
        where=f"Ray at {address}",
        remedy="check `ray status` there; this machine must be one of its nodes (`ray start --address=...`), and "
        "where the cluster uses tokens, RAY_AUTH_MODE=token and the cluster's token must be set here",
    )


@contextmanager
def _native_stderr_to(file: IO[bytes]) -> Iterator[None]:
    """Ray's C++ part writes each of its many retries straight to file descriptor 2, and no setting stops it."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Ray installs a SIGTERM handler of its own when it connects; put the process's back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _node_address() -> str:
    import ray

    utilities: Any = ray.util
    return str(utilities.get_node_ip_address())
