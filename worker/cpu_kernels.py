"""The layers of a rank on a CPU by kernels of our own (``kernels/cpu``): one call a step, or two a layer where the
ranks of a stage add up their parts in between.

The structures mirror those of ``kernels/cpu/stage.cpp``, field by field.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hexgen.errors import EngineError
from hexgen.model import ModelSpec
from hexgen.plan import Layers
from hexgen.split import RankSlice
from hexgen.worker.attention_choice import VARIABLE
from hexgen.worker.batch_inputs import BatchInputs, Ints, run_table
from hexgen.worker.communicator import Communicator
from hexgen.worker.cpu_build import cpu_library
from hexgen.worker.kv import KVPool
from hexgen.worker.layers import LayerWeights, StepContext
from hexgen.worker.rope import RotaryEmbedding
from hexgen.worker.weight_layouts import Packed

_ATTENTION, _MLP, _BOTH = 1, 2, 3
Function = Any  # of a ctypes library
_log = logging.getLogger(__name__)


class ShapeStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "query_heads", "kv_heads", "head_dim", "columns")),
        *((name, ctypes.c_int64) for name in ("page_size", "threads", "adds_residual")),
        ("first_reader", ctypes.c_void_p),
        ("eps", ctypes.c_double),
    )


class LayerStruct(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias")
        ),
        *((name, ctypes.c_void_p) for name in ("post_norm", "gate_up", "gate_up_bias", "down", "down_bias")),
        ("window", ctypes.c_int64),
    )


class StepStruct(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("n_runs", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("runs", "pages", "slots", "cos", "sin", "hidden", "kv")),
        ("layer_elements", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class CpuKernels:
    """The library's functions for one dtype."""

    layers: Function
    logits: Function
    rows: Function
    angles: Function
    product: Function
    attention: Function
    scratch_floats: Function
    layout: Packed

    @staticmethod
    def open(dtype: torch.dtype, library: ctypes.CDLL | None = None) -> CpuKernels:
        """``EngineError`` where this machine or dtype cannot have them."""
        name = str(dtype).removeprefix("torch.")
        if name not in ("float32", "bfloat16"):
            raise EngineError(f"no CPU kernels for {name}")
        loaded = library or cpu_library()
        i64, real, pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p

        def function(name: str, returns: Any, *arguments: Any) -> Function:
            found = loaded[f"hexgen_{name}"]
            found.restype, found.argtypes = returns, arguments
            return found

        ends = (*(3 * [pointer]), *(3 * [i64]), real, i64, pointer, pointer)
        angles = (pointer, i64, pointer, i64, i64, real, pointer, pointer)
        return CpuKernels(
            layers=function(f"layers_{name}", None, pointer, pointer, i64, pointer, i64),
            logits=function(f"logits_{name}", None, *ends),
            rows=function(f"rows_{name}", None, pointer, i64, i64, pointer, i64, pointer),
            angles=function(f"angles_{name}", None, *angles),
            product=function(f"product_{name}", None, pointer, i64, i64, pointer, i64, i64, pointer),
            attention=function(f"attention_{name}", None, *(5 * [pointer])),
            scratch_floats=function("scratch_floats", i64, pointer, pointer),
            layout=Packed(int(function("lanes", i64)())),
        )


def choose_cpu_kernels(device: torch.device, dtype: torch.dtype) -> CpuKernels | None:
    """The kernels on CPUs, unless ``HEXGEN_ATTENTION`` asks for something else or they cannot be had."""
    if device.type != "cpu" or VARIABLE in os.environ:
        return None
    try:
        return CpuKernels.open(dtype)
    except (EngineError, OSError) as error:
        _log.warning("torch's own operations serve, not the CPU kernels: %s", error)
        return None


@dataclass(slots=True)
class StepTables:
    """What the layers of a step share; arrays are kept here because the structure only points to them."""

    step: StepStruct
    arrays: tuple[Ints, ...]


class CpuStage:
    """The layers that a rank holds, packed, and the memory that a step needs. One thread at a time."""

    def __init__(
        self,
        kernels: CpuKernels,
        model: ModelSpec,
        rank: RankSlice,
        communicator: Communicator,
        layers: dict[int, LayerWeights],
        page_size: int,
        threads: int,
    ) -> None:
        self._kernels = kernels
        self._communicator = communicator
        self._threads = threads
        self._hidden, self._eps = model.hidden_size, model.norm_eps
        group = model.heads // model.kv_heads
        # Query head h reads KV head h // group: of this rank's heads, each KV head's readers lie together.
        bounds = [h * group - rank.query_heads[0] for h in range(rank.kv_heads[0], rank.kv_heads[1] + 1)]
        self._readers = np.clip(np.array(bounds, dtype=np.int64), 0, rank.n_query_heads)
        self._shape = ShapeStruct(
            hidden=model.hidden_size,
            query_heads=rank.n_query_heads,
            kv_heads=rank.n_kv_heads,
            head_dim=model.head_dim,
            columns=rank.n_columns,
            page_size=page_size,
            threads=threads,
            adds_residual=communicator.rank == 0,
            first_reader=self._readers.ctypes.data,
            eps=model.norm_eps,
        )
        self._first = min(layers, default=0)
        self._weights = layers  # alive for as long as the structures point to them
        self._structures = (LayerStruct * len(layers))()
        for i, weights in layers.items():
            structure = self._structures[i - self._first]
            for name in LayerWeights.__slots__:
                tensor = getattr(weights, name)
                setattr(structure, name, None if tensor is None else tensor.data_ptr())
            structure.window = model.window(i) or 0
        self._scratch = torch.empty(0, dtype=torch.float32)
        self._logits = torch.empty(0, dtype=torch.float32)  # reused, as the scratch memory is

    def forward(self, hidden: torch.Tensor, step: StepContext, pool: KVPool, layers: Layers) -> None:
        """``hidden`` ``[tokens, hidden]``, contiguous, is replaced in place by the output of layers
        ``[start, end)``, of which ``pool`` holds the first as its layer 0.
        """
        told = self._told(step.batch, pool)
        told.cos, told.sin, told.hidden = step.cos.data_ptr(), step.sin.data_ptr(), hidden.data_ptr()
        at, run = (
            ctypes.addressof(self._structures) + (layers[0] - self._first) * ctypes.sizeof(LayerStruct),
            self._run,
        )
        if self._communicator.size == 1:
            run(at, layers[1] - layers[0], told, _BOTH)
            return
        for _ in range(*layers):
            run(at, 1, told, _ATTENTION)
            self._communicator.all_reduce(hidden)
            run(at, 1, told, _MLP)
            self._communicator.all_reduce(hidden)
            at += ctypes.sizeof(LayerStruct)
            told.kv += told.layer_elements * hidden.element_size()

    def embed(self, packed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """``[ids, hidden]``: rows of a tied head, of which ``ids`` must all be."""
        out = torch.empty((ids.shape[0], self._hidden), dtype=packed.dtype)
        sizes = packed.numel() // self._hidden, self._hidden
        self._kernels.rows(packed.data_ptr(), *sizes, ids.contiguous().data_ptr(), ids.shape[0], out.data_ptr())
        return out

    def rotary(self, rope: RotaryEmbedding, batch: BatchInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``rope.tables`` gives, in one call: cosines and signed sines ``[tokens, head_dim]``."""
        frequencies = rope.frequencies(batch.lengths)
        dim, positions = 2 * frequencies.shape[-1], batch.positions
        cos, sin = torch.empty((2, batch.n_tokens, dim), dtype=rope.dtype).unbind()
        each = dim // 2 if frequencies.dim() == 2 else 0
        self._kernels.angles(
            positions.data_ptr(), batch.n_tokens, frequencies.data_ptr(), each, dim, rope.factor, cos.data_ptr(),
            sin.data_ptr(),
        )  # fmt: skip
        return cos, sin

    def logits(self, rows: torch.Tensor, norm: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """``rows`` ``[rows, hidden]`` -> float32 ``[rows, outputs of the head]``; valid until the next call."""
        rows = rows.contiguous()
        outputs = head.numel() // self._hidden
        if self._logits.numel() < rows.shape[0] * outputs:
            self._logits = torch.empty(rows.shape[0] * outputs, dtype=torch.float32)
        out = self._logits[: rows.shape[0] * outputs].view(rows.shape[0], outputs)
        scratch = self._room(rows.numel())
        sizes = (rows.shape[0], self._hidden, outputs, self._eps, self._threads)
        tensors = (rows.data_ptr(), norm.data_ptr(), head.data_ptr())
        self._kernels.logits(*tensors, *sizes, scratch, out.data_ptr())
        return out

    def _run(self, layers: int, count: int, told: StepStruct, halves: int) -> None:
        self._kernels.layers(ctypes.addressof(self._shape), layers, count, ctypes.addressof(told), halves)

    def _room(self, floats: int) -> int:
        """The address of scratch memory, reused: fresh memory costs a page fault every 4 KiB."""
        if self._scratch.numel() < floats:
            self._scratch = torch.empty(floats, dtype=torch.float32)
        return self._scratch.data_ptr()

    def _told(self, batch: BatchInputs, pool: KVPool) -> StepStruct:
        tables: StepTables | None = batch.memo.get("cpu")
        if tables is None:
            tables = batch.memo["cpu"] = step_tables(batch, pool)
        told = tables.step
        first = pool.layer(0).rows
        told.kv, told.layer_elements = first.data_ptr(), first.numel()
        told.scratch = self._room(
            self._kernels.scratch_floats(ctypes.addressof(self._shape), ctypes.addressof(told))
        )
        return told


def step_tables(batch: BatchInputs, pool: KVPool) -> StepTables:
    """Runs (row, tokens, first position, place in pages), pages and slots of a step."""
    prefills, decodes = batch.prefills, batch.decodes
    runs = [*((run.row, run.length, run.start) for run in prefills), *decodes.runs]
    table, pages = run_table(runs, [*(run.pages for run in prefills), *decodes.pages])
    slots = batch.slots(pool.page_size)
    step = StepStruct(tokens=batch.n_tokens, n_runs=len(runs))
    step.runs, step.pages, step.slots = table.ctypes.data, pages.ctypes.data, slots.ctypes.data
    return StepTables(step, (table, pages, slots))
