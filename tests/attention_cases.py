"""Ragged, paged attention cases with their answers in float64, the same for every implementation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from hexgen.batching.segments import Admission, Segment, SegmentKind, Step
from hexgen.request import SamplingParams
from hexgen.worker.attention import HeadLayout, reference_attention
from hexgen.worker.batch_inputs import BatchInputs, PageTables, build_batch
from hexgen.worker.kv import KVPool

NEEDS_CARD = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
)

# (tokens before this step, tokens of this step) of each sequence: decodes, a prefill, a chunk late in its context,
# a run short enough for the decode kernel, the first token of a text.
MIXED = ((70, 1), (0, 40), (120, 17), (5, 2), (150, 1), (0, 1))
# Largest difference from float64 for standard normal inputs: half a unit in the last place of the result, and the
# probabilities' own rounding.
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True, slots=True)
class AttentionCase:
    dtype: str = "float16"
    head_dim: int = 64
    page_size: int = 16
    window: int | None = None
    query_heads: tuple[int, int] = (0, 8)  # of the whole model: a shard may begin and end inside a group
    group: int = 4
    sequences: tuple[tuple[int, int], ...] = MIXED
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Built:
    q: torch.Tensor  # [tokens, query heads, head_dim], a view of longer rows
    kv: torch.Tensor  # [tokens, 2, kv heads, head_dim], likewise
    pool: KVPool  # one layer; everything before this step is in its pages, in random order
    batch: BatchInputs
    heads: HeadLayout
    expected: torch.Tensor  # [tokens, query heads, head_dim] float64


def build(case: AttentionCase, device: str = "cpu", written: bool = True, poison: float = float("nan")) -> Built:
    """``written``: this step's keys and values are in their pages too. What nobody wrote is ``poison``."""
    generator = torch.Generator().manual_seed(case.seed)
    first, last = case.query_heads
    kv_heads = (first // case.group, (last - 1) // case.group + 1)
    n_q, n_kv = last - first, kv_heads[1] - kv_heads[0]
    dtype = getattr(torch, case.dtype)
    n_pages = sum(-(-(a + b) // case.page_size) for a, b in case.sequences) + 3
    free = torch.randperm(n_pages, generator=generator).tolist()
    pool = KVPool(n_pages, case.page_size, 1, n_kv, case.head_dim, dtype, "cpu")
    pool.layer(0).rows.fill_(poison)
    tables = PageTables(n_pages, case.page_size, len(case.sequences))
    admitted, segments, whole = [], [], []
    for i, (before, now) in enumerate(case.sequences):
        pages = tuple(free.pop() for _ in range(-(-(before + now) // case.page_size)))
        whole.append(torch.randn(before + now, n_q + 2 * n_kv, case.head_dim, generator=generator).to(dtype))
        for at in range(before + now if written else before):
            page, offset = pages[at // case.page_size], at % case.page_size
            pool.keys[0, page, :, offset] = whole[i][at, n_q : n_q + n_kv]
            pool.values[0, page, :, offset] = whole[i][at, n_q + n_kv :]
        admitted.append(Admission(i, SamplingParams(), before + now, pages))
        kind = SegmentKind.DECODE if now == 1 else SegmentKind.PREFILL
        segments.append(Segment(i, kind, before, (i,) * now, (), True))
    step = Step(0, 0, (), tuple(admitted), tuple(segments))
    tables.apply(step)
    batch = build_batch(step, tables, case.page_size, device)
    positions = zip(batch.tokens.tolist(), batch.positions.tolist(), strict=True)
    rows = torch.stack([whole[sequence][position] for sequence, position in positions])
    heads = HeadLayout.make(case.query_heads, kv_heads, case.group, case.head_dim, torch.device(device))
    expected = torch.empty((batch.n_tokens, n_q, case.head_dim), dtype=torch.float64)
    for i, (before, now) in enumerate(case.sequences):
        k, v = whole[i][:, n_q : n_q + n_kv], whole[i][:, n_q + n_kv :]
        mine = (batch.tokens == i).cpu()
        expected[mine] = reference_attention(
            whole[i][before:, :n_q], k, v, before, case.window, heads.readers.reads
        )
        assert int(mine.sum()) == now
    if device != "cpu":
        moved = KVPool(n_pages, case.page_size, 1, n_kv, case.head_dim, dtype, device)
        moved.layer(0).rows.copy_(pool.layer(0).rows)
        pool, rows = moved, rows.to(device)
    kv = rows[:, n_q:].view(-1, 2, n_kv, case.head_dim)
    return Built(rows[:, :n_q], kv, pool, batch, heads, expected)


def check(found: torch.Tensor, built: Built, case: AttentionCase) -> None:
    found = found.view(built.expected.shape).double().cpu()
    worst = (found - built.expected).abs().max().item()
    assert worst <= TOLERANCE[case.dtype], f"{case} differs by {worst}"
