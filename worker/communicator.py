"""Communicators: one a stage, one an edge, each built from a store; there is no global world.

A communicator is a small set of blocking collectives over a fixed group of ranks. NCCL carries CUDA tensors; gloo
carries large CPU tensors, direct sockets the small ones. Every socket binds to the address that the rank was
told to listen on.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import Store, TCPStore

from hexgen.errors import DeploymentError
from hexgen.worker.latency import latency_to_peer_s
from hexgen.worker.links import Links, connect_links, never
from hexgen.worker.process_group import ProcessGroupCommunicator, connect_group

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
        # Of a lab's links (0.0 elsewhere). The direct sockets add it themselves, gloo cannot.
        self._latency_s = max((latency_to_peer_s(links.socket(r)) for r in self._others), default=0.0)
        for r in self._others:  # room for what _exchange may leave unread, whatever the system's default
            links.socket(r).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * DIRECT_BYTES)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.nbytes > DIRECT_BYTES:
            self._wait_hops(2 * (self.size - 1))  # round the ring, twice
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
            self._wait_hops((self.size - 1).bit_length())  # down a binary tree
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
            self._wait_hops(self.size - 1)
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
            self._wait_hops(1)
            return self._large.recv(tensor, source)
        return self._links.recv_into(source, tensor_bytes(tensor))

    def close(self) -> None:
        self._links.close()
        self._large.close()

    def _wait_hops(self, hops: int) -> None:
        if self._latency_s:
            time.sleep(hops * self._latency_s)

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


class HostStagedCommunicator:
    """CUDA tensors through host memory, for ranks that NCCL will not join: two on the same GPU."""

    def __init__(self, on_host: CpuCommunicator) -> None:
        self._on_host = on_host
        self.rank = on_host.rank
        self.size = on_host.size

    def all_reduce(self, tensor: torch.Tensor) -> None:
        host = tensor.cpu()
        self._on_host.all_reduce(host)
        tensor.copy_(host)

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        host = tensor.cpu()
        self._on_host.broadcast(host, root)
        tensor.copy_(host)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [part.to(tensor.device) for part in self._on_host.all_gather(tensor.cpu())]

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self._on_host.send(tensor.cpu(), to)

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        host = torch.empty_like(tensor, device="cpu")
        self._on_host.recv(host, source)
        tensor.copy_(host)

    def close(self) -> None:
        self._on_host.close()


def physical_device(device: torch.device) -> str:
    """Tells GPUs apart over all processes and nodes; every CPU is the same."""
    return f"cuda {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else "cpu"


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
    """Join the group ``name``; blocks until all ``size`` ranks have. NCCL where each has a GPU of its own.

    ``cancelled`` is asked while waiting; once it says True, ``DeploymentError`` is raised.
    """
    if size == 1:
        return SoloCommunicator()
    store.set(f"{name}/device/{rank}", physical_device(device))
    links = connect_links(store, f"{name}/links", rank, range(size), listen_host=listen_host, cancelled=cancelled)
    # Everybody is there now: building the group cannot wait long for anybody.
    devices = [store.get(f"{name}/device/{r}") for r in range(size)]
    if len(set(devices)) == size and b"cpu" not in devices:
        links.close()
        return connect_group(store, name, rank, size, device=device, listen_host=listen_host)
    large = connect_group(store, name, rank, size, device=torch.device("cpu"), listen_host=listen_host)
    on_host = CpuCommunicator(links, large, rank, size)
    return on_host if device.type == "cpu" else HostStagedCommunicator(on_host)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
