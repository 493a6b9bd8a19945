"""The CPU kernels against float64: products of every shape and register width, attention, logits."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import oracle
import pytest
import torch
from attention_cases import AttentionCase, build, check
from cpu_attention import CpuAttention
from worker_driver import LocalRank, greedy_batch

from hexgen.worker import cpu_build
from hexgen.worker.communicator import SoloCommunicator
from hexgen.worker.cpu_kernels import VARIABLE, CpuKernels, choose_cpu_kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
DTYPES = (torch.float32, torch.bfloat16)
# (outputs, inputs, rows): whole panels, none, a rest beside panels; more rows than a tile, than a chunk of rows.
SHAPES = ((64, 48, 1), (7, 5, 3), (131, 33, 2), (96, 130, 16), (33, 64, 61), (1, 1, 1), (32, 17, 13))


def product(kernels: CpuKernels, weight: torch.Tensor, x: torch.Tensor, threads: int = 1) -> torch.Tensor:
    packed = kernels.layout.matrix(weight)
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"))
    sizes = (weight.shape[0], weight.shape[1], x.data_ptr(), x.shape[0], threads)
    kernels.product(packed.data_ptr(), *sizes, out.data_ptr())
    return out


def check_products(kernels: CpuKernels, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for outputs, inputs, rows in SHAPES:
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
        x = torch.randn(rows, inputs, generator=generator)
        found = product(kernels, weight, x)
        assert (found.double() - x.double() @ weight.double().t()).abs().max() < 1e-5 * inputs
        assert torch.equal(product(kernels, weight, x, threads=2), found)
        # A row's result does not depend on the rows beside it, bit for bit.
        assert all(torch.equal(product(kernels, weight, x[i : i + 1]), found[i : i + 1]) for i in range(rows))
        ids = torch.arange(outputs)
        back = torch.empty((outputs, inputs), dtype=dtype)
        packed = kernels.layout.matrix(weight)
        assert packed.numel() == weight.numel()
        kernels.rows(packed.data_ptr(), outputs, inputs, ids.data_ptr(), outputs, back.data_ptr())
        assert torch.equal(back, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype) -> None:
    check_products(CpuKernels.open(dtype), dtype)


ATTENTION = [
    AttentionCase("float32"),
    AttentionCase("float32", 16, page_size=3, window=13, query_heads=(3, 10), seed=1),
    AttentionCase("float32", 128, group=1, query_heads=(0, 3), page_size=64, window=1, seed=2),
    AttentionCase("float32", 80, group=7, query_heads=(5, 14), sequences=((300, 1), (0, 90)), window=200),
    AttentionCase("bfloat16", 64, window=29, query_heads=(3, 10), seed=3),
    AttentionCase("bfloat16", 36, page_size=5, seed=4),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: AttentionCase, threads: int) -> None:
    """Pages that nobody wrote are NaN; three threads also cut long runs."""
    kernels = CpuKernels.open(getattr(torch, case.dtype))
    for written in (False, True):
        built = build(case, written=written)
        found = CpuAttention(kernels, threads).attend(
            built.q, None if written else built.kv, built.pool.layer(0), built.batch, case.window, built.heads
        )
        check(found, built, case)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [4, 16])
def test_other_register_widths(lanes: int) -> None:
    """Made by the compiler out of what this machine has: NEON's and AVX-512's order, not their instructions."""
    library = cpu_build.cpu_library((f"-DHX_LANES={lanes}", "-O1"))
    for dtype in DTYPES:
        kernels = CpuKernels.open(dtype, library)
        assert kernels.layout.lanes == lanes
        check_products(kernels, dtype)
        name = str(dtype).removeprefix("torch.")
        for case in ATTENTION:
            case = dataclasses.replace(case, dtype=name)
            built = build(case)
            attention = CpuAttention(kernels)
            found = attention.attend(built.q, None, built.pool.layer(0), built.batch, case.window, built.heads)
            check(found, built, case)


def test_logits_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Decoded alone and beside others, bit for bit."""
    path = oracle.make_checkpoint(tmp_path / "llama", "llama")
    prompt = [7, 9, 11, 5]

    def decoded(others: int) -> torch.Tensor:
        rank = LocalRank(path, SoloCommunicator())
        for i in range(others + 1):
            rank.admit(i, len(prompt))
            rank.run([rank.segment(i, 0, [p + i for p in prompt])])
        return rank.run([rank.segment(i, len(prompt), [3 + i]) for i in range(others + 1)])[0]

    alone = decoded(0)
    assert all(torch.equal(decoded(others), alone) for others in (1, 4, 7, 17))


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    path = oracle.make_checkpoint(tmp_path / "qwen3", "qwen3")
    logits = []
    for dtype in ("float32", "bfloat16"):
        rank = LocalRank(path, SoloCommunicator(), dtype=dtype)  # type: ignore[arg-type]
        rank.admit(0, 20)
        first = rank.run([rank.segment(0, 0, list(range(3, 19)))])
        logits.append(torch.cat((first, rank.run([rank.segment(0, 16, [20])]))))
    error = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 0 < error < 0.05  # 8 bits of mantissa through a few layers; not the same path twice


def test_torch_serves_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = oracle.make_checkpoint(tmp_path / "llama", "llama")
    prompts = [[5, 6, 7], list(range(3, 30))]
    ours = greedy_batch(LocalRank(path, SoloCommunicator()), prompts, 6)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("hexgen.worker.cpu_kernels.cpu_library", cpu_build.cpu_library.__wrapped__)
    assert greedy_batch(LocalRank(path, SoloCommunicator()), prompts, 6) == ours
    assert "no C++ compiler" in caplog.text
    monkeypatch.delenv("CXX")
    monkeypatch.setenv(VARIABLE, "sdpa")
    assert choose_cpu_kernels(torch.device("cpu"), torch.float32) is None
