"""How a stage is divided: every head, column and row exactly once, whatever the width and the shares."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.errors import SpecError
from hexgen.model import ModelSpec
from hexgen.split import deal, split_stage

MODEL = ModelSpec("m", "llama", 2, 64, 8, 4, 8, 176, 1000, 512)

shares_of = st.floats(min_value=1e-300, max_value=1e300, allow_nan=False, allow_infinity=False)


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 12))
    heads = kv_heads * draw(st.integers(1, 8))
    return dataclasses.replace(
        MODEL,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=draw(st.integers(1, 300)),
        vocab_size=draw(st.integers(1, 2000)),
    )


@st.composite
def stages(draw: st.DrawFn) -> tuple[ModelSpec, int, tuple[float, ...] | None]:
    model = draw(models())
    width = draw(st.integers(1, model.heads))
    shares = draw(st.none() | st.lists(shares_of, min_size=width, max_size=width).map(tuple))
    return model, width, shares


@settings(deadline=None, max_examples=100)
@given(stages())
def test_every_part_is_covered_once(stage: tuple[ModelSpec, int, tuple[float, ...] | None]) -> None:
    model, width, shares = stage
    parts = split_stage(model, width, shares)
    assert len(parts) == width
    for name, total in (
        ("query_heads", model.heads),
        ("columns", model.intermediate_size),
        ("vocab", model.vocab_size),
    ):
        ranges = [getattr(part, name) for part in parts]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == total
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        assert all(start <= end for start, end in ranges)
        if total >= width:
            assert all(start < end for start, end in ranges)
    group = model.heads // model.kv_heads
    for part in parts:
        needed = {head // group for head in range(*part.query_heads)}
        assert set(range(*part.kv_heads)) == needed


@settings(deadline=None, max_examples=100)
@given(stages())
def test_shares_are_followed(stage: tuple[ModelSpec, int, tuple[float, ...] | None]) -> None:
    """Within one column and row; within one head, or half a group where whole groups are dealt."""
    model, width, shares = stage
    weights = shares or (1.0,) * width
    top = max(weights)
    total = sum(w / top for w in weights)
    group = model.heads // model.kv_heads
    for part, weight in zip(split_stage(model, width, shares), weights, strict=True):
        fraction = weight / top / total
        for count, whole, slack in (
            (part.n_columns, model.intermediate_size, 1.0),
            (part.n_vocab, model.vocab_size, 1.0),
            (part.n_query_heads, model.heads, 1.0 + group / 2),
        ):
            # The floor of one each takes from the largest, at most one a rank.
            assert count - fraction * whole < slack + 1e-6
            assert fraction * whole - count < slack + width


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 500), st.lists(shares_of, min_size=1, max_size=20))
def test_deal_follows_shares_within_one_item(total: int, shares: list[float]) -> None:
    top = max(shares)
    weight = sum(s / top for s in shares)
    for (start, end), share in zip(deal(total, shares), shares, strict=True):
        assert abs((end - start) - total * (share / top) / weight) < 1 + 1e-6


@pytest.mark.parametrize("width", [1, 2, 3, 5, 6, 7, 8])
def test_equal_shares_differ_by_at_most_one_group(width: int) -> None:
    counts = [part.n_query_heads for part in split_stage(MODEL, width)]
    assert max(counts) - min(counts) <= MODEL.heads // MODEL.kv_heads


def test_even_widths_hold_no_kv_head_twice() -> None:
    for width in (1, 2, 4):
        assert sum(part.n_kv_heads for part in split_stage(MODEL, width)) == MODEL.kv_heads


@pytest.mark.parametrize("width", [0, 9, -1])
def test_impossible_widths(width: int) -> None:
    with pytest.raises(SpecError, match=r"outside 1\.\.8"):
        split_stage(MODEL, width)


@pytest.mark.parametrize("shares", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_impossible_shares(shares: tuple[float, ...]) -> None:
    with pytest.raises(SpecError, match="positive numbers"):
        split_stage(MODEL, 2, shares)
