"""One stage by itself, in this process: a rank's configuration, and weights that need no checkpoint."""

from __future__ import annotations

import torch

from hexgen.errors import EngineError
from hexgen.model import DType, ModelSpec
from hexgen.split import split_stage
from hexgen.worker.config import RankConfig, RouteRole

PAGE_SIZE = 16  # as `EngineOptions` has it
TOKEN_BUDGET = 512
BLOCK = 1 << 20  # elements of random numbers, repeated to fill larger tensors


def solo_config(
    model: ModelSpec, dtype: DType, device: str, threads: int, *, layers: int, pages: int, max_sequences: int
) -> RankConfig:
    """Of the only rank of the only stage: the first ``layers`` layers, embedding and sampling."""
    role = RouteRole(0, (0, layers), pages, 1, True, True, None, "s", "s")
    return RankConfig(
        deployment="alone", stage="s", rank=0, width=1, device=device, dtype=dtype, threads=threads, model=model,
        model_path="", layers=(0, layers), slices=split_stage(model, 1), routes=(role,), edges=(),
        page_size=PAGE_SIZE, token_budget=TOKEN_BUDGET, max_sequences=max_sequences,
        max_context=model.max_context, prefix_cache=False, store_host="", store_port=0, listen_host="",
        secret="",
    )  # fmt: skip


class RandomWeights:
    """Gives what `Checkpoint` gives, of any shape, from one block of random numbers."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(1)) * 0.02

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        return

    def stored_bytes(
        self, name: str, dim: int | None = None, start: int | None = None, end: int | None = None
    ) -> int:
        return 0

    def read(
        self,
        name: str,
        dim: int | None = None,
        start: int | None = None,
        end: int | None = None,
        *,
        dtype: torch.dtype,
        shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        if shape is None:
            raise EngineError(f"the shape of {name} is not known")
        wanted = list(shape)
        if dim is not None and start is not None and end is not None:
            wanted[dim] = end - start
        if len(wanted) == 1:
            return torch.ones(wanted, dtype=dtype)
        count = 1
        for size in wanted:
            count *= size
        block = self._block.to(dtype)
        return block.repeat(-(-count // BLOCK))[:count].view(wanted)
