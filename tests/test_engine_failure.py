"""A rank dies by SIGKILL: the others end with an error that says so, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import oracle
import pytest
from engine_client import EngineClient, cpu_cluster, make_plan
from rank_process import rank_processes

from hexgen.errors import EngineError
from hexgen.request import SamplingParams

LONG = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
STAGES = [((0, 2), [1, 1]), ((2, 4), 1)]  # n/0 leads s0 and heads the route, n/1 follows it, n/2 is s1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama", "llama")


@pytest.mark.parametrize("victim", ["n/0", "n/1", "n/2"])
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_one_killed_rank_ends_all(path: Path, victim: str, busy: bool) -> None:
    cluster = cpu_cluster(3)
    with rank_processes(make_plan(cluster, str(path), STAGES), cluster, path) as (ranks, endpoints, secret):
        with EngineClient(endpoints[0], secret) as client:
            assert client.generate([[9, 8, 7]]) == [oracle.greedy(path, [9, 8, 7], 8)]
            if busy:
                for _ in range(4):
                    client.submit([5, 6, 7], LONG)
                client.step()
            pid = ranks[victim].process.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            client.wait_end()  # the head hangs up
        deadline = time.monotonic() + 20
        for device, rank in ranks.items():
            while device != victim:
                failure = rank.ask("failure")
                if failure is not None:
                    assert isinstance(failure, EngineError)
                    assert failure.where is not None
                    break
                assert time.monotonic() < deadline, f"{device} has not noticed"
                time.sleep(0.05)


def test_processes_end_in_good_order(path: Path) -> None:
    cluster = cpu_cluster(3)
    plan = make_plan(cluster, str(path), STAGES)
    with (
        rank_processes(plan, cluster, path) as (ranks, endpoints, secret),
        EngineClient(endpoints[0], secret) as client,
    ):
        client.submit([5, 6, 7], LONG)
        client.step()
        for rank in ranks.values():
            rank.pipe.send("stop")
        assert [rank.pipe.recv() for rank in ranks.values()] == [None, None, None]
        client.wait_end()
