"""Fixtures that several test files share. Everything heavy is imported by the fixture that needs it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Tests run beside one another on few cores; more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

RAY_NODES = {"big": 3, "mid": 1, "small": 1}  # name: CPUs; the first is the head


class RayCluster:
    """Three real Ray nodes on this machine, each with its own raylet, on loopback, with token authentication."""

    def __init__(self, cluster: Any, environment: dict[str, str]) -> None:
        self.cluster = cluster
        self.address = str(cluster.address)
        self.environment = environment  # what a process needs to join


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    folder = Path(tempfile.mkdtemp(prefix="hgt-"))  # short: Unix sockets live below it
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(folder),
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    import ray
    import ray._private.ray_constants as constants
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

    from hexgen.deploy.ray_local import LOCAL_SETTINGS, LOOPBACK, forget_token

    forget_token()
    constants.ENABLE_RAY_CLUSTER = False  # type: ignore[assignment]
    # The dashboard's server starts even where the dashboard is off, and takes as long as a node.
    patch = pytest.MonkeyPatch()
    patch.setattr(Node, "start_api_server", lambda *_, **__: None)
    common = {"node_ip_address": LOOPBACK, "object_store_memory": 80 * 1024 * 1024, "include_log_monitor": False}
    head = {"include_dashboard": False, "no_monitor": True, "_system_config": LOCAL_SETTINGS}
    cluster = Cluster()
    try:
        for name, cpus in RAY_NODES.items():
            fields = common | (head if cluster.head_node is None else {})
            cluster.add_node(num_cpus=cpus, labels={"hexgen.node": name}, **fields)
        yield RayCluster(cluster, environment)
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of four layers without a tokenizer; its embedding and head are two fifths of it."""
    from oracle import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def server(deployment: Any) -> Iterator[Any]:
    """The module's own ``deployment``, answering over HTTP and gRPC; idle again when the module ends."""
    from served import served

    with served(deployment) as server:
        yield server
        server.wait_idle()


@pytest.fixture
def hexgen_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``hexgen`` with arguments, as a person would, and gives back status, stdout and stderr."""

    def run(*arguments: object, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            hexgen_line(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=outside_ray() | environment,
        )

    return run


def hexgen_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hexgen", *map(str, arguments)]


def outside_ray() -> dict[str, str]:
    """The environment without what would lead a command to the tests' own Ray cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
