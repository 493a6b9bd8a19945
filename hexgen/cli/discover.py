"""``hexgen discover``: what is there and how fast, as a cluster file, and a model's times as a cost table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hexgen.cli._common import RayOption

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
        str | None,
        typer.Option(
            "--dtype",
            help="Number format that --model is timed in, like float16 (default: as a plan would choose).",
        ),
    ] = None,
    cpu_threads: Annotated[
        int | None,
        typer.Option(
            "--cpu-threads", min=1, help="Threads of one CPU device (default: a node's cores are one device)."
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure", help="--no-measure: only ask what is there, and take the catalogue's speeds."
        ),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Write a cluster file for a Ray cluster's nodes, or for this machine; measured."""
    from hexgen.cli.discover_run import DiscoverRequest, run

    run(DiscoverRequest(ray_address, output, model, table, dtype, cpu_threads, measure, quiet))
