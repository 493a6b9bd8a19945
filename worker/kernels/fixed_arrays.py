"""Integer arrays in fixed places, one behind the other: what a captured graph reads, filled by one copy a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16  # bytes: what kernels read in one piece
Numbers = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ArrayShape:
    shape: tuple[int, ...]
    dtype: torch.dtype  # int32 or int64


class FixedArrays:
    """Arrays by name, on the device, and two copies of them on the host: one is filled while the other may still
    be on its way.

        host = arrays.fill()      # numpy arrays of the host's turn, with what was in them two steps before
        host["tokens"][:3] = ...
        arrays.send(used=8)       # of the last array; the others go whole
    """

    def __init__(self, shapes: Mapping[str, ArrayShape], device: torch.device) -> None:
        self._device = device
        places: dict[str, tuple[int, ArrayShape]] = {}
        at = 0
        for name, array in shapes.items():
            places[name] = (at, array)
            at += -(-_bytes(array) // _ALIGNMENT) * _ALIGNMENT
        self._last = next(reversed(places))
        on_card = device.type == "cuda"
        self._on_device = torch.zeros(at, dtype=torch.uint8, device=device)
        self._staging = [torch.zeros(at, dtype=torch.uint8, pin_memory=on_card) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._places = places
        self._host = [{name: _view(s, *place).numpy() for name, place in places.items()} for s in self._staging]

    def __getitem__(self, name: str) -> torch.Tensor:
        """The array on the device: always the same memory."""
        return _view(self._on_device, *self._places[name])

    def fill(self) -> dict[str, Numbers]:
        """The next host copy, once its last contents have left."""
        self._turn = 1 - self._turn
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        return self._host[self._turn]

    def send(self, used: int) -> None:
        """What was filled goes to the device, on the current stream; of the last array only ``used`` elements."""
        begin, array = self._places[self._last]
        end = begin + used * array.dtype.itemsize
        self._on_device[:end].copy_(self._staging[self._turn][:end], non_blocking=True)
        if self._device.type == "cuda":
            event = self._sent[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))


def _bytes(array: ArrayShape) -> int:
    return int(np.prod(array.shape)) * array.dtype.itemsize


def _view(buffer: torch.Tensor, at: int, array: ArrayShape) -> torch.Tensor:
    return buffer[at : at + _bytes(array)].view(array.dtype).view(array.shape)
