"""The ``hexgen`` command: a deliberate error is one line on stderr and an exit status. Heavy imports come late."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from hexgen.cli.bench import bench_command
from hexgen.cli.discover import discover_command
from hexgen.cli.generate import InOrderCommand, generate_command
from hexgen.cli.lab import lab_command
from hexgen.cli.plan import plan_command
from hexgen.cli.serve import serve_command
from hexgen.cli.simulate import simulate_command
from hexgen.deploy.facts import debugging, installed_version
from hexgen.errors import HexgenError, InfeasibleError, RequestError, SpecError

EXIT_ENGINE = 1
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="hexgen",
    help="Serve one large model over GPUs that do not match.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan_command)
app.command("serve")(serve_command)
app.command("generate", cls=InOrderCommand)(generate_command)
app.command("discover")(discover_command)
app.command("lab")(lab_command)
app.command("simulate")(simulate_command)
app.command("bench")(bench_command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hexgen {installed_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve one large model over GPUs that do not match."""


def exit_status(error: HexgenError) -> int:
    """2 where the input is to be corrected, 1 where the engine or the deployment failed."""
    return EXIT_INPUT if isinstance(error, SpecError | InfeasibleError | RequestError) else EXIT_ENGINE


def main(arguments: list[str] | None = None, started_s: float | None = None) -> None:
    """Entry point of the command; never returns normally (``SystemExit`` carries the status).

    ``started_s``: of `time.monotonic`, when the program began; now, where it is not known.
    """
    try:
        app(args=arguments, obj=time.monotonic() if started_s is None else started_s)
    except HexgenError as error:
        if debugging():
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(exit_status(error)) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


def one_line(text: str) -> str:
    """Without what moves a terminal's cursor or colours it: some of it is others' words."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
