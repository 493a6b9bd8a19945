"""Decode steps in fixed places, as CUDA graphs need them: on the kernels' emulation, a graph being the work itself
run again into the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from emulated_kernels import COMPILER, EmulatedDevice
from test_kernels_arithmetic import LIMITS
from worker_driver import LocalRank, greedy_batch

from hexgen.worker import layers
from hexgen.worker.attention import HeadLayout
from hexgen.worker.attention_choice import VARIABLE, Operations
from hexgen.worker.communicator import SoloCommunicator
from hexgen.worker.decode_graphs import DecodeGraphs
from hexgen.worker.kernels.attention import CudaAttention
from hexgen.worker.kernels.fixed_arrays import ArrayShape, FixedArrays
from hexgen.worker.kernels.layer import CudaLayerKernels

SLOTS = 12  # few: contexts are split, and there are jobs for the reduction


class Again:
    """A recorder whose replay runs the work once more; like a graph's, its result stays in one place."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        result = work()

        def replay() -> None:
            with torch.inference_mode():
                result.copy_(work())

        return result, replay


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++ here to compile the kernels for the host")
@pytest.mark.parametrize("variant", ["llama", "mistral"])
def test_replayed_steps_give_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Five sequences of unlike lengths, beginning to decode one after the other, in graphs of up to eight."""
    device = EmulatedDevice(LIMITS[90], SLOTS)
    made: list[CudaAttention] = []

    def emulated(_: object, dtype: torch.dtype, dim: int, page: int, heads: HeadLayout, eps: float) -> Operations:
        made.append(CudaAttention(device, dtype, dim, page, heads.readers))  # type: ignore[arg-type]
        return Operations(made[-1], CudaLayerKernels(device, dtype, dim, eps))  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "choose_operations", emulated)
    monkeypatch.setenv(VARIABLE, "sdpa")  # else a CPU has kernels of its own
    path = oracle.make_checkpoint(tmp_path / variant, variant, head_dim=16)
    prompts = [[5, 9, 60], [3 + i % 90 for i in range(23)], [7], [11 + i % 80 for i in range(9)], [40, 41]]
    rank = LocalRank(path, SoloCommunicator())
    clean = rank.pool.keys.clone(), rank.pool.values.clone()
    rank.graphs = DecodeGraphs(rank.model, rank.stage, made[0], rank.pool, rank.role, 8, Again())
    assert torch.equal(rank.pool.keys, clean[0])
    assert torch.equal(rank.pool.values, clean[1]), "capturing wrote into pages"
    found = greedy_batch(rank, prompts, 5, chunk=16)
    assert found == [oracle.greedy(path, prompt, 5) for prompt in prompts]
    assert rank.replayed >= 3


def test_fixed_arrays_arrive_where_they_were() -> None:
    shapes = {"a": ArrayShape((2, 3), torch.int64), "b": ArrayShape((5,), torch.int32)}
    arrays = FixedArrays(shapes, torch.device("cpu"))
    places = {name: arrays[name] for name in shapes}
    for turn in range(3):
        host = arrays.fill()
        host["a"][:] = turn + 1
        host["b"][:] = 10 * (turn + 1)
        arrays.send(used=3)
        assert places["a"].tolist() == [[turn + 1] * 3] * 2
        assert places["b"].tolist() == [10 * (turn + 1)] * 3 + [0, 0], "beyond what is used nothing is sent"
