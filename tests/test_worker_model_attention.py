"""Attention over pages against plain float64 attention; page tables and batches; pages moved between pools."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.batching.segments import Admission, Segment, SegmentKind, Step
from hexgen.errors import EngineError
from hexgen.request import SamplingParams
from hexgen.worker import attention
from hexgen.worker.attention import HeadLayout, attend, reference_attention
from hexgen.worker.batch_inputs import PageTables, build_batch
from hexgen.worker.kv import KVPool

DIM = 8


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    group = draw(st.integers(1, 4))
    first = draw(st.integers(0, 7))
    count = draw(st.integers(1, 7))
    return {
        "group": group,
        "query_heads": (first, first + count),
        "page_size": draw(st.sampled_from([1, 3, 4, 16])),
        "window": draw(st.sampled_from([None, 1, 5, 40])),
        # (tokens before this step, tokens of this step) of each sequence
        "sequences": draw(
            st.lists(st.tuples(st.integers(0, 70), st.sampled_from([1, 1, 1, 2, 9, 33])), min_size=1, max_size=8)
        ),
        "gather_bytes": draw(st.sampled_from([1, 20_000, 10**9])),
        "mask_elements": draw(st.sampled_from([1, 300, 10**9])),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(deadline=None, max_examples=120)
@given(case=cases())
def test_attend_equals_plain_attention(case: dict[str, object]) -> None:
    """Any mixture of prefills and decodes, any heads, windows, page sizes and scattered pages, in one step."""
    group, page_size, window = case["group"], case["page_size"], case["window"]
    assert isinstance(group, int)
    assert isinstance(page_size, int)
    assert window is None or isinstance(window, int)
    query_heads: tuple[int, int] = case["query_heads"]  # type: ignore[assignment]
    sequences: list[tuple[int, int]] = case["sequences"]  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(case["seed"])  # type: ignore[arg-type]
    kv_heads = (query_heads[0] // group, (query_heads[1] - 1) // group + 1)
    n_kv, n_q = kv_heads[1] - kv_heads[0], query_heads[1] - query_heads[0]
    heads = HeadLayout.make(query_heads, kv_heads, group, DIM, torch.device("cpu"))

    n_pages = sum(-(-(a + b) // page_size) for a, b in sequences) + 3
    free = torch.randperm(n_pages, generator=generator).tolist()
    pool = KVPool(n_pages, page_size, 2, n_kv, DIM, torch.float32, "cpu")
    tables = PageTables(n_pages, page_size, 100)
    admitted, segments, whole = [], [], []
    for i, (before, now) in enumerate(sequences):
        pages = tuple(free.pop() for _ in range(-(-(before + now) // page_size)))
        whole.append(torch.randn(before + now, n_q + 2 * n_kv, DIM, generator=generator))
        for at in range(before):
            page, offset = pages[at // page_size], at % page_size
            pool.keys[1, page, :, offset] = whole[i][at, n_q : n_q + n_kv]
            pool.values[1, page, :, offset] = whole[i][at, n_q + n_kv :]
        admitted.append(Admission(i, SamplingParams(), before + now, pages[: before // page_size]))
        new = pages[before // page_size :]
        kind = SegmentKind.DECODE if now == 1 else SegmentKind.PREFILL
        segments.append(Segment(i, kind, before, (i,) * now, new, True))
    step = Step(0, 0, (), tuple(admitted), tuple(segments))
    tables.apply(step)
    batch = build_batch(step, tables, page_size, "cpu")

    rows = torch.empty(batch.n_tokens, n_q + 2 * n_kv, DIM)
    for row in range(batch.n_tokens):  # row order is the batch's own
        rows[row] = whole[int(batch.tokens[row])][int(batch.positions[row])]
    kept = attention.GATHER_BYTES_CPU, attention.MASK_ELEMENTS
    attention.GATHER_BYTES_CPU, attention.MASK_ELEMENTS = case["gather_bytes"], case["mask_elements"]  # type: ignore[assignment]
    try:
        kv = rows[:, n_q:].view(-1, 2, n_kv, DIM)
        found = attend(rows[:, :n_q], kv, pool.layer(1), batch, window, heads).view(-1, n_q, DIM)
    finally:
        attention.GATHER_BYTES_CPU, attention.MASK_ELEMENTS = kept

    index = [h // group - kv_heads[0] for h in range(*query_heads)]
    for i, (before, now) in enumerate(sequences):
        q, k, v = whole[i][before:, :n_q], whole[i][:, n_q : n_q + n_kv], whole[i][:, n_q + n_kv :]
        expected = reference_attention(q, k, v, before, window, index)
        mine = [row for row in range(batch.n_tokens) if int(batch.tokens[row]) == i]
        torch.testing.assert_close(found[mine].double(), expected, rtol=1e-4, atol=1e-5)
        last = batch.sample_rows[i] if batch.sample_rows is not None else i
        assert int(batch.tokens[last]) == i
        assert int(batch.positions[last]) == before + now - 1
    assert not pool.keys[0].any(), "another layer was written"


def _admit(sequence: int, pages: tuple[int, ...] = ()) -> Admission:
    return Admission(sequence, SamplingParams(), 3, pages)


def _decode(sequence: int, start: int, new: tuple[int, ...] = (), token: int = 1) -> Segment:
    return Segment(sequence, SegmentKind.DECODE, start, (token,), new, True)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(0, 7, released=(5,)), "route 0, step 7: released sequence 5 is unknown"),
        (Step(0, 7, admitted=(_admit(1),)), "sequence 1 is admitted twice"),
        (Step(0, 7, admitted=(_admit(2), _admit(3))), "more than 2 sequences"),
        (Step(0, 7, admitted=(_admit(2, (8,)),)), "outside the pool of 8"),
        (Step(0, 7, segments=(_decode(1, 0, (-1,)),)), "outside the pool of 8"),
        (Step(0, 7, segments=(_decode(1, 0, (1,) * 8),)), "outside the pool of 8"),
        (Step(0, 7, segments=(_decode(9, 0),)), "sequence 9 is unknown"),
        (Step(0, 7, segments=(_decode(1, 4),)), "too few for positions up to 5"),
        (Step(0, 7, segments=(_decode(1, -1),)), "too few for positions"),
        (Step(0, 7, segments=(_decode(1, 0, token=50),)), "outside the vocabulary of 50"),
        (Step(0, 7, segments=(_decode(1, 0, token=-1),)), "outside the vocabulary of 50"),
        (Step(0, 7, segments=(_decode(1, 0), _decode(1, 1))), "two segments"),
        (Step(0, 7, segments=(Segment(1, SegmentKind.PREFILL, 0, ()),)), "no tokens"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(step: Step, message: str) -> None:
    tables = PageTables(8, 4, 50, max_sequences=2)
    tables.apply(Step(0, 0, admitted=(_admit(1, (2,)),)))

    def run() -> None:
        tables.apply(step)
        build_batch(step, tables, 4, "cpu")

    with pytest.raises(EngineError, match=message):
        run()


def test_tables_forget_what_is_released() -> None:
    tables = PageTables(8, 4, 50)
    tables.apply(Step(0, 0, admitted=(_admit(1, (2,)), _admit(2))))
    tables.apply(Step(0, 1, released=(1,), admitted=(_admit(1, (3,)),), segments=(_decode(1, 2, token=9),)))
    batch = build_batch(Step(0, 1, segments=(_decode(1, 2, token=9),)), tables, 4, "cpu")
    assert batch.slot_pages.tolist() == [3]
    assert batch.slot_offsets.tolist() == [2]
    tables.apply(Step(0, 2, released=(1, 2)))
    assert len(tables) == 0


def test_an_empty_step_is_an_empty_batch() -> None:
    batch = build_batch(Step(0, 0), PageTables(8, 4, 50), 4, "cpu")
    assert batch.n_tokens == 0
    assert batch.sampled == 0
