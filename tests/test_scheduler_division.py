"""Division of layers over stages with any times that do not fall, against every division there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.scheduler.division import LinearSeconds, Seconds, TabledSeconds

Rows = list[list[float]]


def divisions(layers: int, caps: list[int]) -> Iterator[tuple[int, ...]]:
    if not caps:
        if layers == 0:
            yield ()
        return
    for n in range(1, min(caps[0], layers) + 1):
        for rest in divisions(layers - n, caps[1:]):
            yield (n, *rest)


@st.composite
def problems(draw: st.DrawFn, *, convex: bool) -> tuple[Rows, list[int], int]:
    """Rows of times, caps, and layers that fit."""
    stages = draw(st.integers(1, 4))
    caps = draw(st.lists(st.integers(1, 5), min_size=stages, max_size=stages))
    rows: Rows = []
    for cap in caps:
        steps = draw(st.lists(st.integers(0, 20), min_size=cap, max_size=cap))
        row = [0.0]
        for step in sorted(steps) if convex else steps:
            row.append(row[-1] + step / 8)  # eighths are exact
        rows.append(row)
    return rows, caps, draw(st.integers(stages, sum(caps)))


@settings(deadline=None, max_examples=150)
@given(problem=st.booleans().flatmap(lambda convex: problems(convex=convex)), reach=st.floats(0, 20))
def test_tabled_times_equal_brute_force(problem: tuple[Rows, list[int], int], reach: float) -> None:
    rows, caps, layers = problem
    seconds = TabledSeconds(rows)
    every = list(divisions(layers, caps))
    shortest = seconds.shortest_max(layers, caps)
    assert shortest in every
    assert seconds.longest(shortest) == min(map(seconds.longest, every))
    cheapest = seconds.cheapest(layers, caps)
    assert cheapest in every
    assert seconds.total(cheapest) == pytest.approx(min(map(seconds.total, every)))
    for i, most in enumerate(seconds.capped(caps, reach)):
        within = [n for n in range(1, caps[i] + 1) if rows[i][n] <= reach * (1 + 1e-12)]
        assert most == max(within, default=1)
    floor = seconds.longest(shortest)
    between = {row[n] for row, cap in zip(rows, caps, strict=True) for n in range(1, cap + 1)}
    assert {t for t in between if floor <= t <= reach} <= set(seconds.thresholds(caps, floor, reach))


@settings(deadline=None, max_examples=80)
@given(
    lines=st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 5), st.integers(1, 6)), min_size=1, max_size=4),
    more=st.integers(0, 20),
)
def test_linear_and_tabled_times_agree(lines: list[tuple[float, float, int]], more: int) -> None:
    caps = [cap for _, _, cap in lines]
    layers = min(sum(caps), len(caps) + more)
    linear: Seconds = LinearSeconds([f for f, _, _ in lines], [s for _, s, _ in lines])
    tabled: Seconds = TabledSeconds([[f + s * n for n in range(cap + 1)] for f, s, cap in lines])
    for choose in ("shortest_max", "cheapest"):
        a, b = (getattr(seconds, choose)(layers, caps) for seconds in (linear, tabled))
        assert sum(a) == sum(b) == layers
        assert linear.longest(a) == pytest.approx(linear.longest(b)) or choose == "cheapest"
        assert linear.total(a) == pytest.approx(linear.total(b)) or choose == "shortest_max"
