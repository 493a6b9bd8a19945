"""How the leader of a stage tells the other ranks what to run.

Each of them holds a direct socket to the leader: steps come down it, and its end tells either side that the other
has died. Hidden states too large for the socket are broadcast on the stage's communicator, after their header.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from contextlib import suppress

import torch

from hexgen.errors import EngineError
from hexgen.worker.communicator import Communicator
from hexgen.worker.framing import INLINE_BYTES, Frame, FrameKind, FrameReader, Place, write_frame
from hexgen.worker.links import Links

LEADER = 0


class Followers:
    """The leader's side. ``share`` and ``stop`` belong to the stage's loop, ``watch`` to a thread of its own."""

    def __init__(self, links: Links, communicator: Communicator, device: torch.device, stage: str) -> None:
        self._links = links
        self._communicator = communicator
        self._on_gpu = device.type == "cuda"
        self._stage = stage

    def share(self, header: bytes, hidden: torch.Tensor | None) -> None:
        """Give every rank the step in ``header``, and its ``hidden`` states [tokens, hidden size] if it has
        any.
        """
        place = Place.NONE
        if hidden is not None:
            place = Place.APART if self._on_gpu or hidden.nbytes > INLINE_BYTES else Place.INLINE
        for rank in self._links.peers:
            self._write(rank, FrameKind.STEP, header, hidden, place)
        if hidden is not None and place is Place.APART:
            self._communicator.broadcast(hidden, LEADER)

    def stop(self) -> None:
        """Let the ranks end in good order; those that have ended already are passed over."""
        for rank in self._links.peers:
            with suppress(EngineError):
                self._write(rank, FrameKind.STOP)

    def watch(self, on_end: Callable[[EngineError], None]) -> None:
        """Block until a rank ends (they never say anything), then call ``on_end`` once."""
        poll = select.poll()
        ranks = {self._links.socket(r).fileno(): r for r in self._links.peers}
        for descriptor in ranks:
            poll.register(descriptor, select.POLLIN | select.POLLHUP | select.POLLERR)
        descriptor, _ = poll.poll()[0]
        on_end(EngineError(f"rank {ranks.get(descriptor)} has ended", where=f"stage {self._stage}"))

    def shutdown(self) -> None:
        self._links.shutdown()

    def close(self) -> None:
        self._links.close()

    def _write(
        self,
        rank: int,
        kind: FrameKind,
        header: bytes = b"",
        tensor: torch.Tensor | None = None,
        place: Place = Place.NONE,
    ) -> None:
        try:
            write_frame(self._links.socket(rank), kind, header, tensor, place)
        except OSError as error:
            raise EngineError(
                f"rank {rank} has ended: {error.strerror or error}", where=f"stage {self._stage}"
            ) from error


class Leader:
    """Another rank's side: what the leader says, one step after the other."""

    def __init__(
        self,
        links: Links,
        communicator: Communicator,
        device: torch.device,
        *,
        stage: str,
        hidden_size: int,
        max_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        self._links = links
        self._communicator = communicator
        self._device = device
        self._reader = FrameReader(
            links.socket(LEADER),
            f"stage {stage}, leader",
            columns=hidden_size,
            max_rows=max_tokens,
            dtype=dtype,
        )

    def receive(self) -> tuple[Frame, torch.Tensor | None]:
        """The next frame with its hidden states; blocks. ``EngineError`` where the leader is gone."""
        frame = self._reader.read()
        if frame.place is Place.NONE:
            return frame, None
        if frame.tensor is not None:
            return frame, frame.tensor.to(self._device)
        hidden = torch.empty(frame.shape, dtype=frame.dtype, device=self._device)
        self._communicator.broadcast(hidden, LEADER)
        return frame, hidden

    def shutdown(self) -> None:
        self._links.shutdown()

    def close(self) -> None:
        self._links.close()
