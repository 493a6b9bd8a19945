"""Which implementation of attention a rank uses: CUDA kernels, torch's fused attention over gathered pages, or the
float64 reference that both are tested against.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Protocol

import torch

from hexgen.errors import EngineError
from hexgen.worker.attention import HeadLayout, attend, reference_attention, row_numbers, write_kv
from hexgen.worker.batch_inputs import BatchInputs, Ints
from hexgen.worker.kernels.arithmetic import supported
from hexgen.worker.kernels.attention import CudaAttention
from hexgen.worker.kernels.device import kernel_device
from hexgen.worker.kernels.layer import CudaCandidates, CudaLayerKernels
from hexgen.worker.kv import KVLayer

# "cuda" (the default on CUDA devices), "sdpa" or "reference": for comparisons and in search of a defect.
VARIABLE = "HEXGEN_ATTENTION"
_log = logging.getLogger(__name__)


class Attention(Protocol):
    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor | None,
        layer: KVLayer,
        batch: BatchInputs,
        window: int | None,
        heads: HeadLayout,
    ) -> torch.Tensor:
        """``q`` ``[tokens, query_heads, head_dim]``, ``kv`` ``[tokens, 2, kv_heads, head_dim]`` (None: they are in
        their pages already) -> ``[tokens, query_heads * head_dim]``.
        """


class SdpaAttention:
    """torch's scaled_dot_product_attention over gathered pages."""

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor | None,
        layer: KVLayer,
        batch: BatchInputs,
        window: int | None,
        heads: HeadLayout,
    ) -> torch.Tensor:
        if kv is None:  # a prefill from position 0 attends to the step's own rows without gathering
            rows = layer.rows[torch.from_numpy(row_numbers(batch, layer.pool)).to(batch.device)]
            kv = rows.view(q.shape[0], 2, heads.kv_heads, heads.head_dim)
        return attend(q, kv, layer, batch, window, heads)


class ReferenceAttention:
    """Plain attention in float64, one sequence at a time."""

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor | None,
        layer: KVLayer,
        batch: BatchInputs,
        window: int | None,
        heads: HeadLayout,
    ) -> torch.Tensor:
        if kv is not None:
            write_kv(kv, layer, batch, heads)
        pool = layer.pool
        pages = layer.rows.view(pool.pages, 2, pool.kv_heads, pool.page_size, pool.head_dim)
        out = torch.empty_like(q)
        index = heads.readers.reads
        decodes = batch.decodes
        runs: list[tuple[int, int, int, Ints]] = [(r.row, r.length, r.start, r.pages) for r in batch.prefills]
        runs += [(*run, pages) for run, pages in zip(decodes.runs, decodes.pages, strict=True)]
        for row, length, start, table in runs:
            used = pages[torch.from_numpy(table).to(q.device)].permute(1, 0, 3, 2, 4).flatten(1, 2)
            keys, values = used[:, : start + length].cpu()
            mine = q[row : row + length].cpu()
            out[row : row + length] = reference_attention(mine, keys, values, start, window, index).to(q)
        return out.reshape(q.shape[0], -1)


@dataclass(frozen=True, slots=True)
class Operations:
    """How a rank computes its layers: ``kernels`` None is torch for all but attention."""

    attention: Attention
    kernels: CudaLayerKernels | None


def choose_operations(
    device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int, heads: HeadLayout, eps: float
) -> Operations:
    """By device and ``HEXGEN_ATTENTION``. Where a CUDA device cannot have the kernels, one line of the log says
    why, and torch's attention serves.
    """
    wanted = os.environ.get(VARIABLE, "cuda" if device.type == "cuda" else "sdpa")
    if wanted == "reference":
        return Operations(ReferenceAttention(), None)
    if wanted not in ("cuda", "sdpa"):
        raise EngineError(f"{wanted!r} is none of cuda, sdpa, reference", where=VARIABLE)
    if wanted == "sdpa" or device.type != "cuda":
        return Operations(SdpaAttention(), None)
    try:
        name = str(dtype).removeprefix("torch.")
        if not supported(name, head_dim, torch.cuda.get_device_capability(device)):
            raise EngineError(f"no kernel for {name} heads of {head_dim} on this card")
        kernels = kernel_device(device)
        return Operations(
            CudaAttention(kernels, dtype, head_dim, page_size, heads.readers),
            CudaLayerKernels(kernels, dtype, head_dim, eps),
        )
    except EngineError as error:
        _log.warning("%s: torch's SDPA over gathered pages serves, not the CUDA kernels: %s", device, error)
        return Operations(SdpaAttention(), None)


def choose_candidates(device: torch.device) -> CudaCandidates | None:
    """The kernels that reduce logits, on a CUDA device that can have them; None: torch does (the log has said why,
    when attention was chosen).
    """
    if device.type != "cuda" or os.environ.get(VARIABLE, "cuda") != "cuda":
        return None
    try:
        return CudaCandidates(kernel_device(device))
    except EngineError:
        return None
