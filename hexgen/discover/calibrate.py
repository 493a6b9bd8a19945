"""A model's own layers on one device, timed by the worker's own code, over a small grid of loads.

The layers are real in shape, number format and code, and random in their values: no weights need to be on the
node, and times do not depend on values. Several of them are held, so that a CPU's caches do not keep one
layer's weights from one repeat to the next unless they would in service too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import cast

import torch

from hexgen.batching.segments import Step
from hexgen.discover.alone import PAGE_SIZE, RandomWeights, solo_config
from hexgen.discover.loops import LoopTimes, loop_times
from hexgen.discover.points import (
    DECODE_SEQUENCES,
    PREFILL_TOKENS,
    Load,
    contexts,
    decode_load,
    prefill_load,
    step_of,
)
from hexgen.discover.timing import Stopwatch, cpu_share
from hexgen.errors import EngineError
from hexgen.model import DTYPE_BYTES, DType, ModelSpec
from hexgen.worker.batch_inputs import BatchInputs, PageTables, build_batch
from hexgen.worker.checkpoint import Checkpoint, torch_dtype
from hexgen.worker.communicator import SoloCommunicator
from hexgen.worker.kv import KVPool
from hexgen.worker.rope import RotaryEmbedding
from hexgen.worker.sampler import Sampler
from hexgen.worker.stage_model import StageModel

LEAST_LAYERS, PREFILL_LAYERS = 4, 4
# A CPU's caches must not keep one step's weights to the next unless they would in service: layers of so many bytes
# are held, or all that the model has. A prompt's products are bound by arithmetic: fewer will do.
HELD_BYTES = 64 << 20
LOOP_SEQUENCES = (1, 4, 16, 64)
MEMORY_SHARE = 0.25  # of what is free: for weights, and as much again for keys and values
WINDOW_S = 0.12


@dataclass(frozen=True, slots=True)
class Calibration:
    """Seconds. ``prefill[i][j]`` and ``decode[i][j]`` are of one layer; the curves of a step's other parts."""

    versions: dict[str, str]
    contexts: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    prefill: tuple[tuple[float, ...], ...]
    decode_sequences: tuple[int, ...]
    decode: tuple[tuple[float, ...], ...]
    step: tuple[float, ...]  # by decode_sequences: batch inputs and what layers share
    embed: tuple[float, ...]  # by prefill_tokens
    sample: tuple[float, ...]  # by decode_sequences: output head and greedy sampling
    layers: int  # that were held
    disturbance: float
    seconds: float
    said: tuple[str, ...] = field(default=())
    loops: LoopTimes | None = None  # the engine's own loop; None on a GPU


def smoothed(rows: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Seconds that never fall with more load along either axis: each the least of its own and of all beyond it.

    Measurements scatter upwards; who does more in a time does less in no more than that.
    """
    found: list[tuple[float, ...]] = []
    for row in reversed(rows):
        least = tuple(accumulate(reversed(row), min))[::-1]
        found.append(tuple(map(min, least, found[-1])) if found else least)
    return found[::-1]


def calibrate(
    model: ModelSpec, dtype: DType, device: str, threads: int, limit_s: float, host: str = "127.0.0.1"
) -> Calibration:
    """Time ``model`` on ``device`` ("cpu", "cuda:0"); after ``limit_s`` the larger points are left out.

    ``host``: an address of this machine, for the loop's own sockets.

    Raises ``EngineError`` where not even two layers fit into memory.
    """
    started = time.monotonic()
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            found = _Bench(model, dtype, device, threads).run(started + limit_s)
            if device == "cpu":
                found = replace(found, loops=_loops(model, dtype, threads, host))
        return replace(found, seconds=time.monotonic() - started)
    finally:
        torch.set_num_threads(before)


def _loops(model: ModelSpec, dtype: DType, threads: int, host: str) -> LoopTimes:
    """Processor time as time on the wall: the loop has one thread at a time."""
    share = cpu_share(min(1, threads))
    found = loop_times(model, dtype, host, LOOP_SEQUENCES)
    batching, passing = (
        smoothed([[seconds / share for seconds in row]])[0] for row in (found.batching, found.passing)
    )
    return LoopTimes(found.sequences, batching, passing)


@dataclass(frozen=True, slots=True)
class _Point:
    """Seconds of one load: of a layer, of batch inputs and what layers share, of the ends of a route."""

    layer_s: float
    inputs_s: float
    embed_s: float
    head_s: float = 0.0


class _Bench:
    """The stage under test, and the clock."""

    def __init__(self, model: ModelSpec, dtype: DType, device: str, threads: int) -> None:
        self._model, self._device = model, torch.device(device)
        on_gpu = self._device.type == "cuda"
        sync = partial(torch.cuda.synchronize, self._device) if on_gpu else None
        self._watch = Stopwatch(threads, 1.0 if on_gpu else cpu_share(threads), sync)
        room = int(_free_bytes(self._device) * MEMORY_SHARE)
        layer_bytes = model.layer_parameters * DTYPE_BYTES[dtype]
        self._layers = min(max(LEAST_LAYERS, -(-HELD_BYTES // layer_bytes)), model.layers, room // layer_bytes)
        if self._layers < min(2, model.layers):
            raise EngineError(f"too little memory free to time layers of {layer_bytes} bytes")
        self._contexts = contexts(model.max_context)
        kv_page = 2 * PAGE_SIZE * model.kv_heads * model.head_dim * DTYPE_BYTES[dtype] * self._layers
        most = -(-max(self._contexts) // PAGE_SIZE) * max(DECODE_SEQUENCES)
        self._pages = max(-(-model.max_context // PAGE_SIZE), 64)
        self._pages = max(min(most, room // kv_page), min(self._pages, most))
        config = solo_config(
            model,
            dtype,
            device,
            threads,
            layers=self._layers,
            pages=self._pages,
            max_sequences=max(DECODE_SEQUENCES),
        )
        solo = SoloCommunicator()
        self._stage = StageModel(config, cast(Checkpoint, RandomWeights()), solo)
        self._sampler = Sampler(config, solo)
        self._rope = RotaryEmbedding(model, torch_dtype(dtype), self._device)
        shape = (config.slices[0].n_kv_heads, model.head_dim, torch_dtype(dtype), self._device)
        some = {min(self._layers, PREFILL_LAYERS), self._layers}
        self._pools = {layers: KVPool(self._pages, PAGE_SIZE, layers, *shape) for layers in some}
        self._sequences = 0

    def run(self, deadline: float) -> Calibration:
        most = self._model.max_context
        prefills = [n for n in PREFILL_TOKENS if n <= most]
        half = (time.monotonic() + deadline) / 2  # prompts are to have their time too
        decode = self._rows(DECODE_SEQUENCES, lambda n, seen: self._decode(decode_load(n, seen)), half)
        prefill = self._rows(prefills, lambda n, seen: self._prefill(prefill_load(n, seen, most)), deadline)
        said = []
        if len(decode) < len(DECODE_SEQUENCES) or len(prefill) < len(prefills):
            said.append(
                f"time was up: {len(prefill)} of {len(prefills)} rows of prompts, "
                f"{len(decode)} of {len(DECODE_SEQUENCES)} of decodes"
            )
        from hexgen.discover.machine import versions

        middle = len(self._contexts) // 2
        return Calibration(
            versions=versions(),
            contexts=self._contexts,
            prefill_tokens=tuple(prefills[: len(prefill)]),
            prefill=tuple(smoothed([[point.layer_s for point in row] for row in prefill])),
            decode_sequences=DECODE_SEQUENCES[: len(decode)],
            decode=tuple(smoothed([[point.layer_s for point in row] for row in decode])),
            step=smoothed([[row[middle].inputs_s for row in decode]])[0],
            embed=smoothed([[row[0].embed_s for row in prefill]])[0],
            sample=smoothed([[row[middle].head_s for row in decode]])[0],
            layers=self._layers,
            disturbance=self._watch.disturbance,
            seconds=0.0,
            said=tuple(said),
        )

    def _rows(
        self, across: Sequence[int], point: Callable[[int, int], _Point], deadline: float
    ) -> list[list[_Point]]:
        """A row for each of ``across``, a point for each context; whole rows, as many as there is time for."""
        rows: list[list[_Point]] = []
        for n in across:
            if rows and time.monotonic() > deadline:
                break
            rows.append([point(n, context) for context in self._contexts])
        return rows

    def _decode(self, load: Load) -> _Point:
        return self._point(load, self._layers, sample=True)

    def _prefill(self, load: Load) -> _Point:
        return self._point(load, min(self._layers, PREFILL_LAYERS), sample=False)

    def _point(self, load: Load, layers: int, *, sample: bool) -> _Point:
        """A whole step again and again, in the order of `hexgen.worker.step_runner`."""
        again, tables = self._admitted(load, sample)
        batch = self._made(again, tables)
        hidden = self._stage.embed(batch)
        works = [
            lambda: self._made(again, tables),
            lambda: self._stage.embed(batch),
            lambda: self._forward(batch, layers),
            *([lambda: self._sample(hidden, batch, again)] if sample else ()),
        ]
        made_s, embed_s, forward_s, *head_s = self._watch.parts(works, WINDOW_S)
        # What the layers of a step share: the rotary tables. (Attention's plan, which is small, counts to them.)
        shared_s = min(forward_s / 2, self._rotary_s(batch))
        return _Point((forward_s - shared_s) / layers, made_s + shared_s, embed_s, *head_s)

    def _rotary_s(self, batch: BatchInputs) -> float:
        return self._watch.seconds(lambda: self._rope.tables(batch.positions, batch.lengths), WINDOW_S / 10, 1)

    # ---- pieces of a step --------------------------------------------------------------------------------------

    def _admitted(self, load: Load, sample: bool) -> tuple[Step, PageTables]:
        first, again = step_of(load, 0, self._sequences, self._pages, PAGE_SIZE, sample)
        self._sequences += len(load.runs)
        tables = PageTables(self._pages, PAGE_SIZE, self._model.vocab_size)
        tables.apply(first)
        self._sampler.apply(first)
        return again, tables

    def _made(self, step: Step, tables: PageTables) -> BatchInputs:
        tables.apply(step)
        return build_batch(step, tables, PAGE_SIZE, self._device)

    def _forward(self, batch: BatchInputs, layers: int) -> None:
        """``layers`` over hidden states of ones, as a new step: it works out its plans again."""
        batch.memo.clear()
        hidden = torch.ones(batch.n_tokens, self._model.hidden_size, dtype=self._stage.dtype, device=self._device)
        self._stage.forward(hidden, batch, self._pools[layers], (0, layers))

    def _sample(self, hidden: torch.Tensor, batch: BatchInputs, step: Step) -> None:
        self._sampler.sample(self._stage.logits(batch.rows_to_sample(hidden)), step.sampled)


def _free_bytes(device: torch.device) -> int:
    from hexgen.discover.machine import free_memory

    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()
