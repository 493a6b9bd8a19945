"""Requests to simulate: arrivals and lengths that have the figures asked for, traces, and bad ones refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hexgen.errors import SpecError
from hexgen.scheduler.lengths import fit, mean_age
from hexgen.scheduler.simulation import Requests, replay, requests_of
from hexgen.scheduler.simulation.lengths import draw
from hexgen.workload import Lengths, Workload

CHAT = Workload(Lengths(763, p99=2000), Lengths(232, p99=800), rate=2.5)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    requests = requests_of(CHAT, 50_000, seed=1, burstiness=burstiness)
    gaps = np.diff(requests.arrival_s)
    assert gaps.mean() == pytest.approx(1 / 2.5, rel=0.03)
    # A gamma distribution of shape k varies by 1 / sqrt(k) of its mean.
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_other_rates_meet_the_same_requests() -> None:
    slow, fast = requests_of(CHAT, 500, seed=7), requests_of(CHAT, 500, seed=7, rate=25.0)
    assert np.allclose(slow.arrival_s, 10 * fast.arrival_s)
    assert np.array_equal(slow.prompt_tokens, fast.prompt_tokens)
    assert np.allclose(slow.at_rate(25.0).rate, 25.0)
    assert not np.array_equal(slow.prompt_tokens, requests_of(CHAT, 500, seed=8).prompt_tokens)
    assert not np.any(requests_of(CHAT, 500, rate=None).at_once().arrival_s)


@settings(max_examples=40, deadline=None)
@given(st.floats(20, 3000), st.floats(1.2, 6), st.one_of(st.none(), st.floats(1.5, 4)))
def test_lengths_have_the_mean_the_percentile_and_the_maximum(
    mean: float, ratio: float, above: float | None
) -> None:
    p99 = mean * ratio
    lengths = Lengths(mean, p99, None if above is None else int(p99 * above))
    try:
        fitted = fit(lengths)
    except SpecError:
        assume(False)
    assert fitted is not None
    assert fitted.mean == pytest.approx(mean, rel=1e-6)
    assert fitted.quantile(0.99) == pytest.approx(p99, rel=0.01)
    drawn = draw(lengths, 20_000, np.random.default_rng(0))
    assert drawn.min() >= 1
    assert lengths.max is None or drawn.max() <= lengths.max
    assert drawn.mean() == pytest.approx(mean, rel=0.06)


@pytest.mark.parametrize(
    "lengths", [Lengths(763.1, max=2047), Lengths(232, p99=800), Lengths(100, p99=300, max=500), Lengths(64)]
)
def test_the_planner_counts_the_tokens_that_the_simulator_draws(lengths: Lengths) -> None:
    drawn = draw(lengths, 200_000, np.random.default_rng(0)).astype(float)
    assert mean_age(lengths) == pytest.approx((drawn**2).mean() / (2 * drawn.mean()), rel=0.01)
    assert mean_age(lengths) >= lengths.mean / 2


def test_a_mean_alone_is_every_length_and_a_maximum_bounds() -> None:
    random = np.random.default_rng(0)
    assert set(draw(Lengths(763.1), 10, random).tolist()) == {763}
    azure = draw(Lengths(763.1, max=2047), 50_000, random)
    assert azure.max() <= 2047
    assert azure.mean() == pytest.approx(763.1, rel=0.02)


@pytest.mark.parametrize("lengths", [Lengths(100, p99=90), Lengths(100, p99=1999, max=2000), Lengths(1, p99=50)])
def test_lengths_that_no_distribution_has(lengths: Lengths) -> None:
    with pytest.raises(SpecError, match="99th percentile"):
        fit(lengths, "workload: prompt_tokens")
    assert mean_age(lengths) == lengths.mean / 2  # the planner needs no percentile


def test_a_trace_is_replayed_from_its_first_arrival(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:48.500000,30,4\n"
        "2023-11-16 18:15:46.500000,10,2\n"
        "2023-11-16 18:15:47.0,20,0\n"
    )
    requests = replay(path)
    assert requests.arrival_s.tolist() == [0.0, 2.0]
    assert requests.prompt_tokens.tolist() == [10, 30]
    assert requests.output_tokens.tolist() == [2, 4]
    assert replay(path, rate=5.0).arrival_s.tolist() == [0.0, 0.2]
    path.write_text("emission_time_ms,input_length,output_length\n0,1,1\n1500,2,3\n")
    assert replay(path).arrival_s.tolist() == [0.0, 1.5]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("timestamp,prompt_tokens,output_tokens\n0,10,5\n1,ten,5\n", "line 3.*prompttokens.*ten"),
        ("timestamp,prompt_tokens,output_tokens\n0,10,5\nsoon,10,5\n", "line 3.*timestamp.*soon"),
        ("timestamp,prompt_tokens,output_tokens\n0,10,5\n1,10\n", "line 3 has 2 cells"),
        ("0,10,5\n\n1,ten,5\n", "line 3: prompttokens"),
        ("prompt_tokens,output_tokens\n10,5\n", "no column of times"),
        ("timestamp,prompt_tokens,output_tokens\n0,0,5\n", "no row"),
    ],
)
def test_a_malformed_trace_names_the_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(SpecError, match=complaint):
        replay(path)


def test_requests_that_do_not_fit_together() -> None:
    ones = np.ones(3, dtype=np.int64)
    with pytest.raises(SpecError, match="in order"):
        Requests(np.array([0.0, 2.0, 1.0]), ones, ones)
    with pytest.raises(SpecError, match="one length"):
        Requests(np.zeros(2), ones, ones)
    with pytest.raises(SpecError, match="at least one"):
        Requests(np.zeros(3), ones, ones * 0)
