"""The driver's connection: to a Ray cluster that runs already, or to a local instance of its own."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hexgen.deploy.ray_local import (
    LOOPBACK,
    LocalRay,
    forget_token_of_local_instance,
    start_local_ray,
)
from hexgen.errors import DeploymentError


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
    import ray

    forget_token_of_local_instance()
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with keeping_sigterm():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DeploymentError(
            f"cannot join this Ray cluster: {lines[0]}",
            where=f"Ray at {address}",
            remedy="check `ray status` there; this machine must be one of its nodes (`ray start --address=...`), "
            "and where the cluster uses tokens, RAY_AUTH_MODE=token and the cluster's token must be set here",
        ) from error
    connection = RayConnection(address, _node_address(), None, owned=True)
    atexit.register(connection.close)
    return connection


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
