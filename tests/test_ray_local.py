"""The local Ray instance: loopback only, with a token of its own, and gone without a trace."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from conftest import outside_ray

pytestmark = pytest.mark.slow


def run(code: str, **environment: str) -> str:
    """The output of ``code`` in a process that has not met Ray."""
    line = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, env=outside_ray() | environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_one_after_another_in_one_process() -> None:
    """Everything that a person could come upon, twice: environment, listening sockets, files, processes."""
    output = run(
        """
        import os, psutil
        from hexgen.deploy.ray_connect import connect_ray
        before = {k: v for k, v in os.environ.items() if k.startswith("RAY_")}
        tokens, folders = set(), []
        for _ in range(2):
            connection = connect_ray(cpus=1)
            import ray
            family = psutil.Process().children(recursive=True)
            tokens.add(os.environ["RAY_AUTH_TOKEN"])
            assert ray.get(ray.remote(lambda: os.environ["RAY_AUTH_MODE"]).remote()) == "token"
            for process in [psutil.Process(), *family]:
                for socket in process.net_connections("tcp"):
                    assert socket.laddr.ip.removeprefix("::ffff:") == "127.0.0.1", (process, socket)
            folders.append(connection.local.folder)
            assert folders[-1].stat().st_mode & 0o077 == 0
            connection.close()
            connection.close()
            assert not [process for process in family if process.is_running()]
        assert len(tokens) == 2
        assert not any(folder.exists() for folder in folders)
        after = {k: v for k, v in os.environ.items() if k.startswith("RAY_")}
        after.pop("RAY_CLIENT_MODE", None)
        assert after == before
        print("done")
        """,
        RAY_AUTH_MODE="disabled",
    )
    assert output == "done\n"


def test_it_outlives_the_thread_that_started_it_and_ends_with_the_process() -> None:
    output = run(
        """
        import threading, time
        from hexgen.deploy.ray_connect import connect_ray
        found = []
        thread = threading.Thread(target=lambda: found.append(connect_ray(cpus=1)))
        thread.start()
        thread.join()
        time.sleep(1)
        import ray
        print(ray.get(ray.remote(lambda: "alive").remote()))
        print(found[0].local.folder)
        """
    )
    answer, folder = output.splitlines()
    assert answer == "alive"
    from pathlib import Path

    assert not Path(folder).exists()
