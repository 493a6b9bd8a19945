"""What ``hexgen discover`` does: asks and measures, and writes the cluster file and a model's times."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from hexgen.cli._common import check_target, say
from hexgen.cli.discover_progress import discover_shown
from hexgen.discover.describe import cluster_text, described
from hexgen.discover.models import time_model
from hexgen.discover.survey import survey, surveyed
from hexgen.errors import SpecError
from hexgen.model import DTYPE_BYTES, DType, ModelSpec, load_model

HEAD = (
    "Written by `hexgen discover`; every figure says how it was come by. Correct what you know better:\n"
    "names, prices, regions, memory."
)
QUICK_HEAD = (
    "Written by `hexgen discover --no-measure`: names, counts and memory as the nodes report them, speeds from\n"
    "the catalogue. Links between nodes are not measured: give them under `links:` before planning."
)
TABLE_NAME = "measured.yaml"


@dataclass(frozen=True, slots=True)
class DiscoverRequest:
    """The options of the command, as they were given."""

    ray_address: str | None = None
    output: Path | None = None
    model: str | None = None
    table: Path | None = None
    dtype: str | None = None
    cpu_threads: int | None = None
    measure: bool = True
    quiet: bool = False


def run(asked: DiscoverRequest, prepared: Callable[[], None] = lambda: None) -> None:
    """``prepared`` is called when all probes are there and nothing has been measured. Raises ``HexgenError``."""
    started = time.monotonic()
    output, model = asked.output, asked.model
    table_path = asked.table or (output.parent if output else Path()) / TABLE_NAME
    for target in (output, table_path if model is not None else None):
        if target is not None:
            check_target(target)
    if model is None and (asked.table is not None or asked.dtype is not None):
        raise SpecError("times are measured with --model only", where="--table" if asked.table else "--dtype")
    if model is not None and not asked.measure:
        raise SpecError("--model measures, and --no-measure says not to", where="--no-measure")
    logging.getLogger("ray").setLevel(logging.ERROR)
    shape, chosen = _model(model, asked.dtype)
    head = HEAD if asked.measure else QUICK_HEAD
    with discover_shown(asked.quiet) as progress, surveyed(asked.ray_address, progress) as surveyor:
        found = survey(surveyor, measure=asked.measure, threads=asked.cpu_threads, prepared=prepared)
        name = "ray" if surveyor.on_ray else "this-machine"
        made = described(name, found, asked.cpu_threads)
        if output is not None:  # before the long part: an interrupted calibration leaves what there is
            _write(output, cluster_text(made, head))
        times = None
        if shape is not None:
            times = time_model(surveyor, found, made.cluster, shape, chosen, str(model))
            _write(table_path, times.text)
            made = described(name, found, asked.cpu_threads, _beside(table_path, output))
            if output is not None:
                _write(output, cluster_text(made, head))
    for line in (*found.left_out, *found.remarks, *made.remarks, *(times.remarks if times is not None else ())):
        say(f"note: {line}")
    if output is None:
        typer.echo(cluster_text(made, head), nl=False)
    else:
        devices = sum(node.count for node in made.cluster.nodes)
        say(f"wrote {output}: {len(made.cluster.nodes)} nodes, {devices} devices")
    if times is not None:
        say(f"wrote {table_path}" + (", which the cluster file names" if output is not None else ""))
    say(f"{time.monotonic() - started:.0f} s")


def _model(reference: str | None, dtype: str | None) -> tuple[ModelSpec | None, DType | None]:
    chosen: DType | None = None
    if dtype is not None:
        if dtype not in DTYPE_BYTES:
            raise SpecError(f"must be one of {', '.join(DTYPE_BYTES)}, not {dtype!r}", where="--dtype")
        chosen = next(known for known in DTYPE_BYTES if known == dtype)
    return (load_model(reference, where="--model") if reference is not None else None), chosen


def _beside(table: Path, output: Path | None) -> str:
    """How the cluster file names the table: relative where both are in one folder."""
    if output is not None and table.absolute().parent == output.absolute().parent:
        return table.name
    return str(table.absolute())


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror}", where=str(path)) from error
