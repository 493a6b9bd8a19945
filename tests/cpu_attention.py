"""The CPU kernels' attention alone, behind the interface of all others: a rank runs its layers whole."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from hexgen.worker.attention import HeadLayout, write_kv
from hexgen.worker.batch_inputs import BatchInputs
from hexgen.worker.cpu_kernels import CpuKernels, LayerStruct, ShapeStruct, step_tables
from hexgen.worker.kv import KVLayer


class CpuAttention:
    def __init__(self, kernels: CpuKernels, threads: int = 1) -> None:
        self._kernels, self._threads = kernels, threads

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor | None,
        layer: KVLayer,
        batch: BatchInputs,
        window: int | None,
        heads: HeadLayout,
    ) -> torch.Tensor:
        """As ``Attention.attend``."""
        if kv is not None:
            write_kv(kv, layer, batch, heads)
        readers = np.cumsum((0, *heads.readers.counts), dtype=np.int64)
        pool = layer.pool
        shape = ShapeStruct(
            hidden=0, query_heads=heads.query_heads, kv_heads=heads.kv_heads, head_dim=heads.head_dim, columns=0,
            page_size=pool.page_size, threads=self._threads, adds_residual=1, first_reader=readers.ctypes.data,
            eps=0.0,
        )  # fmt: skip
        tables = step_tables(batch, pool)
        told = tables.step
        told.kv, told.layer_elements = layer.rows.data_ptr(), layer.rows.numel()
        floats = self._kernels.scratch_floats(ctypes.addressof(shape), ctypes.addressof(told))
        scratch = torch.empty(floats)
        told.scratch = scratch.data_ptr()
        tokens = q.shape[0]
        qkv = torch.zeros((tokens, heads.query_heads + 2 * heads.kv_heads, heads.head_dim))
        qkv[:, : heads.query_heads] = q.float() * heads.head_dim**-0.5
        out = torch.empty((tokens, heads.query_heads * heads.head_dim))
        weights = LayerStruct(window=window or 0)
        self._kernels.attention(
            ctypes.addressof(shape),
            ctypes.addressof(weights),
            ctypes.addressof(told),
            qkv.data_ptr(),
            out.data_ptr(),
        )
        return out.to(q.dtype)
