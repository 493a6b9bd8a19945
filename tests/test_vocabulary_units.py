"""Quantities: units told apart, exact values, exact round trips."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen import units
from hexgen.errors import SpecError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GB", 24 * 10**9),
        ("16GiB", 16 * 2**30),
        ("512B", 512),
        ("1.5KB", 1500),
        (" 12.8 MB ", 12_800_000),
        ("1e3KB", 1_000_000),
        ("2TiB", 2 * 2**40),
        (".5KiB", 512),
    ],
)
def test_bytes(text: str, value: int) -> None:
    assert units.parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10Gbps", 1.25e9),
        ("10Gb/s", 1.25e9),
        ("10Gbit/s", 1.25e9),
        ("56GB/s", 56e9),
        ("1GiB/s", 2.0**30),
        ("8bps", 1.0),
        ("100Mbps", 12.5e6),
    ],
)
def test_bandwidth_tells_bits_from_bytes(text: str, value: float) -> None:
    assert units.parse_bandwidth(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("5us", 5e-6), ("70ms", 0.07), ("2s", 2.0), ("0s", 0.0), ("1min", 60.0), ("3ns", 3e-9)]
)
def test_time(text: str, value: float) -> None:
    assert units.parse_time(text) == value


def test_flops() -> None:
    assert units.parse_flops("142TFLOPS") == 142e12
    assert units.parse_flops("1.5PFLOP/s") == 1.5e15


@pytest.mark.parametrize(
    "wrong",
    [
        "24",
        "24 gb",
        "GB",
        "",
        "24XB",
        "-1GB",
        "1,5GB",
        "nanGB",
        "infGB",
        "24GBps",
        "0.3B",
        "1e999GB",
        "1e99GB",
        24,
        2.5,
    ],
)
def test_wrong_sizes(wrong: object) -> None:
    with pytest.raises(SpecError, match=r"cluster\.yaml: here"):
        units.parse_bytes(wrong, "cluster.yaml: here")


@pytest.mark.parametrize("wrong", ["10GB", "10Gb", "10gbps", None, True, [1], "9" * 100 + "Gbps"])
def test_wrong_bandwidths(wrong: object) -> None:
    with pytest.raises(SpecError):
        units.parse_bandwidth(wrong)


rates = st.floats(min_value=1e-9, max_value=1e20, allow_nan=False)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**18), rates)
def test_exact_text_parses_to_the_same_number(size: int, rate: float) -> None:
    assert units.parse_bytes(units.exact_bytes(size)) == size
    assert units.parse_bandwidth(units.exact_bandwidth(rate)) == rate
    assert units.parse_time(units.exact_time(rate)) == rate
    assert units.parse_flops(units.exact_flops(rate)) == rate


def test_exact_text_reads_well() -> None:
    assert units.exact_bytes(24 * 10**9) == "24GB"
    assert units.exact_bytes(16 * 2**30) == "16GiB"
    assert units.exact_bandwidth(56e9) == "56GB/s"
    assert units.exact_bandwidth(12.5e6) == "12.5MB/s"
    assert units.exact_time(5e-6) == "5us"
    assert units.exact_time(0.0) == "0.0s"
    assert units.exact_flops(142e12) == "142TFLOPS"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.format_bytes(0), "0 B"),
        (units.format_bytes(999), "999 B"),
        (units.format_bytes(28_123_456), "28.1 MB"),
        (units.format_bytes(999_999), "1 MB"),
        (units.format_bytes(123_456), "123 KB"),
        (units.format_time(0.0125), "12.5 ms"),
        (units.format_time(0), "0 s"),
        (units.format_time(2e-7), "200 ns"),
        (units.format_time(3), "3 s"),
    ],
)
def test_rounded_text(shown: str, expected: str) -> None:
    assert shown == expected
