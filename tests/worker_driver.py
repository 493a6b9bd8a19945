"""A small driver for one stage of any width: ranks are threads of this process over real gloo communicators."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from hexgen.batching.segments import Admission, Segment, SegmentKind, Step
from hexgen.model import DType, ModelSpec, load_model
from hexgen.request import SamplingParams
from hexgen.split import RankSlice, split_stage
from hexgen.worker.batch_inputs import PageTables, build_batch
from hexgen.worker.checkpoint import Checkpoint, torch_dtype
from hexgen.worker.communicator import Communicator, connect, connect_store, serve_store
from hexgen.worker.config import RankConfig, RouteRole
from hexgen.worker.decode_graphs import DecodeGraphs
from hexgen.worker.kv import KVPool
from hexgen.worker.stage_model import StageModel

T = TypeVar("T")
PAGE_SIZE = 4
PAGES = 256


def rank_config(
    model: ModelSpec,
    path: Path,
    slices: tuple[RankSlice, ...],
    rank: int,
    *,
    layers: tuple[int, int] | None = None,
    dtype: DType = "float32",
    embeds: bool = True,
    samples: bool = True,
    device: str = "cpu",
) -> RankConfig:
    held = layers or (0, model.layers)
    role = RouteRole(0, held, PAGES, 1, embeds, samples, None, None, "s0")
    return RankConfig(
        deployment="test",
        stage="s0",
        rank=rank,
        width=len(slices),
        device=device,
        dtype=dtype,
        threads=1,
        model=model,
        model_path=str(path),
        layers=held,
        slices=slices,
        routes=(role,),
        edges=(),
        page_size=PAGE_SIZE,
        token_budget=64,
        max_sequences=32,
        max_context=model.max_context,
        prefix_cache=False,
        store_host="127.0.0.1",
        store_port=0,
        listen_host="127.0.0.1",
        secret="",
    )


def on_ranks(width: int, work: Callable[[Communicator], T]) -> list[T]:
    """Run ``work`` on ``width`` ranks, threads over one communicator; results in rank order, errors raised."""
    server, port = serve_store("127.0.0.1")

    def run(rank: int) -> T:
        # A store client of its own: one that waits for a key keeps all others of its connection waiting.
        store = connect_store("127.0.0.1", port)
        cpu = torch.device("cpu")
        communicator = connect(store, "group", rank, width, device=cpu, listen_host="127.0.0.1")
        try:
            return work(communicator)
        finally:
            communicator.close()  # after an error this ends the other ranks too

    with ThreadPoolExecutor(width) as threads:
        results = [future.result(timeout=120) for future in [threads.submit(run, r) for r in range(width)]]
    del server
    return results


class LocalRank:
    """One rank of a stage that holds the whole model: prefills in chunks, decodes, pages in random order."""

    def __init__(
        self,
        path: Path,
        communicator: Communicator,
        shares: Sequence[float] | None = None,
        dtype: DType = "float32",
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.model = load_model(path)
        slices = split_stage(self.model, communicator.size, shares)
        config = rank_config(self.model, path, slices, communicator.rank, dtype=dtype, device=device)
        self.checkpoint = Checkpoint(path)
        self.role = config.routes[0]
        self.stage = StageModel(config, self.checkpoint, communicator)
        self.communicator = communicator
        self.slices = slices
        mine = slices[communicator.rank]
        self.pool = KVPool(
            PAGES,
            PAGE_SIZE,
            self.model.layers,
            mine.n_kv_heads,
            self.model.head_dim,
            torch_dtype(dtype),
            device,
        )
        self.tables = PageTables(PAGES, PAGE_SIZE, self.model.vocab_size)
        self._free = list(range(PAGES))
        random.Random(seed).shuffle(self._free)
        self._pages: dict[int, int] = {}
        self._admitted: list[Admission] = []
        self._number = 0
        self.graphs: DecodeGraphs | None = None  # what they take goes to them
        self.replayed = 0

    def admit(self, sequence: int, prompt_tokens: int) -> None:
        self._admitted.append(Admission(sequence, SamplingParams(temperature=0.0), prompt_tokens))
        self._pages[sequence] = 0

    def segment(self, sequence: int, start: int, tokens: Sequence[int], sample: bool = True) -> Segment:
        needed = -(-(start + len(tokens)) // PAGE_SIZE) - self._pages[sequence]
        new = tuple(self._free.pop() for _ in range(needed))
        self._pages[sequence] += needed
        kind = SegmentKind.DECODE if len(tokens) == 1 and start else SegmentKind.PREFILL
        return Segment(sequence, kind, start, tuple(tokens), new, sample)

    def run(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Logits ``[sampled, vocab]`` of the segments that sample, in their order, gathered from all ranks."""
        step = Step(0, self._number, (), tuple(self._admitted), tuple(segments))
        self._admitted, self._number = [], self._number + 1
        self.tables.apply(step)
        if self.graphs is not None and self.graphs.takes(step):
            logits = self.graphs.run(step, self.tables, None)
            if logits is not None:
                self.replayed += 1
                return logits.clone()
        batch = build_batch(step, self.tables, PAGE_SIZE, self.stage.device)
        hidden = self.stage.embed(batch)
        hidden = self.stage.forward(hidden, batch, self.pool, (0, self.model.layers))
        local = self.stage.logits(batch.rows_to_sample(hidden))
        if not batch.sampled:
            return torch.empty(0, self.model.vocab_size)
        widest = max(s.n_vocab for s in self.slices)
        padded = torch.nn.functional.pad(local, (0, widest - local.shape[1]))
        parts = self.communicator.all_gather(padded.contiguous())
        return torch.cat([p[:, : s.n_vocab] for p, s in zip(parts, self.slices, strict=True)], dim=1)


def greedy_batch(
    rank: LocalRank, prompts: Sequence[Sequence[int]], max_tokens: int, chunk: int = 7
) -> list[list[int]]:
    """Generate for all prompts at once: a step prefills a chunk of each that is not done, and decodes the rest."""
    outputs: list[list[int]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for i, prompt in enumerate(prompts):
        rank.admit(i, len(prompt))
    while any(len(output) < max_tokens for output in outputs):
        segments = []
        for i, prompt in enumerate(prompts):
            text = [*prompt, *outputs[i]]
            if len(outputs[i]) == max_tokens:
                continue
            take = text[done[i] : done[i] + chunk]
            segments.append(rank.segment(i, done[i], take, sample=done[i] + len(take) == len(text)))
            done[i] += len(take)
        logits = rank.run(segments)
        for row, segment in enumerate(s for s in segments if s.sample):
            outputs[segment.sequence].append(int(logits[row].argmax()))
    return outputs
