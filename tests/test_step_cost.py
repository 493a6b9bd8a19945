"""What a decode step costs the host, counted in calls instead of timed: it grows by a constant for each sequence,
and not with the requests that have finished.
"""

from __future__ import annotations

import sys
from types import FrameType

import pytest
import torch

from hexgen.batching.batcher import Batcher
from hexgen.batching.limits import BatchLimits
from hexgen.batching.segments import Step
from hexgen.discover.alone import PAGE_SIZE, RandomWeights, solo_config
from hexgen.model import ModelSpec
from hexgen.request import SamplingParams
from hexgen.worker.communicator import SoloCommunicator
from hexgen.worker.sampler import Sampler
from hexgen.worker.stage_model import StageModel
from hexgen.worker.step_runner import StepRunner

PAGES, AT_ONCE = 64, 32


class Alone:
    """A batcher and the runner of the only stage, as the stage's loop joins them."""

    def __init__(self, layers: int = 2) -> None:
        model = ModelSpec("tiny", "llama", layers, 32, 4, 2, 8, 48, 64, 64)
        config = solo_config(model, "float32", "cpu", 1, layers=layers, pages=PAGES, max_sequences=AT_ONCE)
        stage = StageModel(config, RandomWeights(), SoloCommunicator())  # type: ignore[arg-type]
        self.runner = StepRunner(config, stage, SoloCommunicator())
        limits = BatchLimits(
            pages=PAGES, page_size=PAGE_SIZE, token_budget=512, max_sequences=AT_ONCE, max_context=64,
            prefix_cache=False,
        )  # fmt: skip
        self.batcher = Batcher(limits)
        self._number = 0

    def add(self, count: int, max_tokens: int) -> None:
        for _ in range(count):
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            self.batcher.add(self._number, (1, 2, 3), params)
            self._number += 1

    def step(self) -> Step | None:
        with torch.inference_mode():
            step = self.batcher.next_step()
            if step is not None:
                self.batcher.complete(step.number, self.runner.run(step, None).tokens)
            return step

    def drain(self) -> None:
        while self.step() is not None:
            pass

    def calls_of_a_decode(self, sequences: int) -> int:
        """Calls, of Python's functions and of C's, of one step in which ``sequences`` decode; no page is new."""
        self.add(sequences, 8)
        for _ in range(3):  # prefill, and what the first decode sets up
            self.step()
        counted = 0

        def count(frame: FrameType, event: str, argument: object) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            step = self.step()
        finally:
            sys.setprofile(before)
        assert step is not None
        assert len(step.segments) == sequences == step.tokens
        self.drain()
        return counted


def test_calls_grow_by_a_constant_for_each_sequence() -> None:
    alone = Alone()
    alone.calls_of_a_decode(1)
    calls = {n: alone.calls_of_a_decode(n) for n in (1, 2, 4, 8, 16, 32)}
    slope = (calls[32] - calls[16]) / 16
    # A straight line, give or take a call here and there (a container that grows), and most of it shared.
    assert all(abs(calls[n] - (calls[16] + slope * (n - 16))) <= 8 for n in calls)
    assert 0 < slope < calls[1] / 4


def test_calls_do_not_depend_on_the_layers() -> None:
    """One call runs them all: Python is not in the way of a layer."""
    assert Alone(2).calls_of_a_decode(4) == Alone(12).calls_of_a_decode(4)


def test_finished_requests_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samplers: list[Sampler] = []
    kept = Sampler.__init__

    def note(self: Sampler, *arguments: object) -> None:
        kept(self, *arguments)  # type: ignore[arg-type]
        samplers.append(self)

    monkeypatch.setattr(Sampler, "__init__", note)
    alone = Alone()
    alone.calls_of_a_decode(8)
    before = alone.calls_of_a_decode(8)
    for _ in range(20):
        alone.add(40, 2)
        alone.drain()
    assert alone.calls_of_a_decode(8) == before
    assert alone.batcher.idle
    assert [len(sampler) for sampler in samplers] == [0]
