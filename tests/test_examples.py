"""Every example runs as its own first lines say (the training script has a test file of its own)."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import outside_ray
from served import engine, served

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LIMIT_S = 280


def run(*command: object) -> str:
    """Standard output; the example must end with status 0."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=outside_ray(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def addresses() -> Iterator[tuple[str, str]]:
    """(HTTP URL, gRPC address) of the bundled model."""
    with engine() as deployment, served(deployment) as server:
        yield server.http, server.grpc


def test_openai_client(addresses: tuple[str, str]) -> None:
    out = run(sys.executable, EXAMPLES / "openai_client.py", "--url", f"{addresses[0]}/v1")
    assert "model: tested" in out
    assert re.search(r"finish reason: (length|stop); tokens: \d+", out)


def test_grpc_client(addresses: tuple[str, str]) -> None:
    out = run(sys.executable, EXAMPLES / "grpc_client.py", "--address", addresses[1], "--max-tokens", 12)
    assert "model: tested" in out
    assert "route 0: s0[0:8]" in out
    assert re.search(r"12 tokens; first after \d+ ms", out)


def test_python_api() -> None:
    out = run(sys.executable, EXAMPLES / "python_api.py")
    assert out.count("---") == 5  # three prompts, two choices
    assert "--- choice 1" in out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_cluster_of_several_nodes() -> None:
    mark = uuid.uuid4().hex  # in the environment of everything that the script starts
    command = ["bash", str(EXAMPLES / "ray_cluster.sh")]
    environment = outside_ray() | {"HEXGEN_TEST_MARK": mark}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            out, _ = process.communicate(timeout=500)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            raise
    assert process.returncode == 0, out
    assert '"completion_tokens":16' in out
    left = [found for found in psutil.process_iter(["cmdline"]) if _has_mark(found, mark)]
    assert not left


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("HEXGEN_TEST_MARK") == mark
    except psutil.Error:  # ended meanwhile, or somebody else's
        return False
