"""Communicators: one a stage, one an edge, each built from a store; there is no global world.

A communicator is a small set of blocking collectives over a fixed group of ranks. gloo carries CPU tensors,
NCCL carries CUDA tensors. Every socket binds to the address that the rank was told to listen on.
"""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from hexgen.errors import DeploymentError

# A stage waits for its next step for as long as nobody asks for anything: no wait of ours may time out on its own.
FOREVER = timedelta(days=3650)
CONNECT_TIMEOUT = timedelta(seconds=120)


class Communicator(Protocol):
    """What a stage or an edge needs. All calls block until the local tensor may be used again."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over all ranks, in place."""

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None: ...
    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Equal shapes on every rank; one tensor a rank comes back, in rank order."""

    def send(self, tensor: torch.Tensor, to: int) -> None: ...
    def recv(self, tensor: torch.Tensor, source: int) -> None: ...
    def close(self) -> None: ...


class SoloCommunicator:
    """A group of one: every collective is already done."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> None:
        return

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        return

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]

    def send(self, tensor: torch.Tensor, to: int) -> None:
        raise DeploymentError("a group of one has nobody to send to")

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        raise DeploymentError("a group of one has nobody to receive from")

    def close(self) -> None:
        return


class ProcessGroupCommunicator:
    """A communicator over one torch.distributed process group that was built without a global world."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self._group = group
        self.rank = rank
        self.size = size

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._group.allreduce([tensor]).wait()

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = root
        self._group.broadcast([tensor], options).wait()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._group.allgather([parts], [tensor]).wait()
        return parts

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self._group.send([tensor], to, 0).wait()

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        self._group.recv([tensor], source, 0).wait()

    def close(self) -> None:
        del self._group


def serve_store(host: str) -> tuple[dist.TCPStore, int]:
    """A store that listens on ``host`` alone (TCPStore by itself listens on every interface), and its port."""
    listener = socket.create_server((host, 0), family=_family(host), backlog=512)
    port: int = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=CONNECT_TIMEOUT,
        master_listen_fd=listener.detach(),
    )
    return store, port


def connect_store(host: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=CONNECT_TIMEOUT)


def connect(
    store: dist.Store, name: str, rank: int, size: int, *, device: torch.device, listen_host: str
) -> Communicator:
    """Join the group ``name``; blocks until all ``size`` ranks have. ``device`` chooses NCCL or gloo."""
    if size == 1:
        return SoloCommunicator()
    prefixed = dist.PrefixStore(name, store)
    if device.type == "cuda":
        return ProcessGroupCommunicator(_nccl(prefixed, rank, size), rank, size)
    return ProcessGroupCommunicator(_gloo(prefixed, rank, size, listen_host), rank, size)


def _nccl(store: dist.Store, rank: int, size: int) -> dist.ProcessGroup:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = FOREVER
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _gloo(store: dist.Store, rank: int, size: int, listen_host: str) -> dist.ProcessGroup:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = FOREVER
    options._threads = 1
    options._devices = [_gloo_device(listen_host)]
    return dist.ProcessGroupGloo(store, rank, size, options)


_devices: dict[str, object] = {}
_devices_lock = threading.Lock()


def _gloo_device(host: str) -> object:
    """One gloo device (a listening socket and a polling thread) a process and address."""
    with _devices_lock:
        if host not in _devices:
            _devices[host] = dist.ProcessGroupGloo.create_device(hostname=host)
            _calm_gloo_threads()
        return _devices[host]


def _calm_gloo_threads() -> None:
    """Keep gloo's polling thread from preempting the thread that it waits for.

    gloo's poll loop skips a connection whose lock another thread holds and polls again at once. Where a sender is
    preempted by that very loop, on its own core, in the middle of its write, the loop spins for a whole scheduler
    slice (4 ms measured, against 0.1 ms for the transfer itself) before the sender can go on. A SCHED_BATCH thread
    never preempts on wake-up, so the sender finishes first. Needs no privilege; Linux only, harmless elsewhere.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for comm in Path("/proc/self/task").glob("*/comm"):
        try:
            if comm.read_text().startswith("gloo"):
                os.sched_setscheduler(int(comm.parent.name), os.SCHED_BATCH, os.sched_param(0))
        except (OSError, ValueError):  # the thread has ended, or a sandbox forbids it: slower, never wrong
            continue


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
