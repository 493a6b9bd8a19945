"""One step on one rank: page tables, embedding, layers, output head, sampler. Every rank of a stage runs the
same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hexgen.batching.segments import SampledToken, Step
from hexgen.errors import EngineError
from hexgen.worker.batch_inputs import BatchInputs, PageTables, build_batch
from hexgen.worker.checkpoint import torch_dtype
from hexgen.worker.communicator import Communicator
from hexgen.worker.config import RankConfig, RouteRole
from hexgen.worker.decode_graphs import DecodeGraphs, decode_graphs
from hexgen.worker.kv import KVPool
from hexgen.worker.report import StepClock
from hexgen.worker.sampler import Sampler
from hexgen.worker.stage_model import StageModel


@dataclass(slots=True)
class StepResult:
    """``hidden`` [tokens, hidden size] for the next stage, or, on the leader of the last one, the tokens."""

    hidden: torch.Tensor | None
    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class _RouteState:
    role: RouteRole
    pool: KVPool
    tables: PageTables
    sampler: Sampler | None
    graphs: DecodeGraphs | None  # where decode steps are captured


class StepRunner:
    """The tensor side of a rank, route by route. One thread; steps of a route in their order."""

    def __init__(self, config: RankConfig, model: StageModel, communicator: Communicator) -> None:
        self.clock = StepClock()
        self._model = model
        self._page_size = config.page_size
        self._device = torch.device(config.device)
        self._routes = {role.route: self._state(config, role, communicator) for role in config.routes}

    def _state(self, config: RankConfig, role: RouteRole, communicator: Communicator) -> _RouteState:
        pool = KVPool(
            role.pages,
            config.page_size,
            role.layers[1] - role.layers[0],
            config.slices[config.rank].n_kv_heads,
            config.model.head_dim,
            torch_dtype(config.dtype),
            self._device,
        )
        tables = PageTables(role.pages, config.page_size, config.model.vocab_size)
        sampler = Sampler(config, communicator) if role.samples else None
        return _RouteState(
            role, pool, tables, sampler, decode_graphs(config, self._model, communicator, pool, role)
        )

    @property
    def kv_bytes(self) -> int:
        return sum(state.pool.bytes for state in self._routes.values())

    def run(self, step: Step, hidden: torch.Tensor | None) -> StepResult:
        """Run ``step``; ``hidden`` comes from the stage before (None on the first, or where nothing is to
        compute).
        """
        state = self._routes.get(step.route)
        where = f"route {step.route}, step {step.number}"
        if state is None:
            raise EngineError("the route does not pass through this stage", where=where)
        state.tables.apply(step)
        if state.sampler is not None:
            state.sampler.apply(step)
        if not step.segments:
            return StepResult(None, ())
        if not state.role.embeds and (hidden is None or hidden.shape[0] != step.tokens):
            raise EngineError("the hidden states do not match the step's tokens", where=where)
        result = None
        started = time.perf_counter()
        if state.graphs is not None and state.graphs.takes(step):
            result = state.graphs.run(step, state.tables, hidden)
        if result is None:
            batch = build_batch(step, state.tables, self._page_size, self._device)
            started = time.perf_counter()
            result = self._compute(state, batch, hidden)
        if state.sampler is None:
            self.clock.compute_s += time.perf_counter() - started
            return StepResult(result, ())
        if (
            self._device.type == "cuda"
        ):  # the sampler waits for it anyhow; this way the wait is counted where it is
            torch.cuda.current_stream(self._device).synchronize()
        self.clock.compute_s += time.perf_counter() - started
        tokens = state.sampler.sample(result, step.sampled) if step.sampled else None
        return StepResult(None, tuple(tokens or ()))

    def _compute(self, state: _RouteState, batch: BatchInputs, hidden: torch.Tensor | None) -> torch.Tensor:
        """Hidden states ``[tokens, hidden]`` for the next stage, or, where the route is sampled, the logits."""
        if state.role.embeds:
            hidden = self._model.embed(batch)
        if hidden is None:
            raise EngineError("hidden states are missing", where=f"route {state.role.route}")
        hidden = self._model.forward(hidden, batch, state.pool, state.role.layers)
        if state.sampler is None or not batch.sampled:
            return hidden
        return self._model.logits(batch.rows_to_sample(hidden))
