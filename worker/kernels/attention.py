"""Attention by the CUDA kernels: tables once a step and window, then two launches a layer, or four with splits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from hexgen.worker.attention import HeadLayout, write_kv
from hexgen.worker.batch_inputs import BatchInputs
from hexgen.worker.kernels.arithmetic import (
    GRAPH_WAVES,
    Tasks,
    Tiling,
    attention_kernel,
    most_decode_tasks,
    plan_tasks,
    tiling,
)
from hexgen.worker.kernels.device import KernelDevice, Launch
from hexgen.worker.kernels.source import KernelSpec
from hexgen.worker.kernels.step import Readers, decode_runs, host_tables
from hexgen.worker.kv import KVLayer


@dataclass(frozen=True, slots=True)
class _Kernel:
    spec: KernelSpec
    shape: Tiling
    slots: int  # blocks that the card runs at once


@dataclass(frozen=True, slots=True)
class _Part:
    """One launch, and the reduction behind it."""

    kernel: _Kernel
    tasks: torch.Tensor  # [n, 5] int32
    jobs: torch.Tensor  # [m, 4] int32
    partials: int


@dataclass(frozen=True, slots=True)
class _Tables:
    runs: torch.Tensor  # [n, 4] int32
    pages: torch.Tensor  # int32
    parts: tuple[_Part, ...]


class CudaAttention:
    """The kernels for one dtype, head size, page size and division of heads, compiled when it is made."""

    def __init__(
        self, device: KernelDevice, dtype: torch.dtype, head_dim: int, page_size: int, readers: Readers
    ) -> None:
        """``EngineError`` where a kernel does not compile or fit."""
        self._device = device
        self._head_dim = head_dim
        self._readers = readers
        name = str(dtype).removeprefix("torch.")
        group = max(readers.counts)
        shapes = [tiling(name, head_dim, device.limits, decode, group) for decode in (False, True)]
        specs = [
            attention_kernel(name, head_dim, page_size, s, d) for s, d in zip(shapes, (False, True), strict=True)
        ]
        self._reduce = KernelSpec.make("attention_reduce", "attention_reduce", name, head=head_dim)
        device.prepare([*specs, self._reduce])
        kernels = []
        for spec, shape in zip(specs, shapes, strict=True):
            device.allow_shared(spec, shape.shared_bytes)
            kernels.append(_Kernel(spec, shape, device.blocks_at_once(spec, shape.threads, shape.shared_bytes)))
        self._long, self._short = kernels
        self._scale = np.float32(head_dim**-0.5 * math.log2(math.e))

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor | None,
        layer: KVLayer,
        batch: BatchInputs,
        window: int | None,
        heads: HeadLayout,
        tree: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ``Attention.attend``; the heads of a row of ``q`` must lie side by side.

        ``tree`` ``[tokens, words]`` int32: bit k of a token's row says whether it sees the k-th token of its run
        (speculation, to come); None: it sees all up to itself.
        """
        if kv is not None:
            write_kv(kv, layer, batch, heads)
        out = torch.empty((q.shape[0], heads.query_heads, heads.head_dim), dtype=q.dtype, device=q.device)
        tables = self._tables(batch, window)
        for part in tables.parts:
            self._run(part, tables, q, layer, out, window, tree)
        return out.view(q.shape[0], -1)

    def _run(
        self,
        part: _Part,
        tables: _Tables,
        q: torch.Tensor,
        layer: KVLayer,
        out: torch.Tensor,
        window: int | None,
        tree: torch.Tensor | None,
    ) -> None:
        shape, readers = part.kernel.shape, self._readers
        stats = results = None
        if part.partials:
            rows = part.partials * readers.kv_heads * shape.rows
            scratch = torch.empty(rows * (self._head_dim + 2), dtype=torch.float32, device=q.device)
            results, stats = scratch[: rows * self._head_dim], scratch[rows * self._head_dim :]
        parameters = (
            q,
            layer.rows,
            out,
            tables.runs,
            part.tasks,
            tables.pages,
            results,
            stats,
            tree,
            np.int64(q.stride(0)),
            np.int32(readers.query_heads),
            np.int32(readers.kv_heads),
            np.int32(readers.group),
            np.int32(readers.shift),
            np.int32(window or 0),
            np.int32(0 if tree is None else tree.shape[1]),
            self._scale,
        )
        how = Launch((part.tasks.shape[0], readers.kv_heads), shape.threads, shape.shared_bytes)
        self._device.launch(part.kernel.spec, how, *parameters)
        if part.partials:
            how = Launch((part.jobs.shape[0] * shape.rows, readers.kv_heads), 128)
            self._device.launch(self._reduce, how, part.jobs, np.int32(shape.rows), *parameters)

    def _tables(self, batch: BatchInputs, window: int | None) -> _Tables:
        known: _Tables | None = batch.memo.get(("cuda attention", window))
        if known is None:
            long, short = self._long, self._short
            host = host_tables(batch, window, self._readers, long.shape, short.shape, long.slots, short.slots)
            pairs = ((host.long, long), (host.short, short))
            known = _Tables(
                torch.from_numpy(host.runs).to(batch.device),
                torch.from_numpy(host.pages).to(batch.device),
                tuple(self._part(tasks, kernel, batch.device) for tasks, kernel in pairs if tasks is not None),
            )
            batch.memo[("cuda attention", window)] = known
        return known

    # ---- decode steps in fixed places, for captured graphs -----------------------------------------------

    def most_decode_tasks(self, sequences: int) -> tuple[int, int]:
        """Tasks and jobs of a step of so many single tokens, at most."""
        return most_decode_tasks(sequences, self._short.shape, self._readers.counts, self._short.slots)

    def decode_tasks(self, batch: BatchInputs, window: int | None) -> Tasks:
        """Of a batch of single tokens, as many as ``most_decode_tasks`` says at most."""
        shapes, shape = decode_runs(batch), self._short.shape
        return plan_tasks(shapes, shape, self._readers.counts, window, self._short.slots, most_waves=GRAPH_WAVES)

    def fix_tables(
        self,
        batch: BatchInputs,
        window: int | None,
        runs: torch.Tensor,
        pages: torch.Tensor,
        tasks: torch.Tensor,
        jobs: torch.Tensor,
    ) -> None:
        """From now on ``attend`` reads these for ``batch``, whatever is in them when it runs: runs ``[n, 4]``,
        tasks ``[most, 5]`` and jobs ``[most, 4]`` int32, of which the unused begin with ``UNUSED``.
        """
        part = _Part(self._short, tasks, jobs, partials=tasks.shape[0])
        batch.memo[("cuda attention", window)] = _Tables(runs, pages, (part,))

    @staticmethod
    def _part(tasks: Tasks, kernel: _Kernel, device: torch.device) -> _Part:
        return _Part(
            kernel,
            torch.from_numpy(tasks.tasks).to(device),
            torch.from_numpy(tasks.jobs).to(device),
            tasks.partials,
        )
