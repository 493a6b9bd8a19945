"""Workloads in files, on the command line, and in traces of real requests."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from hexgen import units, yamlfile
from hexgen.errors import SpecError
from hexgen.workload_spec import Lengths, Slo, Workload
from hexgen.yamlfile import Inline, Place, Section

MAX_TRACE_BYTES = 256 * 1024 * 1024
_TRACE_WANTED = "a header and a row a request: timestamp, prompt_tokens, output_tokens"
_LINE_WANTED = "correct the line, or leave it out"
MAX_TOKENS = 10_000_000  # of one prompt or output
_KEYS = ("prompt_tokens", "output_tokens", "rate", "slo")

# Column names of published traces, compared without case, blanks and underscores.
_PROMPT_COLUMNS = ("prompttokens", "inputtokens", "inputlength", "promptlength", "contexttokens", "requesttokens")
_OUTPUT_COLUMNS = (
    "outputtokens", "outputlength", "generatedtokens", "responsetokens", "completiontokens", "decodetokens",
)  # fmt: skip
_TIME_COLUMNS: dict[str, float] = {  # and how many seconds one of their units is
    "timestamp": 1.0, "timestamps": 1.0, "time": 1.0, "ts": 1.0, "arrivals": 1.0,
    "arrivaltime": 1.0, "arrivedat": 1.0, "timestampms": 1e-3, "emissiontimems": 1e-3, "tms": 1e-3,
}  # fmt: skip

_time_limit = yamlfile.quantity(units.parse_time)


def load_workload(source: str | Path, base_dir: Path | None = None) -> Workload:
    """A workload from a YAML file, from a trace (``.csv``), or from text like ``prompt=763,output=232,rate=2.5``.

    A YAML file holds the fields of a cluster file's ``workload``, at its top or under that key. A trace gives
    both lengths, and the rate where it has times. ``SpecError`` where it is none of these.
    """
    text = str(source)
    path = Path(text)
    if base_dir is not None and not path.is_absolute() and (base_dir / path).is_file():
        path = base_dir / path
    if "\n" not in text and len(text) < 4096 and path.is_file():
        if path.suffix == ".csv":
            return _from_trace(path)
        value = yamlfile.read_yaml(path)
        inner = value.get("workload", value)
        place = Place(str(path), "workload" if "workload" in value else "")
        return parse_workload(inner, place, path.parent)
    if text.lstrip().startswith("{"):
        return parse_workload(yamlfile.parse_yaml(text, "workload"), Place("workload"), base_dir)
    if "=" in text:
        return parse_workload(_pairs(text), Place("workload"), base_dir)
    raise SpecError(
        f"no workload file {text[:200]!r}",
        where="workload",
        remedy="give a YAML file, a .csv trace, or text like prompt=763,output=232,rate=2.5",
    )


def _pairs(text: str) -> dict[str, Any]:
    names = {"prompt": "prompt_tokens", "output": "output_tokens"}
    value: dict[str, Any] = {}
    for part in text.split(","):
        key, _, figure = part.partition("=")
        key = names.get(key.strip(), key.strip())
        target = value.setdefault("slo", {}) if key in ("ttft", "tpot", "latency") else value
        if key in target:
            raise SpecError(f"{key!r} stands twice", where="workload")
        target[key] = _number_or_text(figure.strip())
    return value


def _number_or_text(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_workload(value: object, where: str | Place = "workload", base_dir: Path | None = None) -> Workload:
    """The workload in ``value``; what it leaves out keeps its default. Traces are looked for in ``base_dir``."""
    section = Section(value, where if isinstance(where, Place) else Place(where), _KEYS)
    default = Workload()
    return Workload(
        prompt_tokens=section.get(
            "prompt_tokens", lambda v, p: _lengths(v, p, base_dir, _PROMPT_COLUMNS), default.prompt_tokens
        ),
        output_tokens=section.get(
            "output_tokens", lambda v, p: _lengths(v, p, base_dir, _OUTPUT_COLUMNS), default.output_tokens
        ),
        rate=section.get("rate", _rate, default.rate),
        slo=section.get("slo", _slo, default.slo),
    )


def _rate(value: object, place: Place) -> float | Literal["max"]:
    if value == "max":
        return "max"
    if isinstance(value, str):
        yamlfile.wrong(value, place, "requests per second, or max")
    return yamlfile.number()(value, place)


def _slo(value: object, place: Place) -> Slo:
    section = Section(value, place, ("ttft", "tpot", "latency"))
    return Slo(
        ttft_s=section.optional("ttft", _time_limit),
        tpot_s=section.optional("tpot", _time_limit),
        latency_s=section.optional("latency", _time_limit),
    )


def _lengths(value: object, place: Place, base_dir: Path | None, columns: tuple[str, ...]) -> Lengths:
    if not isinstance(value, dict):
        return Lengths(mean=_tokens(value, place))
    section = Section(value, place, ("mean", "p99", "max", "trace"))
    trace = section.optional("trace", yamlfile.text)
    if trace is not None and "mean" not in section:
        path = Path(trace) if base_dir is None else base_dir / trace
        rows = _read_trace(path, str(place.key("trace")))
        return _summary(_column(rows, columns, path), trace)
    lengths = Lengths(
        mean=section.require("mean", _tokens),
        p99=section.optional("p99", _tokens),
        max=section.optional("max", yamlfile.integer(1, MAX_TOKENS)),
        trace=trace,
    )
    if lengths.max is not None and max(lengths.mean, lengths.p99 or 0) > lengths.max:
        raise SpecError(f"max ({lengths.max}) is below the mean or p99", where=str(place))
    return lengths


def _tokens(value: object, place: Place) -> float:
    tokens = yamlfile.number()(value, place)
    if tokens > MAX_TOKENS:
        yamlfile.wrong(value, place, f"at most {MAX_TOKENS} tokens")
    return tokens


# ---- traces --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace's rows as they stand, failed requests of no tokens among them. ``arrival_s``: None without times."""

    arrival_s: list[float] | None
    prompt_tokens: list[float]
    output_tokens: list[float]


def read_trace(path: Path) -> Trace:
    """The requests of a trace, one a row. Times are numbers, or dates as ISO 8601 writes them.

    ``SpecError`` naming the row, where a cell is not what its column holds.
    """
    rows = _read_trace(path, str(path))
    prompts, outputs = _column(rows, _PROMPT_COLUMNS, path), _column(rows, _OUTPUT_COLUMNS, path)
    for column, unit_s in _TIME_COLUMNS.items():
        if column in rows:
            times = [_moment(text, column, line, path) * unit_s for line, text in rows.cells(column)]
            return Trace(times, prompts, outputs)
    return Trace(None, prompts, outputs)


def _moment(text: str, column: str, line: int, path: Path) -> float:
    if _is_number(text):
        return float(text)
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        return _cell(text, column, line, path)  # says what is wrong


def _from_trace(path: Path) -> Workload:
    rows = _read_trace(path, str(path))
    prompt = _summary(_column(rows, _PROMPT_COLUMNS, path), str(path))
    output = _summary(_column(rows, _OUTPUT_COLUMNS, path), str(path))
    for column, unit_s in _TIME_COLUMNS.items():
        if column in rows and len(rows.lines) > 1:
            times = [_moment(text, column, line, path) for line, text in rows.cells(column)]
            span_s = (max(times) - min(times)) * unit_s
            if span_s > 0:
                return Workload(prompt, output, rate=(len(times) - 1) / span_s)
    return Workload(prompt, output)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Columns by simplified name, and the line of the file on which each row ends."""

    columns: dict[str, list[str]]
    lines: list[int]

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def cells(self, column: str) -> Iterator[tuple[int, str]]:
        return zip(self.lines, self.columns[column], strict=True)


def _read_trace(path: Path, where: str) -> _Rows:
    """Columns by simplified name. Three columns without a header are time, prompt tokens, output tokens."""
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise SpecError(f"the trace is larger than {MAX_TRACE_BYTES} bytes", where=str(path), remedy="cut it")
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row]
    except OSError as error:
        raise SpecError(f"the trace {path} cannot be read: {error.strerror}", where=where) from error
    except (UnicodeDecodeError, csv.Error) as error:
        told = "it is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise SpecError(f"the trace is not CSV: {told}", where=str(path), remedy=_TRACE_WANTED) from error
    if rows and all(_is_number(cell) for cell in rows[0][1]):
        rows.insert(0, (0, ["timestamp", "prompt_tokens", "output_tokens"]))
    if len(rows) < 2:
        raise SpecError("the trace has no rows", where=str(path), remedy=_TRACE_WANTED)
    header = ["".join(c for c in cell.lower() if c.isalnum()) for cell in rows[0][1]]
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise SpecError(
                f"line {line} has {len(row)} cells, the header has {len(header)}",
                where=str(path),
                remedy=_LINE_WANTED,
            )
    columns = {column: [row[c] for _, row in rows[1:]] for c, column in enumerate(header)}
    return _Rows(columns, [line for line, _ in rows[1:]])


def _column(rows: _Rows, names: tuple[str, ...], path: Path) -> list[float]:
    for name in names:
        if name in rows:
            return [_count(text, name, line, path) for line, text in rows.cells(name)]
    raise SpecError(
        f"the trace has none of the columns {', '.join(names)}",
        where=str(path),
        remedy=f"it has {', '.join(rows.columns)}",
    )


def _cell(text: str, column: str, line: int, path: Path) -> float:
    if not _is_number(text):
        raise SpecError(
            f"line {line}: {column} is {text[:40]!r}, not a number", where=str(path), remedy=_LINE_WANTED
        )
    return float(text)


def _count(text: str, column: str, line: int, path: Path) -> float:
    value = _cell(text, column, line, path)
    if value < 0:
        raise SpecError(
            f"line {line}: {column} is {text[:40]!r}, less than nothing", where=str(path), remedy=_LINE_WANTED
        )
    if value > MAX_TOKENS:
        raise SpecError(
            f"line {line}: {column} is {text[:40]!r}, more than {MAX_TOKENS}", where=str(path), remedy=_LINE_WANTED
        )
    return value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _summary(values: list[float], trace: str) -> Lengths:
    """Rows of no tokens are requests that failed; they say nothing about lengths."""
    ordered = sorted(v for v in values if v > 0)
    if not ordered or ordered[-1] > MAX_TOKENS:
        raise SpecError(f"token counts must lie between 1 and {MAX_TOKENS}", where=trace)
    p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    return Lengths(mean=sum(ordered) / len(ordered), p99=p99, max=math.ceil(ordered[-1]), trace=trace)


# ---- writing -------------------------------------------------------------------------------------------------


def workload_to_dict(workload: Workload) -> dict[str, Any]:
    """Plain values, as a file has them; ``parse_workload`` of it gives an equal workload."""
    slo = Inline(
        {
            key: units.exact_time(limit)
            for key, limit in (
                ("ttft", workload.slo.ttft_s),
                ("tpot", workload.slo.tpot_s),
                ("latency", workload.slo.latency_s),
            )
            if limit is not None
        }
    )
    out: dict[str, Any] = {
        "prompt_tokens": _lengths_to_value(workload.prompt_tokens),
        "output_tokens": _lengths_to_value(workload.output_tokens),
        "rate": "max" if workload.rate == "max" else yamlfile.plain(workload.rate),
    }
    return out | ({"slo": slo} if slo else {})


def _lengths_to_value(lengths: Lengths) -> float | Inline:
    given = Inline(mean=yamlfile.plain(lengths.mean))
    if lengths.p99 is not None:
        given["p99"] = yamlfile.plain(lengths.p99)
    if lengths.max is not None:
        given["max"] = lengths.max
    if lengths.trace is not None:
        given["trace"] = lengths.trace
    return yamlfile.plain(lengths.mean) if len(given) == 1 else given
