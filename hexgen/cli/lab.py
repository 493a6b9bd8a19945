"""``hexgen lab``: run a command in an unlike cluster that is made on this machine, and removed afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hexgen.cli._common import say
from hexgen.errors import SpecError


def lab_command(
    cluster: Annotated[Path | None, typer.Argument(help="The cluster file.", metavar="CLUSTER.yaml")] = None,
    command: Annotated[
        list[str] | None, typer.Argument(help="What to run there, after `--`.", metavar="-- COMMAND...")
    ] = None,
    scale: Annotated[
        float,
        typer.Option(
            "--scale",
            min=0.001,
            help="Multiply every node's speed by this, where there are too few cores for all.",
        ),
    ] = 1.0,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Whether to start Ray on the nodes.")] = True,
    clean: Annotated[
        bool, typer.Option("--clean", help="Remove what killed labs left behind, and do nothing else.")
    ] = False,
) -> None:
    """Run COMMAND in CLUSTER, built on this machine: namespaces, shaped links, CPU quotas, Ray."""
    from hexgen.lab.groups import find_groups
    from hexgen.lab.teardown import clean_dead
    from hexgen.lab.tools import check_machine

    if clean and (cluster is not None or command):
        raise SpecError("stands alone", where="--clean")
    if not clean and cluster is None:
        raise SpecError("there is no cluster file", remedy="hexgen lab CLUSTER.yaml -- COMMAND...")
    if not clean and not command:
        raise SpecError("there is no command", remedy="hexgen lab CLUSTER.yaml -- COMMAND...")
    described = None
    if cluster is not None:
        from hexgen.cluster import load_cluster

        described = load_cluster(cluster)
    if command:
        from hexgen.lab.command import check_found

        check_found(command[0])
    check_machine()
    groups = find_groups()
    found = clean_dead(groups)
    for name, removed in found:
        say(f"removed what a killed lab had left ({name.text}): {removed}")
    if described is None or not command:
        if not found:
            say("nothing to remove")
        return
    from hexgen.lab.command import Signals
    from hexgen.lab.laboratory import Laboratory

    with Signals() as signals:
        laboratory = Laboratory(described, groups, scale=scale, with_ray=ray, where=str(cluster), say=say)
        try:
            for remark in laboratory.remarks:
                say(f"note: {remark}")
            names = ", ".join(node.name for node in described.nodes)
            say(f"{laboratory.name.text} is up: {names}; the command runs on {laboratory.head}")
            status = laboratory.run(command, signals)
        finally:
            signals.shielded = True
            laboratory.close()
    raise typer.Exit(status)
