"""Communicators: one a stage, one an edge, each built from a store; there is no global world.

A communicator is a small set of blocking collectives over a fixed group of ranks. NCCL carries CUDA tensors; gloo
carries large CPU tensors, direct sockets the small ones. Every socket binds to the address that the rank was
told to listen on.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from hexgen.errors import DeploymentError, EngineError
from hexgen.worker.links import Links, connect_links, never

# A stage waits for its next step for as long as nobody asks for anything: no wait of ours may time out on its own.
FOREVER = timedelta(days=3650)
CONNECT_TIMEOUT = timedelta(seconds=120)
# CPU tensors up to this size go over direct sockets: a decode step's. Beyond it gloo's bandwidth wins.
DIRECT_BYTES = 64 * 1024


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
        self._group: dist.ProcessGroup | None = group
        self.rank = rank
        self.size = size

    @property
    def group(self) -> dist.ProcessGroup:
        if self._group is None:
            raise EngineError("this communicator is closed")
        return self._group

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.group.allreduce([tensor]).wait()

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = root
        self.group.broadcast([tensor], options).wait()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self.group.allgather([parts], [tensor]).wait()
        return parts

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self.group.send([tensor], to, 0).wait()

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        self.group.recv([tensor], source, 0).wait()

    def close(self) -> None:
        """Drop the group. Peers that wait in it wake with an error (gloo) once nobody here is inside a call."""
        if self._group is not None and is_nccl(self._group):
            self._group.abort()
        self._group = None


class CpuCommunicator:
    """CPU tensors: small ones over direct sockets, large ones through gloo.

    Every rank adds the contributions in rank order, so all ranks hold the same bits afterwards.
    """

    def __init__(self, links: Links, large: ProcessGroupCommunicator, rank: int, size: int) -> None:
        self._links = links
        self._large = large
        self.rank = rank
        self.size = size
        self._others = tuple(r for r in range(size) if r != rank)
        self._inbox = {r: bytearray(DIRECT_BYTES) for r in self._others}
        self._views: dict[tuple[torch.dtype, int], list[tuple[memoryview, torch.Tensor]]] = {}
        for (
            r
        ) in self._others:  # room for the messages that _exchange may leave unread, whatever the system's default
            links.socket(r).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * DIRECT_BYTES)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.nbytes > DIRECT_BYTES:
            return self._large.all_reduce(tensor)
        flat = tensor.view(-1)
        parts = self._exchange(flat)
        if self.rank == 0:
            for _, part in parts:
                flat.add_(part)
            return None
        total = parts[0][1]
        for r in range(1, self.size):
            total.add_(flat if r == self.rank else parts[r - (r > self.rank)][1])
        flat.copy_(total)
        return None

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        if tensor.nbytes > DIRECT_BYTES:
            return self._large.broadcast(tensor, root)
        data = tensor_bytes(tensor)
        if self.rank == root:
            for r in self._others:
                self._links.send(r, data)
        else:
            self._links.recv_into(root, data)
        return None

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if tensor.nbytes > DIRECT_BYTES:
            return self._large.all_gather(tensor)
        parts = [part.clone().view(tensor.shape) for _, part in self._exchange(tensor.contiguous().view(-1))]
        parts.insert(self.rank, tensor)
        return parts

    def send(self, tensor: torch.Tensor, to: int) -> None:
        if tensor.nbytes > DIRECT_BYTES:
            return self._large.send(tensor, to)
        return self._links.send(to, tensor_bytes(tensor))

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        if tensor.nbytes > DIRECT_BYTES:
            return self._large.recv(tensor, source)
        return self._links.recv_into(source, tensor_bytes(tensor))

    def close(self) -> None:
        self._links.close()
        self._large.close()

    def _exchange(self, flat: torch.Tensor) -> list[tuple[memoryview, torch.Tensor]]:
        """Everybody's tensor, the other ranks' in rank order. The buffers are used again by the next call.

        All send before they receive: a socket's own buffers hold more than one message of DIRECT_BYTES, and a rank
        can be one collective ahead of a peer, never two, hence no send can block for ever.
        """
        data = tensor_bytes(flat)
        for r in self._others:
            self._links.send(r, data)
        key = (flat.dtype, flat.numel())
        parts = self._views.get(key)
        if parts is None:
            if len(self._views) >= 256:
                self._views.clear()
            parts = [
                (memoryview(box)[: len(data)], torch.frombuffer(box, dtype=flat.dtype, count=flat.numel()))
                for box in self._inbox.values()
            ]
            self._views[key] = parts
        for r, (view, _) in zip(self._others, parts, strict=True):
            self._links.recv_into(r, view)
        return parts


def is_nccl(group: dist.ProcessGroup) -> bool:
    return dist.is_nccl_available() and isinstance(group, cast(Any, dist.ProcessGroupNCCL))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The storage of a contiguous CPU tensor of any dtype, as writable bytes."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def serve_store(host: str) -> tuple[TCPStore, int]:
    """A store that listens on ``host`` alone (TCPStore by itself listens on every interface), and its port."""
    listener = socket.create_server((host, 0), family=_family(host), backlog=512)
    port: int = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=CONNECT_TIMEOUT,
        master_listen_fd=listener.detach(),
    )
    return store, port


def connect_store(host: str, port: int) -> TCPStore:
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=CONNECT_TIMEOUT)


def connect(
    store: Store,
    name: str,
    rank: int,
    size: int,
    *,
    device: torch.device,
    listen_host: str,
    cancelled: Callable[[], bool] = never,
) -> Communicator:
    """Join the group ``name``; blocks until all ``size`` ranks have. ``device`` chooses NCCL or gloo.

    ``cancelled`` is asked while waiting; once it says True, ``DeploymentError`` is raised.
    """
    if size == 1:
        return SoloCommunicator()
    links = connect_links(store, f"{name}/links", rank, range(size), listen_host=listen_host, cancelled=cancelled)
    # Everybody is there now: building the group cannot wait long for anybody.
    group = connect_group(store, name, rank, size, device=device, listen_host=listen_host)
    if device.type == "cuda":
        links.close()
        return group
    return CpuCommunicator(links, group, rank, size)


def connect_group(
    store: Store, name: str, rank: int, size: int, *, device: torch.device, listen_host: str
) -> ProcessGroupCommunicator:
    """A bare NCCL or gloo group. Every rank must be known to come: there is no way to give up the wait."""
    prefixed = PrefixStore(name, store)
    if device.type == "cuda":
        return ProcessGroupCommunicator(_nccl(prefixed, rank, size), rank, size)
    return ProcessGroupCommunicator(_gloo(prefixed, rank, size, listen_host), rank, size)


def _nccl(store: Store, rank: int, size: int) -> dist.ProcessGroup:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = FOREVER
    return cast(dist.ProcessGroup, dist.ProcessGroupNCCL(store, rank, size, options))  # offers the same calls


def _gloo(store: Store, rank: int, size: int, listen_host: str) -> dist.ProcessGroup:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = FOREVER
    options._threads = 1
    options._devices = [_gloo_device(listen_host)]
    return cast(dist.ProcessGroup, gloo(store, rank, size, options))  # offers the same calls


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
