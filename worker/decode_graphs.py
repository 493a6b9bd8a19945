"""Decode steps as CUDA graphs: captured once for some numbers of sequences, replayed with each step's figures.

A decode step launches some ten kernels a layer, and for a small model or a fast card the host takes longer to
launch them than the card to run them. A graph is launched at once. It reads its inputs where it was captured:
tokens, positions, page tables and tasks lie in ``FixedArrays``, hidden states in a tensor of this module's own. A
step of n sequences takes the graph for the next larger number; the rows beyond n compute what nobody reads and
write nothing (negative slots and runs). All ranks of a stage capture and replay the same graphs in the same order,
so that their collectives, captured too, meet.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hexgen.batching.segments import Step
from hexgen.model import ModelSpec
from hexgen.worker.batch_inputs import BatchInputs, Decodes, PageTables, build_batch, run_table
from hexgen.worker.communicator import Communicator
from hexgen.worker.config import RankConfig, RouteRole
from hexgen.worker.kernels.arithmetic import UNUSED
from hexgen.worker.kernels.attention import CudaAttention
from hexgen.worker.kernels.fixed_arrays import ArrayShape, FixedArrays
from hexgen.worker.kv import KVPool
from hexgen.worker.process_group import ProcessGroupCommunicator
from hexgen.worker.stage_model import StageModel

# Numbers of sequences that get a graph of their own: rows beyond a step's own are computed for nothing.
SEQUENCES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
VARIABLE = "HEXGEN_CUDA_GRAPHS"  # "0": none, in search of a defect
_log = logging.getLogger(__name__)

Work = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """Runs work once and makes it repeatable; the result is always in the tensor that it returns."""

    def record(self, work: Work) -> tuple[torch.Tensor, Callable[[], None]]: ...


class CudaRecorder:
    """``torch.cuda.graph``. Graphs share one pool of memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries allocate and choose on their first call: not in a graph
                work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads receive from edges meanwhile: only this one's calls are captured, and checked.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()
            return result, graph.replay


@dataclass(frozen=True, slots=True)
class _Graph:
    arrays: FixedArrays
    hidden: torch.Tensor | None  # where a stage that does not embed takes its input from
    result: torch.Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """The graphs of one route on one rank. Capturing runs the model on rows that leave no trace."""

    def __init__(
        self,
        spec: ModelSpec,
        model: StageModel,
        attention: CudaAttention,
        pool: KVPool,
        role: RouteRole,
        max_sequences: int,
        recorder: Recorder,
    ) -> None:
        self._model = model
        self._attention = attention
        self._pool = pool
        self._role = role
        self._hidden_size = spec.hidden_size
        self._windows = tuple(dict.fromkeys(spec.window(i) for i in range(*role.layers)))
        sizes = [n for n in SEQUENCES if n < max_sequences]
        sizes.append(min(SEQUENCES[-1], max_sequences))
        # The largest first: smaller ones then find their memory in the pool.
        self._graphs = {n: self._capture(n, recorder) for n in sorted(sizes, reverse=True)}

    def takes(self, step: Step) -> bool:
        """Whether every segment is one token, and sampled where this stage samples."""
        segments = step.segments
        return 0 < len(segments) <= max(self._graphs) and all(
            len(s.tokens) == 1 and (s.sample or not self._role.samples) for s in segments
        )

    def run(self, step: Step, tables: PageTables, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """Hidden states ``[tokens, hidden]``, or logits ``[sampled, n_vocab of this rank]`` in the order of
        ``step.sampled``; they stay until the next step. None where the step's page tables are too long.
        """
        batch = build_batch(step, tables, self._pool.page_size, "cpu")
        n = batch.n_tokens
        pages = sum(table.size for table in batch.decodes.pages)
        if pages > self._most_pages:
            return None
        graph = self._graphs[min(size for size in self._graphs if size >= n)]
        self._fill(graph.arrays, batch)
        if graph.hidden is not None and hidden is not None:
            graph.hidden[:n].copy_(hidden)
        graph.replay()
        return graph.result[:n]

    # ---- capturing ---------------------------------------------------------------------------------------

    @property
    def _most_pages(self) -> int:
        """Sequences that share a prefix list its pages each; twice the pool is room for most of that."""
        return 2 * self._pool.pages

    def _capture(self, n: int, recorder: Recorder) -> _Graph:
        tasks, jobs = self._attention.most_decode_tasks(n)
        shapes = {"ids": ArrayShape((4, n), torch.int64), "slots": ArrayShape((n,), torch.int64)}
        shapes["runs"] = ArrayShape((n, 4), torch.int32)
        for i in range(len(self._windows)):
            shapes[f"tasks {i}"] = ArrayShape((tasks, 5), torch.int32)
            shapes[f"jobs {i}"] = ArrayShape((jobs, 4), torch.int32)
        shapes["pages"] = ArrayShape((self._most_pages,), torch.int32)
        arrays = FixedArrays(shapes, self._pool.device)
        batch = self._batch(arrays, n)
        self._fill(arrays, _nothing())
        hidden = None
        if not self._role.embeds:
            shape = (n, self._hidden_size)
            hidden = torch.zeros(shape, dtype=self._pool.dtype, device=self._pool.device)
        rows = arrays["ids"][3]

        def work() -> torch.Tensor:
            states = self._model.embed(batch) if hidden is None else hidden
            states = self._model.forward(states, batch, self._pool, self._role.layers)
            return self._model.logits(states.index_select(0, rows)) if self._role.samples else states

        result, replay = recorder.record(work)
        return _Graph(arrays, hidden, result, replay)

    def _batch(self, arrays: FixedArrays, n: int) -> BatchInputs:
        """A batch of n single tokens whose every figure is in ``arrays``."""
        ids, none = arrays["ids"], np.zeros(0, dtype=np.int64)
        batch = BatchInputs(
            tokens=ids[0],
            positions=ids[1],
            lengths=ids[2],
            slot_pages=none,
            slot_offsets=none,
            prefills=(),
            decodes=Decodes(0, (), ()),
            sample_rows=None,
            sampled=n,
            device=self._pool.device,
        )
        batch.memo["slots"] = arrays["slots"]
        for i, window in enumerate(self._windows):
            of_window = arrays[f"tasks {i}"], arrays[f"jobs {i}"]
            self._attention.fix_tables(batch, window, arrays["runs"], arrays["pages"], *of_window)
        return batch

    def _fill(self, arrays: FixedArrays, batch: BatchInputs) -> None:
        """``batch``: single tokens, on the host, no more of them than the graph is for."""
        host, n = arrays.fill(), batch.n_tokens
        ids, slots = host["ids"], host["slots"]
        ids[:, n:] = 0
        ids[:3, :n] = torch.stack((batch.tokens, batch.positions, batch.lengths)).numpy()
        ids[3, :n] = np.arange(n) if batch.sample_rows is None else batch.sample_rows.numpy()
        slots[n:] = UNUSED
        slots[:n] = batch.slots(self._pool.page_size)
        host["runs"][:n], pages = run_table(batch.decodes.runs, batch.decodes.pages)
        for i, window in enumerate(self._windows):
            tasks = self._attention.decode_tasks(batch, window)
            for name, table in ((f"tasks {i}", tasks.tasks), (f"jobs {i}", tasks.jobs)):
                host[name][len(table) :, 0] = UNUSED
                host[name][: len(table)] = table
        host["pages"][: pages.size] = pages
        arrays.send(pages.size)


def decode_graphs(
    config: RankConfig, model: StageModel, communicator: Communicator, pool: KVPool, role: RouteRole
) -> DecodeGraphs | None:
    """None where there is nothing to capture: no CUDA kernels, collectives that leave the device, or switched off
    (``HEXGEN_CUDA_GRAPHS=0``). Where capturing fails, one line of the log says why.
    """
    attention = model.attention
    captures = communicator.size == 1 or isinstance(communicator, ProcessGroupCommunicator)
    if not isinstance(attention, CudaAttention) or not captures or os.environ.get(VARIABLE) == "0":
        return None
    try:
        with torch.inference_mode():
            recorder = CudaRecorder(pool.device)
            return DecodeGraphs(config.model, model, attention, pool, role, config.max_sequences, recorder)
    except RuntimeError as error:  # torch's, of whatever the capture met
        _log.warning("%s: decode steps are launched kernel by kernel: capturing failed: %s", pool.device, error)
        return None


def _nothing() -> BatchInputs:
    """A batch of no tokens."""
    none, empty = np.zeros(0, dtype=np.int64), torch.zeros(0, dtype=torch.int64)
    return BatchInputs(empty, empty, empty, none, none, (), Decodes(0, (), ()), None, 0, torch.device("cpu"))
