"""Ranks in processes of their own, as Ray hosts them, for tests that kill one."""

from __future__ import annotations

import multiprocessing
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from hexgen.cluster import Cluster
from hexgen.deploy.assemble import assemble
from hexgen.deploy.base import RouteEndpoint
from hexgen.model import load_model
from hexgen.plan import Plan
from hexgen.worker.communicator import serve_store
from hexgen.worker.config import RankConfig
from hexgen.worker.rank import StageRank

HOST = "127.0.0.1"


def host_rank(config: RankConfig, pipe: Connection) -> None:
    """A process's main: load, start, say the ports, then answer questions until the pipe closes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    rank = StageRank(HOST)
    rank.load(config)
    pipe.send(rank.start())
    try:
        while True:
            question = pipe.recv()
            if question == "failure":
                pipe.send(rank.failure())
            elif question == "report":
                pipe.send(rank.report())
            else:
                rank.stop()
                pipe.send(rank.failure())
    except EOFError:
        rank.stop()


class RankProcess:
    def __init__(self, config: RankConfig) -> None:
        # A fresh process a rank, but torch is imported once: each is forked from a server that holds nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hexgen.worker.rank"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=host_rank, args=(config, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, question: str) -> object:
        self.pipe.send(question)
        return self.pipe.recv()


@contextmanager
def rank_processes(
    plan: Plan, cluster: Cluster, path: Path
) -> Iterator[tuple[Mapping[str, RankProcess], tuple[RouteEndpoint, ...], str]]:
    """Start ``plan`` with a process a device: the processes, the endpoints, the secret."""
    store, port = serve_store(HOST)
    secret = secrets.token_hex(32)
    configs = assemble(
        plan,
        cluster,
        load_model(path),
        str(path),
        deployment=secrets.token_hex(8),
        store_host=HOST,
        store_port=port,
        addresses={device: (HOST, "cpu") for stage in plan.stages for device in stage.devices},
        secret=secret,
    )
    ranks = {device: RankProcess(config) for device, config in configs.items()}
    try:
        ports: dict[int, int] = {}
        for rank in ranks.values():
            ports |= rank.pipe.recv()
        yield ranks, tuple(RouteEndpoint(r, 1.0, HOST, p) for r, p in sorted(ports.items())), secret
    finally:
        for rank in ranks.values():
            rank.pipe.close()
        for rank in ranks.values():
            rank.process.join(30)
            rank.process.kill()
        del store
