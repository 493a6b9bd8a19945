"""The implementations of attention behind one interface, on the same ragged, paged, grouped, windowed cases."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import pytest
import torch
from attention_cases import NEEDS_CARD, AttentionCase, Built, build, check

from hexgen.errors import EngineError
from hexgen.worker.attention_choice import (
    VARIABLE,
    Attention,
    ReferenceAttention,
    SdpaAttention,
    choose_operations,
)
from hexgen.worker.kernels.device import kernel_device


def needs_card(test: Callable[..., None]) -> Callable[..., None]:
    for mark in NEEDS_CARD:
        test = mark(test)
    return test


CASES = [
    AttentionCase("float32"),
    AttentionCase("float32", 16, page_size=3, window=13, query_heads=(3, 10), seed=1),
    AttentionCase("float32", 128, group=1, query_heads=(0, 3), page_size=64, window=1, seed=2),
]
CUDA_CASES = [
    *CASES,
    *(
        AttentionCase(dtype, head, window=window, query_heads=heads, seed=3)
        for dtype in ("float16", "bfloat16")
        for head in (64, 80, 96, 128, 256)
        for window, heads in ((None, (0, 8)), (29, (3, 10)))
    ),
    AttentionCase("bfloat16", 128, sequences=((40_000, 1),), query_heads=(0, 8), group=8),  # split
    AttentionCase("float16", 128, sequences=((5000, 700), (3, 1)), window=1024),
    AttentionCase("float16", 128, group=20, query_heads=(0, 40), page_size=1),
]


def run(attention: Attention, built: Built, case: AttentionCase, written: bool) -> torch.Tensor:
    kv = None if written else built.kv
    return attention.attend(built.q, kv, built.pool.layer(0), built.batch, case.window, built.heads)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("attention", [SdpaAttention(), ReferenceAttention()])
@pytest.mark.parametrize("case", CASES)
def test_attention_without_a_card(attention: Attention, case: AttentionCase, written: bool) -> None:
    # Torch's attention multiplies masked values by 0, which a NaN survives; pools are zeroed at the start for it.
    built = build(case, written=written, poison=0.0)
    check(run(attention, built, case, written), built, case)


@needs_card
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("case", CUDA_CASES)
def test_cuda_attention(case: AttentionCase, written: bool) -> None:
    """Pages that nobody wrote are NaN, and so is the memory that the result will lie in."""
    pytest.importorskip("cuda.core")
    from hexgen.worker.kernels.attention import CudaAttention

    built = build(case, "cuda", written)
    kernels = kernel_device(torch.device("cuda", 0))
    attention = CudaAttention(
        kernels, getattr(torch, case.dtype), case.head_dim, case.page_size, built.heads.readers
    )
    poison = torch.full_like(built.q.contiguous(), float("nan"))
    del poison  # the allocator hands the same memory out again
    check(run(attention, built, case, written), built, case)


@needs_card
@pytest.mark.parametrize("case", [AttentionCase("float16"), AttentionCase("bfloat16", 128, window=29)])
def test_sdpa_on_the_card(case: AttentionCase) -> None:
    built = build(case, "cuda", written=False, poison=0.0)
    check(run(SdpaAttention(), built, case, False), built, case)


def choose(device: str, head_dim: int = 64) -> Attention:
    heads = build(dataclasses.replace(CASES[0], head_dim=head_dim, sequences=((0, 1),))).heads
    return choose_operations(torch.device(device), torch.float32, head_dim, 16, heads, 1e-6).attention


def test_a_cpu_has_torchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert isinstance(choose("cpu"), SdpaAttention)
    monkeypatch.setenv(VARIABLE, "reference")
    assert isinstance(choose("cpu"), ReferenceAttention)
    monkeypatch.setenv(VARIABLE, "flash")
    with pytest.raises(EngineError, match="none of cuda, sdpa, reference"):
        choose("cpu")


def test_a_card_without_kernels_says_so_once_and_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hexgen.worker import attention_choice

    def missing(device: torch.device) -> object:
        raise EngineError("no NVRTC here compiles for it")

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(attention_choice, "kernel_device", missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose("cuda"), SdpaAttention)
    (record,) = caplog.records
    assert "no NVRTC here compiles for it" in record.message
    caplog.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert isinstance(choose("cuda"), SdpaAttention)
    assert "on this card" in caplog.text
