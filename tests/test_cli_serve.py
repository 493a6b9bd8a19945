"""``hexgen serve`` and ``hexgen generate`` as processes on a local Ray instance, and what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import oracle
import psutil
import pytest
import yaml
from conftest import hexgen_line, outside_ray

READY_S = 240
END_S = 60
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def plan(tiny_llama: Path, tmp_path: Path) -> Path:
    """Two stages on two nodes, the first two-wide."""
    nodes = [
        {"name": "a", "device": "cpu", "count": 2, "memory": "1GB"},
        {"name": "b", "device": "cpu", "count": 1, "memory": "1GB"},
    ]
    value = {
        "version": 1,
        "model": str(tiny_llama),
        "cluster": {"name": "c", "nodes": nodes},
        "stages": {
            "s0": {"layers": [0, 3], "devices": ["a/0", "a/1"], "shares": [1, 2]},
            "s1": {"layers": [3, 4], "devices": ["b/0"]},
        },
        "routes": [{"path": ["s0", "s1"], "kv_tokens": 512}],
        "engine": {"token_budget": 32, "max_sequences": 4},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def leftovers(pid: int) -> list[Path]:
    """Files that the Ray instance of process ``pid`` has left."""
    folders = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    return [path for folder in folders for path in folder.glob(f"*{pid}*")]


@dataclass
class Serving:
    process: subprocess.Popen[str]
    family: list[psutil.Process]
    ready: str

    @property
    def http(self) -> str:
        return self.ready.split("http=")[1].split()[0]

    def listening(self) -> list[tuple[str, int]]:
        return [
            (connection.laddr.ip, connection.laddr.port)
            for process in self.family
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]


@contextmanager
def served(plan: Path, *options: object) -> Iterator[Serving]:
    """A server that is ready; whatever the test does, none of its processes stays."""
    line = hexgen_line("serve", plan, "--port", 0, "--grpc-port", 0, *options)
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=outside_ray(), start_new_session=True
    )
    serving = Serving(process, [], "")
    try:
        assert process.stdout is not None
        serving.ready = process.stdout.readline().strip()
        root = psutil.Process(process.pid)
        serving.family = [root, *root.children(recursive=True)]
        assert serving.ready.startswith("ready http="), process.stderr.read() if process.stderr else ""
        yield serving
    finally:
        end_all(process, serving.family)


def end_all(process: subprocess.Popen[str], family: list[psutil.Process]) -> None:
    for member in family:
        if member.is_running():
            member.kill()
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def assert_gone(serving: Serving, within_s: float = END_S) -> None:
    _, alive = psutil.wait_procs(serving.family, timeout=within_s)
    assert not alive, alive


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        (signal.SIGTERM, True),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_serves_and_ends_without_a_trace(
    plan: Path, tiny_llama: Path, number: signal.Signals, whole_group: bool
) -> None:
    with served(plan) as serving:
        listening = serving.listening()
        assert {ip.removeprefix("::ffff:") for ip, _ in listening} == {"127.0.0.1"}
        body = {
            "model": str(tiny_llama),
            "prompt": PROMPT,
            "max_tokens": 6,
            "temperature": 0,
            "return_token_ids": True,
        }
        answer = httpx.post(f"http://{serving.http}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == oracle.greedy(tiny_llama, PROMPT, 6, ignore_eos=False)

        # A terminal's Ctrl-C reaches every process of the group, and so does what `timeout` or a CI runner sends.
        if whole_group:
            os.killpg(serving.process.pid, number)
        else:
            serving.process.send_signal(number)
        assert serving.process.wait(END_S) == 0
        assert_gone(serving)
        assert serving.process.stdout is not None
        assert serving.process.stdout.read() == "", "stdout has the ready line alone"
    for ip, port in listening:
        with socket.socket() as probe:
            assert probe.connect_ex((ip.removeprefix("::ffff:"), port)) != 0, port
    assert not leftovers(serving.process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after_s", [3, 8])
def test_a_signal_while_it_starts(plan: Path, number: signal.Signals, after_s: float) -> None:
    line = hexgen_line("serve", plan, "--port", 0, "--grpc-port", 0)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=outside_ray())
    family: list[psutil.Process] = []
    try:
        time.sleep(after_s)
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
        process.send_signal(number)
        assert process.wait(END_S) == 128 + number
        _, alive = psutil.wait_procs(family, timeout=END_S)
        assert not alive
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        end_all(process, family)
    assert not leftovers(process.pid)


@pytest.mark.slow
def test_workers_end_when_the_server_is_killed(plan: Path) -> None:
    with served(plan) as serving:
        serving.process.kill()
        # Ray's own two agents first try, for a minute, to tell the head that is gone with everything else.
        serving.family = [process for process in serving.family if not process.name().endswith("Agent")]
        assert any("RankActor" in process.name() for process in serving.family)
        assert_gone(serving)


@pytest.mark.slow
def test_a_dead_worker_ends_the_server_with_its_name(plan: Path) -> None:
    with served(plan) as serving:
        worker = next(process for process in serving.family if "RankActor" in process.name())
        worker.kill()
        assert serving.process.wait(END_S) == 1
        assert_gone(serving)
        assert serving.process.stderr is not None
        errors = [line for line in serving.process.stderr.read().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "its worker process died" in errors[0]
    assert not leftovers(serving.process.pid)


@pytest.mark.slow
def test_generate_answers_in_order_on_the_shared_cluster(
    ray_cluster: object,
    hexgen_command: Callable[..., subprocess.CompletedProcess[str]],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    environment: dict[str, str] = ray_cluster.environment  # type: ignore[attr-defined]
    address: str = ray_cluster.address  # type: ignore[attr-defined]
    prompts = [[1], [7, 8, 9], [30, 20, 10]]
    options = [option for ids in prompts for option in ("--prompt-ids", ",".join(map(str, ids)))]
    done = hexgen_command(
        "generate", "--model", tiny_llama, *options, "--max-tokens", 5, "--ignore-eos", "--json",
        "--ray-address", address, timeout_s=READY_S, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [
        {
            "prompt_token_ids": ids,
            "token_ids": oracle.greedy(tiny_llama, ids, 5),
            "text": "",
            "finish_reason": "length",
        }
        for ids in prompts
    ]


@pytest.mark.slow
def test_bad_checkpoints_are_one_line(
    hexgen_command: Callable[..., subprocess.CompletedProcess[str]], plan: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for name, damage in (("truncated", None), ("lacking", "model.layers.3.mlp.up_proj.weight")):
        broken = tmp_path / name
        shutil.copytree(tiny_llama, broken)
        weights = broken / "model.safetensors"
        if damage is None:
            weights.write_bytes(weights.read_bytes()[:-100])
        else:
            tensors = load_file(weights)
            del tensors[damage]
            save_file(tensors, weights)
        done = hexgen_command(
            "generate", plan, "--model", broken, "--prompt-ids", "1", "--json", timeout_s=READY_S
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert (damage or "model.safetensors") in done.stderr
