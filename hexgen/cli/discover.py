"""``hexgen discover``: what is there, as a cluster file to plan with and to correct by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hexgen.cli._common import RayOption, say

COMMENT = (
    "Written by `hexgen discover`: names, counts and memory as the nodes report them, speeds from the catalogue.\n"
    "Links between nodes are not measured: give their bandwidth and latency under `links:` before planning."
)


def discover_command(
    ray_address: RayOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the cluster file here (default: standard output).")
    ] = None,
) -> None:
    """Write a cluster file for a Ray cluster's nodes, or for this machine."""
    from hexgen.cluster import cluster_to_dict
    from hexgen.deploy.discover import discover
    from hexgen.yamlfile import write_yaml

    found = discover(ray_address)
    for remark in found.remarks:
        say(f"note: {remark}")
    text = write_yaml(cluster_to_dict(found.cluster), COMMENT)
    if output is None:
        typer.echo(text, nl=False)
        return
    _write(output, text)
    devices = sum(node.count for node in found.cluster.nodes)
    say(f"{output}: {len(found.cluster.nodes)} nodes, {devices} devices")


def _write(path: Path, text: str) -> None:
    from hexgen.errors import SpecError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror}", where=str(path)) from error
