"""The other kernels, and the whole model, on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_cases import NEEDS_CARD
from oracle import VARIANTS, make_checkpoint
from test_worker_model_exactness import MAX_TOKENS, expected, prompts
from worker_driver import LocalRank, greedy_batch

from hexgen.worker.communicator import SoloCommunicator
from hexgen.worker.decode_graphs import CudaRecorder, DecodeGraphs
from hexgen.worker.kernels.attention import CudaAttention
from hexgen.worker.kernels.device import KernelDevice, kernel_device
from hexgen.worker.sampling_math import to_keys

pytestmark = list(NEEDS_CARD)


@pytest.fixture(scope="module")
def device() -> KernelDevice:
    pytest.importorskip("cuda.core")
    return kernel_device(torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [4096, 77])
def test_norm_and_swiglu(device: KernelDevice, dtype: torch.dtype, size: int) -> None:
    from hexgen.worker.kernels.layer import CudaLayerKernels

    kernels = CudaLayerKernels(device, dtype, 64, 1e-6)
    x, more, weight = (torch.randn(shape, device="cuda").to(dtype) for shape in ((9, size), (9, size), (size,)))
    rows = x.clone()
    found = kernels.rms_norm(rows, weight, add=more)
    torch.testing.assert_close(rows, x + more)
    expected = F.rms_norm((x + more).float(), (size,), weight.float(), 1e-6)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-3)
    wide = torch.randn((9, 2 * size), device="cuda").to(dtype)
    expected = F.silu(wide[:, :size].float()) * wide[:, size:].float()
    torch.testing.assert_close(kernels.silu_mul(wide).float(), expected, rtol=2e-2, atol=2e-3)


def test_candidates(device: KernelDevice) -> None:
    from hexgen.worker.kernels.layer import CudaCandidates

    candidates = CudaCandidates(device)
    logits = torch.randint(-50, 50, (5, 32_003), device="cuda").float()
    keys = to_keys(logits.cpu().numpy(), np.arange(32_003) + 5)
    assert candidates.greedy(logits, None, 5).tolist() == keys.max(axis=1).tolist()
    found = np.sort(candidates.top_keys(logits, 128, 5).cpu().numpy(), axis=1)
    assert np.array_equal(found, np.sort(keys, axis=1)[:, -128:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_is_token_exact(tmp_path: Path, variant: str) -> None:
    """The CUDA path in float32 against transformers on the CPU: chunked prefills and decodes mixed."""
    path = make_checkpoint(tmp_path / variant, variant, head_dim=16)
    rank = LocalRank(path, SoloCommunicator(), device="cuda:0")
    assert greedy_batch(rank, prompts(), MAX_TOKENS) == expected(path)


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen3"])
def test_captured_decode_steps_are_token_exact(tmp_path: Path, variant: str) -> None:
    """The same through CUDA graphs, several sizes of them, each replayed with other figures."""
    path = make_checkpoint(tmp_path / variant, variant, head_dim=16)
    rank = LocalRank(path, SoloCommunicator(), device="cuda:0")
    attention = rank.stage.attention
    assert isinstance(attention, CudaAttention)
    recorder = CudaRecorder(rank.stage.device)
    with torch.inference_mode():
        rank.graphs = DecodeGraphs(rank.model, rank.stage, attention, rank.pool, rank.role, 8, recorder)
    assert greedy_batch(rank, prompts(), MAX_TOKENS) == expected(path)
    assert rank.replayed
