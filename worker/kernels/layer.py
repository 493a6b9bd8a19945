"""A layer's other operations by CUDA kernels: rotary embedding with the page write, norms, SwiGLU, candidates."""

from __future__ import annotations

import numpy as np
import torch

from hexgen.worker.batch_inputs import BatchInputs
from hexgen.worker.kernels.device import KernelDevice, Launch
from hexgen.worker.kernels.source import KernelSpec
from hexgen.worker.kv import KVLayer

WARPS = 4  # of a block of rope_kv_write: one a head
NORM_THREADS = 256
# Blocks of silu_mul along a row: a block's 256 threads take 16 bytes each.
_CHUNK_BYTES = 16


class CudaLayerKernels:
    """For one dtype and head size, compiled when it is made (``EngineError`` where that fails)."""

    def __init__(self, device: KernelDevice, dtype: torch.dtype, head_dim: int, eps: float) -> None:
        name = str(dtype).removeprefix("torch.")
        self._device = device
        self._eps = np.float32(eps)
        self._rope = KernelSpec.make("rope_kv_write", "rope_kv_write", name, head=head_dim)
        self._norm = KernelSpec.make("rms_norm", "rms_norm", name)
        self._silu = KernelSpec.make("silu_mul", "silu_mul", name)
        device.prepare([self._rope, self._norm, self._silu])

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        """Of the rows of ``x`` ``[tokens, size]``, contiguous; with ``add``, x += add comes first, in place."""
        out = torch.empty_like(x)
        how = Launch((x.shape[0], 1), NORM_THREADS)
        self._device.launch(self._norm, how, x, add, weight, out, np.int32(x.shape[1]), self._eps)
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``[tokens, 2 * columns]`` -> ``[tokens, columns]``: silu(first half) * second half."""
        tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((tokens, columns), dtype=gate_up.dtype, device=gate_up.device)
        per_block = NORM_THREADS * (_CHUNK_BYTES // gate_up.element_size())
        # Rows lie along y, of which a grid has 65,535 at most: more than a step's token budget ever is.
        how = Launch((-(-columns // per_block), tokens), NORM_THREADS)
        self._device.launch(self._silu, how, gate_up, out, np.int32(columns))
        return out

    def rope_kv_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norms: tuple[torch.Tensor | None, torch.Tensor | None],
        layer: KVLayer,
        batch: BatchInputs,
        query_heads: int,
    ) -> None:
        """``qkv`` ``[tokens, (query heads + 2 kv heads) * head_dim]``: queries are normed and rotated in place,
        keys and values go to their pages. ``cos`` and ``sin``: ``RotaryEmbedding.tables``.
        """
        pool = layer.pool
        slots = batch.memo.get("slots")
        if slots is None:
            slots = batch.memo["slots"] = torch.from_numpy(batch.slots(pool.page_size)).to(batch.device)
        heads = query_heads + 2 * pool.kv_heads
        self._device.launch(
            self._rope,
            Launch((-(-qkv.shape[0] * heads // WARPS), 1), 32 * WARPS),
            qkv,
            cos,
            sin,
            *norms,
            layer.rows,
            slots,
            np.int64(qkv.stride(0)),
            np.int32(qkv.shape[0]),
            np.int32(query_heads),
            np.int32(pool.kv_heads),
            np.int32(pool.page_size),
            self._eps,
        )


class CudaCandidates:
    """The best tokens of a shard of the vocabulary, on the device."""

    def __init__(self, device: KernelDevice) -> None:
        self._device = device
        self._greedy = KernelSpec.make("candidates", "greedy", "float32")
        self._top = KernelSpec.make("candidates", "top_keys", "float32")
        device.prepare([self._greedy, self._top])

    def greedy(self, logits: torch.Tensor, rows: torch.Tensor | None, first_id: int) -> torch.Tensor:
        """``[rows, columns]`` float32, contiguous -> int64 ``[len(rows)]``: the key (``sampling_math.to_keys``) of
        the largest logit of each of ``rows`` (int64 on the device; None: of all).
        """
        n = logits.shape[0] if rows is None else rows.shape[0]
        out = torch.empty(n, dtype=torch.int64, device=logits.device)
        self._device.launch(
            self._greedy,
            Launch((n, 1), 256),
            logits,
            rows,
            out,
            np.int32(logits.shape[1]),
            np.int32(first_id),
        )
        return out

    def top_keys(self, logits: torch.Tensor, count: int, first_id: int) -> torch.Tensor:
        """int64 ``[rows, count]``: the keys of the ``count`` largest logits of every row, in no order."""
        out = torch.empty((logits.shape[0], count), dtype=torch.int64, device=logits.device)
        if count:
            sizes = (np.int32(logits.shape[1]), np.int32(first_id), np.int32(count))
            self._device.launch(self._top, Launch((logits.shape[0], 1), 256), logits, out, *sizes)
        return out
