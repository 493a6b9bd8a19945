"""A deployment from start to end: clients good and bad, aborts, limits, stopping, and what is left behind."""

from __future__ import annotations

import gc
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import oracle
import psutil
import pytest
import torch
from engine_client import GREEDY, EngineClient, cpu_cluster, make_plan

from hexgen.deploy.in_process import InProcessDeployment
from hexgen.errors import CheckpointError
from hexgen.memory import plan_memory
from hexgen.model import load_model
from hexgen.protocol import Hello, encode
from hexgen.request import SamplingParams

TWO_STAGES = [((0, 1), 1), ((1, 4), [2, 1])]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return oracle.make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama", "llama")


def start(path: Path, stages: object = TWO_STAGES, **engine: object) -> InProcessDeployment:
    cluster = cpu_cluster(8)
    return InProcessDeployment(make_plan(cluster, str(path), stages, **engine), cluster, path)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def deployment(path: Path) -> Iterator[InProcessDeployment]:
    deployment = start(path)
    yield deployment
    deployment.stop()


@pytest.fixture
def client(deployment: InProcessDeployment) -> Iterator[EngineClient]:
    with EngineClient(deployment.endpoints()[0], deployment.secret) as client:
        yield client


def listening() -> set[int]:
    return {c.laddr.port for c in psutil.Process().net_connections() if c.status == "LISTEN"}


def engine_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("hexgen")]


@pytest.mark.parametrize("requests", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_with_a_third_of_the_requests_aborted_every_page_is_free_afterwards(
    deployment: InProcessDeployment, path: Path, requests: int
) -> None:
    rng = random.Random(3)
    with EngineClient(deployment.endpoints()[0], deployment.secret) as client:
        alive: set[int] = set()
        for _ in range(requests):
            prompt = [rng.randrange(3, 101) for _ in range(rng.choice([1, 3, 20]))]
            sampling = SamplingParams(max_tokens=rng.choice([1, 5, 12]), temperature=0.0, ignore_eos=True)
            number = client.submit(prompt, sampling)
            if rng.random() < 1 / 3:
                while number not in client.finished and rng.random() < 0.5:  # at once, or in the middle
                    client.step()
                client.abort(number)
            else:
                alive.add(number)
        client.wait(*alive)
        stats = client.wait_idle()
        assert stats.free_pages == stats.total_pages
        assert client.generate([[5, 6, 7]]) == [oracle.greedy(path, [5, 6, 7], 8)]


def test_a_client_that_hangs_up_takes_its_sequences_with_it(
    deployment: InProcessDeployment, client: EngineClient
) -> None:
    other = EngineClient(deployment.endpoints()[0], deployment.secret)
    for _ in range(5):
        other.submit([3, 4, 5], SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True))
    mine = client.submit([3, 4, 5])  # the same number as the other's
    other.step()
    other.close()
    client.wait(mine)
    assert len(client.outputs[mine]) == GREEDY.max_tokens
    stats = client.wait_idle()
    assert stats.free_pages == stats.total_pages


def test_finish_reasons(client: EngineClient, path: Path) -> None:
    prompt = [9, 8, 7]
    expected = oracle.greedy(path, prompt, 8)
    stopped = client.submit(prompt, GREEDY, stop_token_ids=[expected[2]])
    ended = client.submit(prompt, SamplingParams(max_tokens=10_000, temperature=0.0, ignore_eos=True))
    client.wait(stopped, ended)
    assert client.outputs[stopped] == expected[: expected.index(expected[2]) + 1]
    assert client.finished[stopped] == "stop"
    assert client.finished[ended] == "length"
    assert len(client.outputs[ended]) == client.welcome.max_context - len(prompt)


def test_sampled_text_and_logprobs_come_through(client: EngineClient) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=4, logprobs=3, ignore_eos=True)
    alone = client.generate([[5, 6]], sampling)[0]
    crowd = client.generate([[7], [5, 6], [8, 9, 10]], sampling)
    assert crowd[1] == alone
    event = client.events[0][0]
    assert event.logprobs is not None
    assert len(event.logprobs.top) == 3
    assert event.logprobs.chosen <= event.logprobs.top[0][1] <= 0


@pytest.mark.parametrize(
    ("prompt", "sampling", "what"),
    [
        ([], GREEDY, "empty"),
        ([5, 101], GREEDY, "between 0 and 100"),
        ([5] * 128, GREEDY, "128"),
        ([5], SamplingParams(temperature=-1.0), "temperature"),
        ([5], SamplingParams(max_tokens="many"), "max_tokens|type"),  # type: ignore[arg-type]
        (["5"], GREEDY, "between 0 and 100"),
    ],
)
def test_a_bad_sequence_is_refused_and_others_go_on(
    client: EngineClient, prompt: list[int], sampling: SamplingParams, what: str
) -> None:
    good = client.submit([3, 4])
    bad = client.submit(prompt, sampling)
    client.wait(good, bad)
    assert bad in client.refused
    assert re.search(what, client.refused[bad])
    assert len(client.outputs[good]) == GREEDY.max_tokens


def test_a_number_in_use_is_refused(client: EngineClient) -> None:
    long = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    client.submit([3, 4], long, number=77)
    client.submit([5, 6], long, number=77)
    client.abort(12345)  # never heard of: no harm
    while 77 not in client.refused:
        client.step()
    client.wait(77)
    while 77 not in client.finished:
        client.step()
    assert len(client.outputs[77]) == 60


@pytest.mark.parametrize("greeting", [encode(Hello("0" * 64)), b"\x00\x00\x00\x05hello", b"\xff\xff\xff\xff", b""])
def test_strangers_are_turned_away(deployment: InProcessDeployment, client: EngineClient, greeting: bytes) -> None:
    endpoint = deployment.endpoints()[0]
    with socket.create_connection((endpoint.host, endpoint.port), timeout=10) as stranger:
        stranger.sendall(greeting)
        if not greeting:
            stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(1) == b""
    assert client.generate([[3, 4]])  # nobody else noticed


def test_a_client_that_sends_nonsense_loses_its_connection_only(
    deployment: InProcessDeployment, client: EngineClient
) -> None:
    with EngineClient(deployment.endpoints()[0], deployment.secret) as rude:
        rude.socket.sendall(b"\x00\x00\x00\x02{]")
        rude.wait_end()
    assert client.generate([[3, 4]])


def test_reports_agree_with_the_plan(deployment: InProcessDeployment, path: Path) -> None:
    cluster = cpu_cluster(8)
    memory = plan_memory(make_plan(cluster, str(path), TWO_STAGES), cluster, load_model(path))
    reports = deployment.reports()
    for predicted in memory.devices:
        report = reports[predicted.device]
        assert report.weights_bytes == predicted.weights_bytes
        assert report.kv_bytes == predicted.kv_bytes
        assert report.buffers_bytes == predicted.buffers_bytes
        assert report.bytes_read <= predicted.weights_bytes


def test_stopping_leaves_no_thread_and_no_port(path: Path) -> None:
    before, ports = set(engine_threads()), listening()
    deployment = start(path)
    endpoint = deployment.endpoints()[0]
    with EngineClient(endpoint, deployment.secret) as client:
        client.submit([3] * 30, SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True))
        client.step()
        deployment.stop()  # in the middle of a sequence
        client.wait_end()
    deployment.stop()  # once more does no harm
    assert deployment.failure() is None
    assert set(engine_threads()) == before
    assert listening() == ports
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((endpoint.host, endpoint.port), timeout=5)


def test_one_process_serves_one_plan_after_another(path: Path) -> None:
    gc.collect()
    for stages in ([((0, 4), 1)], [((0, 2), 2), ((2, 4), 1)]):
        deployment = start(path, stages)
        try:
            with EngineClient(deployment.endpoints()[0], deployment.secret) as client:
                assert client.generate([[9, 8, 7]]) == [oracle.greedy(path, [9, 8, 7], 8)]
        finally:
            deployment.stop()


def test_a_rank_that_cannot_load_ends_the_others_at_once(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((path / "config.json").read_bytes())
    weights = (path / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-100])
    before = set(engine_threads())
    started = time.monotonic()
    with pytest.raises(CheckpointError):
        start(broken)
    assert time.monotonic() - started < 60  # nobody waited two minutes for the one that failed
    assert set(engine_threads()) == before
