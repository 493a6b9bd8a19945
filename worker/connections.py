"""All connections of one rank: the stage's communicator, the leader's line to the others, the leader's edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch._C._distributed_c10d import Store

from hexgen.worker.checkpoint import torch_dtype
from hexgen.worker.communicator import Communicator, connect, connect_store
from hexgen.worker.config import EdgeSpec, RankConfig
from hexgen.worker.edge import EdgeReceiver, EdgeSender, open_edge
from hexgen.worker.group import LEADER, Followers, Leader
from hexgen.worker.links import connect_links


@dataclass(slots=True)
class Connections:
    """``senders`` by (stage, kind). ``followers`` on the leader of several ranks, ``leader`` on the others."""

    communicator: Communicator
    senders: dict[tuple[str, str], EdgeSender] = field(default_factory=dict)
    receivers: list[EdgeReceiver] = field(default_factory=list)
    followers: Followers | None = None
    leader: Leader | None = None

    def shutdown(self) -> None:
        """Wake every thread that is blocked on one of these, here and at the peers."""
        for connection in self._all():
            connection.shutdown()

    def close(self) -> None:
        """Close all; no thread may be blocked on one any more."""
        for connection in self._all():
            connection.close()
        self.communicator.close()

    def _all(self) -> list[EdgeSender | EdgeReceiver | Followers | Leader]:
        group = [side for side in (self.followers, self.leader) if side is not None]
        return [*self.senders.values(), *self.receivers, *group]


def open_connections(config: RankConfig, cancelled: Callable[[], bool]) -> Connections:
    """Connect to everybody whom ``config`` names; blocks until all are there or ``cancelled()`` says True.

    The stage first, then the edges by name: the same order on every rank, so that nobody waits in a circle.
    """
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = connect_store(config.store_host, config.store_port)
    communicator = connect(
        store,
        _stage_key(config),
        config.rank,
        config.width,
        device=device,
        listen_host=config.listen_host,
        cancelled=cancelled,
    )
    connections = Connections(communicator)
    try:
        if config.width > 1:
            _open_group(config, store, connections, cancelled)
        if config.rank == LEADER:
            for spec in sorted(config.edges, key=lambda e: e.name):
                _open_edge(config, spec, store, connections, cancelled)
    except BaseException:
        connections.shutdown()
        connections.close()
        raise
    return connections


def _stage_key(config: RankConfig) -> str:
    return f"{config.deployment}/stage/{config.stage}"


def _open_group(config: RankConfig, store: Store, connections: Connections, cancelled: Callable[[], bool]) -> None:
    device = torch.device(config.device)
    peers = range(1, config.width) if config.rank == LEADER else (LEADER,)
    name = f"{_stage_key(config)}/steps"
    links = connect_links(store, name, config.rank, peers, listen_host=config.listen_host, cancelled=cancelled)
    if config.rank == LEADER:
        connections.followers = Followers(links, connections.communicator, device, config.stage)
        return
    connections.leader = Leader(
        links,
        connections.communicator,
        device,
        stage=config.stage,
        hidden_size=config.model.hidden_size,
        max_tokens=config.token_budget,
        dtype=torch_dtype(config.dtype),
    )


def _open_edge(
    config: RankConfig, spec: EdgeSpec, store: Store, connections: Connections, cancelled: Callable[[], bool]
) -> None:
    edge = open_edge(
        store,
        f"{config.deployment}/edge/{spec.name}",
        spec.side,
        tensors=spec.kind == "hidden",
        device=torch.device(config.device),
        listen_host=config.listen_host,
        cancelled=cancelled,
    )
    if isinstance(edge, EdgeSender):
        connections.senders[spec.peer, spec.kind] = edge
        return
    edge.expect(
        hidden_size=config.model.hidden_size,
        max_tokens=config.token_budget,
        dtype=torch_dtype(config.dtype),
    )
    connections.receivers.append(edge)
