"""An edge: the leaders of two stages, one direction. Header first, then the tensor.

Headers and small tensors share a direct socket. Larger hidden states go through the edge's own two-rank
communicator, gloo between CPUs and NCCL between GPUs, and are received only once their header is there, so that no
GPU ever waits for a tensor nobody has sent. Two ranks on one GPU, or a GPU and a CPU, pass them through host
memory.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from hexgen.errors import EngineError
from hexgen.worker.communicator import physical_device
from hexgen.worker.framing import INLINE_BYTES, Frame, FrameKind, FrameReader, Place, write_frame
from hexgen.worker.links import Links, connect_links
from hexgen.worker.process_group import ProcessGroupCommunicator, connect_group, is_nccl

_cuda: Any = torch.cuda  # whose classes have untyped constructors
_FACTS_BYTES = 64
SENDER, RECEIVER = 0, 1  # EdgeSpec.side, and the ranks in the edge's communicator
_MAX_PENDING = 8  # large sends that may be under way; more only where the receiver has fallen behind


@dataclass(slots=True)
class Received:
    """A frame and, for a step with hidden states, these on this rank's device.

    ``ready`` is set for CUDA: the consumer's stream must wait for it before it touches ``hidden``.
    """

    frame: Frame
    hidden: torch.Tensor | None = None
    ready: torch.cuda.Event | None = None


class _Edge:
    """What both sides share: the socket, and a communicator for large tensors (None on a "tokens" edge)."""

    def __init__(
        self, name: str, peer: int, links: Links, group: ProcessGroupCommunicator | None, device: torch.device
    ) -> None:
        self.name = name
        self._peer = peer
        self._links = links
        self._group = group
        self._device = device
        # Whether tensors can go from device memory to device memory.
        self._on_gpu = group is not None and is_nccl(group.group)

    @property
    def socket(self) -> socket.socket:
        return self._links.socket(self._peer)

    def shutdown(self) -> None:
        """Wake this side's thread and tell the peer; the edge can only be closed after that."""
        self._links.shutdown()

    def close(self) -> None:
        self._links.close()
        if self._group is not None:
            self._group.close()


class EdgeSender(_Edge):
    """The sending side. One thread."""

    _pending: deque[tuple[dist.Work, torch.Tensor]] | None = None

    def send_step(self, header: bytes, hidden: torch.Tensor | None) -> None:
        """Pass a step on. ``hidden`` [tokens, hidden size] may still be in use by the network afterwards: the
        caller must not write into it again. Raises ``EngineError`` where the peer is gone.
        """
        if hidden is None:
            return self._write(FrameKind.STEP, header)
        if not self._on_gpu:
            hidden = hidden.cpu().contiguous()
            if hidden.nbytes <= INLINE_BYTES:
                return self._write(FrameKind.STEP, header, hidden, Place.INLINE)
        self._write(FrameKind.STEP, header, hidden, Place.APART)
        return self._send_apart(hidden.contiguous())

    def send_tokens(self, header: bytes) -> None:
        self._write(FrameKind.TOKENS, header)

    def send_stop(self) -> None:
        """Let what is under way arrive, and say goodbye, where the peer still listens."""
        with suppress(EngineError):
            while self._pending:
                _wait(self._pending.popleft()[0], self.name)
            self._write(FrameKind.STOP)

    def _write(
        self, kind: FrameKind, header: bytes = b"", tensor: torch.Tensor | None = None, place: Place = Place.NONE
    ) -> None:
        try:
            write_frame(self.socket, kind, header, tensor, place)
        except OSError as error:
            raise EngineError(f"the connection broke: {error.strerror or error}", where=self.name) from error

    def _send_apart(self, hidden: torch.Tensor) -> None:
        """Start the transfer and go on computing; the tensor is kept until it has left."""
        if self._group is None:
            raise EngineError("hidden states on an edge for tokens", where=self.name)
        pending = self._pending if self._pending is not None else deque()
        self._pending = pending
        # Not waited for on the compute stream: two stages that wait for each other's sends would never end.
        pending.append((self._group.group.send([hidden], RECEIVER, 0), hidden))
        while pending and (pending[0][0].is_completed() if self._on_gpu else len(pending) > _MAX_PENDING):
            work, _ = pending.popleft()
            if not self._on_gpu:
                _wait(work, self.name)

    def close(self) -> None:
        self._pending = None
        super().close()


class EdgeReceiver(_Edge):
    """The receiving side. One thread, which does nothing else."""

    def expect(self, *, hidden_size: int, max_tokens: int, dtype: torch.dtype) -> None:
        """Agree on the largest tensor; must be called before ``receive``."""
        self._reader = FrameReader(self.socket, self.name, columns=hidden_size, max_rows=max_tokens, dtype=dtype)
        self._stream = _cuda.Stream(self._device) if self._device.type == "cuda" else None

    def receive(self) -> Received:
        """The next frame; blocks until there is one. ``EngineError`` where the peer is gone or sends nonsense."""
        frame = self._reader.read()
        if frame.place is Place.NONE:
            return Received(frame)
        if self._stream is None:
            return Received(frame, frame.tensor if frame.tensor is not None else self._receive_apart(frame, "cpu"))
        with torch.cuda.stream(self._stream):
            if frame.tensor is not None:
                hidden = frame.tensor.to(self._device)
            elif self._on_gpu:
                hidden = self._receive_apart(frame, self._device)
            else:
                hidden = self._receive_apart(frame, "cpu").to(self._device)
            ready = _cuda.Event()
            ready.record(self._stream)
        return Received(frame, hidden, ready)

    def _receive_apart(self, frame: Frame, device: torch.device | str) -> torch.Tensor:
        if self._group is None:
            raise EngineError("hidden states on an edge for tokens", where=self.name)
        hidden = torch.empty(frame.shape, dtype=frame.dtype, device=device)
        _wait(self._group.group.recv([hidden], SENDER, 0), self.name)
        return hidden


def _wait(work: dist.Work, where: str) -> None:
    try:
        work.wait()
    except RuntimeError as error:  # what gloo and NCCL raise once the peer is gone
        raise EngineError(f"the transfer broke: {error}", where=where) from error


def open_edge(
    store: Store,
    name: str,
    side: int,
    *,
    tensors: bool,
    device: torch.device,
    listen_host: str,
    cancelled: Callable[[], bool],
) -> EdgeSender | EdgeReceiver:
    """Connect one side; blocks until the other has. ``tensors``: whether hidden states travel, or only tokens."""
    peer = 1 - side
    links = connect_links(store, f"{name}/links", side, (0, 1), listen_host=listen_host, cancelled=cancelled)
    group = None
    if tensors:
        mine = physical_device(device).encode().ljust(_FACTS_BYTES)[:_FACTS_BYTES]
        links.send(peer, mine)
        theirs = bytearray(_FACTS_BYTES)
        links.recv_into(peer, memoryview(theirs))
        both_gpus = mine.startswith(b"cuda") and theirs.startswith(b"cuda") and mine != bytes(theirs)
        group = connect_group(
            store, name, side, 2, device=device if both_gpus else torch.device("cpu"), listen_host=listen_host
        )
    kind = EdgeSender if side == SENDER else EdgeReceiver
    return kind(name, peer, links, group, device)
