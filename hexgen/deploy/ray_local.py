"""A Ray instance of our own on this machine: loopback only, a token of its own, nothing left behind."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from hexgen.deploy.facts import debugging
from hexgen.deploy.ray_processes import children_about, descendants, end_processes, process_exists
from hexgen.errors import DeploymentError

LOOPBACK = "127.0.0.1"
# hexgen moves no tensors through Ray's object store; Ray refuses less than 75 MiB.
OBJECT_STORE_BYTES = 80 * 1024 * 1024
SESSION_PREFIX = "hexgen-ray-"
# A Unix socket's path holds 107 characters, of which Ray's own part takes some 65.
LONGEST_TEMP_ROOT = 16
EXIT_GRACE_S = 5.0
LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": None,
    "RAY_USAGE_STATS_ENABLED": "0",
    # Despite its name, "0" is what makes Ray use 127.0.0.1 as the node's address on every system, and with
    # that address gcs_server, raylet and the workers listen on loopback instead of on all interfaces.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
# Workers are started for the actors alone, not ahead of time for tasks that never come.
LOCAL_SETTINGS = {"prestart_worker_first_driver": False}

_folders: list[
    Path
] = []  # of this process's instances: Ray has the first one's token and log folder in its memory


@dataclass(frozen=True, slots=True)
class LocalRay:
    """The processes, files and environment of a running instance."""

    address: str
    node: Any
    folder: Path
    environment: dict[str, str | None]  # to restore

    def end(self) -> None:
        """After ``ray.shutdown()``: end every process of the instance and remove its files."""
        _end(self.node, self.folder, self.environment)


def start_local_ray(cpus: int | None) -> LocalRay:
    """Start a head node and connect to it; ``cpus`` (default: the machine's) is what it offers.

    ``ray.init()`` by itself would start three helpers more (dashboard server, autoscaler, log monitor), which take
    most of its start-up time and serve nobody here. This does what ``ray start`` does with them switched off.
    """
    imported = "ray" in sys.modules
    environment = _set_environment({**LOCAL_ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    folder = _session_folder()
    node: Any = None
    try:
        import ray

        constants: Any = import_module("ray._private.ray_constants")
        if imported:
            forget_token()
            constants.ENABLE_RAY_CLUSTER = False  # Ray read the variable when it was imported
        _folders.append(folder)
        logging.getLogger("ray").setLevel(logging.ERROR)
        parameters = import_module("ray._private.parameter").RayParams(
            node_ip_address=LOOPBACK,
            num_cpus=cpus,
            include_dashboard=False,
            no_monitor=True,
            include_log_monitor=False,
            object_store_memory=OBJECT_STORE_BYTES,
            temp_dir=str(folder / "ray"),
            min_worker_port=0,
            max_worker_port=0,
            _system_config=LOCAL_SETTINGS,
        )
        node = _start_node(parameters)
        ray.init(address=node.gcs_address, log_to_driver=False, logging_level=logging.ERROR)
    except BaseException as error:  # Ctrl-C too: whatever has started must end
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        _end(node, folder, environment)
        if isinstance(error, Exception):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DeploymentError(f"a local Ray instance did not start: {reason}") from error
        raise
    return LocalRay(str(node.gcs_address), node, folder, environment)


def forget_token_of_local_instance() -> None:
    """Before a cluster is joined: the token of an instance that ended must not be offered to it."""
    if _folders:
        forget_token()


def forget_token() -> None:
    """Make Ray read its settings and its token from the environment again."""
    raylet: Any = import_module("ray._raylet")
    raylet.Config.initialize("")  # the mode first: a thread that still drains must not miss a token that is gone
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _start_node(parameters: Any) -> Any:
    """Ray has the kernel kill its processes when the *thread* that started them ends: that must not be early."""
    node_class = quiet_node_class()

    def start() -> Any:
        with _own_sessions():
            return node_class(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)

    if threading.current_thread() is threading.main_thread():
        return start()
    outcome: Future[Any] = Future()

    def start_and_stay() -> None:
        try:
            outcome.set_result(start())
        except BaseException as error:  # noqa: BLE001 - it is the caller's, who waits for it
            outcome.set_exception(error)
        else:
            threading.Event().wait()

    threading.Thread(target=start_and_stay, name="hexgen-ray", daemon=True).start()
    return outcome.result()


@contextmanager
def _own_sessions() -> Iterator[None]:
    """Ray's processes get sessions of their own.

    In ours, a signal to our whole process group (``timeout``, a CI runner, a terminal) would end Ray under the
    workers that we are about to stop in good order, and every call to it would then wait for its time-out.
    """
    services: Any = import_module("ray._private.services")
    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def quiet_node_class() -> Any:
    """Ray's node, without what serves a dashboard. Ray must have been configured by the environment before."""
    base: Any = import_module("ray._private.node").Node

    class QuietNode(base):  # type: ignore[misc]
        def start_api_server(self, *arguments: object, **options: object) -> None:
            """No dashboard, not even the reduced one."""

    return QuietNode


def _end(node: Any, folder: Path, environment: dict[str, str | None]) -> None:
    try:
        # By what they were started with: an interrupted start has no node to ask.
        family = [process for pid in children_about(str(folder)) for process in descendants(pid)]
        if node is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        end_processes(family, EXIT_GRACE_S if node is not None else 0.0)
    finally:
        for path in {folder, *_folders}:  # a later instance's driver makes the first one's log folder again
            if not debugging():
                shutil.rmtree(path, ignore_errors=True)
        _set_environment(environment)


def _set_environment(values: dict[str, Any]) -> dict[str, str | None]:
    """Set (or, for None, remove) the variables; what they were before comes back."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


def _session_folder() -> Path:
    """A new folder for Ray's session, this user's alone (Ray opens its own to everybody).

    Folders of processes that were killed before they could clean up go at the same time.
    """
    root = Path(tempfile.gettempdir())
    if len(str(root)) > LONGEST_TEMP_ROOT:
        root = Path("/tmp")
    for stale in root.glob(f"{SESSION_PREFIX}*"):
        pid = stale.name.removeprefix(SESSION_PREFIX).partition("-")[0]
        if pid.isdigit() and not process_exists(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)  # another user's stays: permission denied
    return Path(tempfile.mkdtemp(prefix=f"{SESSION_PREFIX}{os.getpid()}-", dir=root))
