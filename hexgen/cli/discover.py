"""``hexgen discover``: what is there and how fast, as a cluster file, and a model's times as a cost table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hexgen.cli._common import RayOption, say

if TYPE_CHECKING:
    from hexgen.model import DType, ModelSpec

HEAD = (
    "Written by `hexgen discover`; every figure says how it was come by. Correct what you know better:\n"
    "names, prices, regions, memory."
)
QUICK_HEAD = (
    "Written by `hexgen discover --no-measure`: names, counts and memory as the nodes report them, speeds from\n"
    "the catalogue. Links between nodes are not measured: give them under `links:` before planning."
)
TABLE_NAME = "measured.yaml"


def discover_command(
    ray_address: RayOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the cluster file here (default: standard output).")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Also time this model's layers on each device type, for `plan --cost`."
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", help=f"Where --model's times go (default: {TABLE_NAME} beside the cluster file)."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="That the model is timed in (default: as a plan would choose).")
    ] = None,
    cpu_threads: Annotated[
        int | None, typer.Option("--cpu-threads", min=1, help="Of each CPU device (default: one device a node).")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Without: ask what is there, and take catalogue speeds.")
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Write a cluster file for a Ray cluster's nodes, or for this machine; measured."""
    import logging
    import time

    from hexgen.cli.discover_progress import discover_shown
    from hexgen.discover.describe import cluster_text, described
    from hexgen.discover.survey import survey, surveyed
    from hexgen.errors import SpecError

    started = time.monotonic()
    table_path = table or (output.parent if output else Path()) / TABLE_NAME
    for target in (output, table_path if model is not None else None):
        _check_target(target)
    if model is None and (table is not None or dtype is not None):
        raise SpecError("times are measured with --model only", where="--table" if table else "--dtype")
    if model is not None and not measure:
        raise SpecError("--model measures, and --no-measure says not to", where="--no-measure")
    logging.getLogger("ray").setLevel(logging.ERROR)
    shape, chosen = _model(model, dtype)
    head = HEAD if measure else QUICK_HEAD
    with discover_shown(quiet) as progress, surveyed(ray_address, progress) as surveyor:
        found = survey(surveyor, measure=measure, threads=cpu_threads)
        name = "ray" if surveyor.on_ray else "this-machine"
        made = described(name, found, cpu_threads)
        if output is not None:  # before the long part: an interrupted calibration leaves what there is
            _write(output, cluster_text(made, head))
        times = None
        if shape is not None:
            from hexgen.discover.models import time_model

            times = time_model(surveyor, found, made.cluster, shape, chosen, str(model))
            _write(table_path, times.text)
            made = described(name, found, cpu_threads, _beside(table_path, output))
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
    from hexgen.errors import SpecError
    from hexgen.model import DTYPE_BYTES, load_model

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


def _check_target(path: Path | None) -> None:
    """Before minutes of measuring: the folder must be there."""
    from hexgen.errors import SpecError

    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise SpecError("cannot be written: no such folder, or a folder itself", where=str(path))


def _write(path: Path, text: str) -> None:
    from hexgen.errors import SpecError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror}", where=str(path)) from error
