"""Quantities as people write them: bytes, bandwidth, time and FLOP/s, each with its unit.

KB MB GB TB PB are powers of 1000, KiB MiB GiB TiB of 1024. Rates of data may be in bits (``10Gbps``, ``10Gb/s``)
or bytes (``56GB/s``); upper and lower case of the b tell them apart. Parsing is exact: the decimal number that was
written, times its unit, rounded once to the nearest float.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation

from hexgen.errors import SpecError

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

_BYTES: dict[str, Decimal] = {f"{p}B": Decimal(f) for p, f in (_DECIMAL | _BINARY).items()}
_BANDWIDTH: dict[str, Decimal] = {
    **{f"{p}B/s": Decimal(f) for p, f in (_DECIMAL | _BINARY).items()},
    **{f"{p}{bits}": Decimal(f) / 8 for p, f in _DECIMAL.items() for bits in ("bps", "b/s", "bit/s")},
}
_TIME: dict[str, Decimal] = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
}
_FLOPS: dict[str, Decimal] = {
    f"{p}{name}": Decimal(f) for p, f in _DECIMAL.items() for name in ("FLOPS", "FLOP/s")
}

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)((?:[eE][+-]?[0-9]{1,3})?)\s*([^\s0-9.].*?)\s*")
_MAX_TEXT = 64  # characters: no honest quantity is longer


def parse_bytes(text: object, where: str | None = None) -> int:
    """Bytes in ``"24GB"``, ``"16GiB"``, ``"512B"``; a whole number of them."""
    value = _parse(text, _BYTES, "a size", "24GB or 512MiB", where)
    if value != value.to_integral_value():
        raise SpecError(f"{text!r} is not a whole number of bytes", where=where)
    return int(value)


def parse_bandwidth(text: object, where: str | None = None) -> float:
    """Bytes/s in ``"10Gbps"`` (bits) or ``"56GB/s"`` (bytes)."""
    return float(_parse(text, _BANDWIDTH, "a bandwidth", "10Gbps or 56GB/s", where))


def parse_time(text: object, where: str | None = None) -> float:
    """Seconds in ``"5us"``, ``"1.5ms"``, ``"2s"``."""
    return float(_parse(text, _TIME, "a time", "5us, 20ms or 2s", where))


def parse_flops(text: object, where: str | None = None) -> float:
    """FLOP/s in ``"142TFLOPS"`` or ``"142TFLOP/s"``."""
    return float(_parse(text, _FLOPS, "a speed", "142TFLOPS", where))


def _parse(text: object, units: Mapping[str, Decimal], what: str, example: str, where: str | None) -> Decimal:
    remedy = f"write {what} with its unit, like {example}"
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        shown = repr(text) if not isinstance(text, str) else f"a text of {len(text)} characters"
        raise SpecError(f"{shown} is not {what}", where=where, remedy=remedy)
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise SpecError(f"{text!r} is not {what}", where=where, remedy=remedy)
    mantissa, exponent, unit = match.groups()
    if unit not in units:
        raise SpecError(f"{text!r} has no unit of {what}", where=where, remedy=remedy)
    try:
        value = Decimal(mantissa + exponent) * units[unit]
    except InvalidOperation as error:
        raise SpecError(f"{text!r} is not {what}", where=where, remedy=remedy) from error
    if value > Decimal("1e30"):
        raise SpecError(f"{text!r} is larger than anything there is", where=where)
    return value


# ---- exact text: what files are written with; parsing it gives the same number back -------------------------


def exact_bytes(value: int) -> str:
    """``24GB`` or ``16GiB`` where that is exact, plain bytes otherwise."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        # A size that is round in powers of 1000 reads best so, even where 1024 divides it.
        if value and value % int(_BYTES[unit]) == 0 and value % 1000:
            return f"{value // int(_BYTES[unit])}{unit}"
    for unit in ("TB", "GB", "MB", "KB"):
        if value and value % int(_BYTES[unit]) == 0:
            return f"{value // int(_BYTES[unit])}{unit}"
    return f"{value}B"


def exact_bandwidth(value: float) -> str:
    return _exact(value, ("TB/s", "GB/s", "MB/s", "KB/s"), "B/s", parse_bandwidth, _BANDWIDTH)


def exact_time(value: float) -> str:
    return _exact(value, ("s", "ms", "us"), "s", parse_time, _TIME)


def exact_flops(value: float) -> str:
    return _exact(value, ("TFLOPS", "GFLOPS", "MFLOPS"), "FLOPS", parse_flops, _FLOPS)


def _exact(
    value: float,
    candidates: tuple[str, ...],
    fallback: str,
    parse: Callable[[object], float],
    units: Mapping[str, Decimal],
) -> str:
    for unit in candidates:
        number = value / float(units[unit])
        text = f"{number:.12g}{unit}"
        if 1 <= number < 10000 and "e" not in text.removesuffix(unit) and parse(text) == value:
            return text
    return f"{value!r}{fallback}"


# ---- rounded text: what people read -------------------------------------------------------------------------


def format_bytes(value: float) -> str:
    """``28.1 MB``: three significant digits, powers of 1000."""
    return _rounded(value, "B")


_AGES_S = 1e9  # nobody reads more digits of it


def format_time(value: float) -> str:
    """``12.5 ms``: three significant digits, from nanoseconds to seconds."""
    if value == 0:
        return "0 s"
    if abs(value) >= _AGES_S:
        return f"{value:.3g} s"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= factor * 0.9995:
            return f"{_digits(value / factor)} {unit}"
    return f"{_digits(value / 1e-9)} ns"


def _rounded(value: float, unit: str) -> str:
    for prefix in ("P", "T", "G", "M", "K"):
        if abs(value) >= _DECIMAL[prefix] * 0.9995:
            return f"{_digits(value / _DECIMAL[prefix])} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    """Three significant digits, never an exponent, no trailing zeros after the point."""
    text = f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
    return text if "e" not in text else f"{value:.6f}".rstrip("0").rstrip(".")
