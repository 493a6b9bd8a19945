"""Groups of torch.distributed without a global world: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from hexgen.errors import EngineError

# A stage waits for its next step for as long as nobody asks for anything: no wait of ours may time out on its own.
FOREVER = timedelta(days=3650)


class ProcessGroupCommunicator:
    """A communicator over one torch.distributed process group that was built without a global world."""

    def __init__(
        self, group: dist.ProcessGroup, rank: int, size: int, on_close: Callable[[], None] | None = None
    ) -> None:
        self._group: dist.ProcessGroup | None = group
        self._on_close = on_close
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
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()


def is_nccl(group: dist.ProcessGroup) -> bool:
    return dist.is_nccl_available() and isinstance(group, cast(Any, dist.ProcessGroupNCCL))


def connect_group(
    store: Store, name: str, rank: int, size: int, *, device: torch.device, listen_host: str
) -> ProcessGroupCommunicator:
    """A bare NCCL or gloo group. Every rank must be known to come: there is no way to give up the wait."""
    prefixed = PrefixStore(name, store)
    if device.type == "cuda":
        return ProcessGroupCommunicator(_nccl(prefixed, rank, size), rank, size)
    gloo_device = _borrow_gloo_device(listen_host)
    try:
        group = _gloo(prefixed, rank, size, gloo_device)
    except BaseException:
        _return_gloo_device(listen_host)
        raise
    return ProcessGroupCommunicator(group, rank, size, lambda: _return_gloo_device(listen_host))


def _nccl(store: Store, rank: int, size: int) -> dist.ProcessGroup:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = FOREVER
    return cast(dist.ProcessGroup, dist.ProcessGroupNCCL(store, rank, size, options))  # offers the same calls


def _gloo(store: Store, rank: int, size: int, device: object) -> dist.ProcessGroup:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = FOREVER
    options._threads = 1
    options._devices = [device]
    return cast(dist.ProcessGroup, gloo(store, rank, size, options))  # offers the same calls


# A gloo device is a listening socket and a polling thread. All groups of a process that listen on the same address
# share one: by address, the device and how many groups have it. The last one to close ends both.
_devices: dict[str, tuple[object, int]] = {}
_devices_lock = threading.Lock()


def _borrow_gloo_device(host: str) -> object:
    with _devices_lock:
        if host not in _devices:
            _devices[host] = dist.ProcessGroupGloo.create_device(hostname=host), 0
            _calm_gloo_threads()
        device, users = _devices[host]
        _devices[host] = device, users + 1
        return device


def _return_gloo_device(host: str) -> None:
    with _devices_lock:
        device, users = _devices.pop(host)
        if users > 1:
            _devices[host] = device, users - 1


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
