"""What ``hexgen bench`` does: loads the server, shows what was measured, and what was predicted beside it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from hexgen.bench.against import Comparison, Expected, check_server, compare
from hexgen.bench.causes import findings
from hexgen.bench.client import Client, ServerFacts, ServerState
from hexgen.bench.drive import OnDone
from hexgen.bench.http import target_of
from hexgen.bench.openai import AskOptions, OpenAIClient
from hexgen.bench.plot import write_plot
from hexgen.bench.record import Record
from hexgen.bench.run import Bench, BenchOptions, run_bench
from hexgen.cli._common import StopSignals, check_target, say
from hexgen.cli.bench_request import BenchRequest, Load, check, expected_of, load_of
from hexgen.cli.bench_tables import Shown, as_object, show
from hexgen.errors import SpecError
from hexgen.scheduler.picture import check_plot

__all__ = ["BenchRequest", "run"]

DEFAULT_URL = "http://127.0.0.1:8000"
EXIT_INTERRUPTED, EXIT_FAILED = 130, 1


def run(asked: BenchRequest) -> None:
    """Raises ``HexgenError`` where something is wrong; ``SystemExit`` with figures shown, 130 after Ctrl-C, and 1
    where requests failed and that was asked for.
    """
    check(asked)
    for target in (asked.output, asked.plot):
        if target is not None:
            check_target(target)
    if asked.plot is not None:
        check_plot(asked.plot)
    expected = expected_of(asked)
    load = load_of(asked, expected)
    with StopSignals() as signals:
        bench = asyncio.run(_measure(asked, load, expected, signals))
    comparison = None
    if expected is not None and bench.measures.completed:
        comparison = compare(expected, bench, load.fitting(bench.facts), asked.concurrency)
    _tell(asked, load, bench, comparison, expected)
    if bench.outcome.stopped:
        raise SystemExit(EXIT_INTERRUPTED)
    if asked.fail_on_errors and bench.measures.failed:
        raise SystemExit(EXIT_FAILED)


def _tell(
    asked: BenchRequest, load: Load, bench: Bench, comparison: Comparison | None, expected: Expected | None
) -> None:
    tabled = expected is not None and expected.cost_table is not None
    found = findings(comparison, bench, tabled=tabled) if comparison is not None else []
    shown = Shown(asked, load, bench, comparison, tuple(found))
    if asked.output is not None:
        try:
            text = json.dumps(as_object(shown, detailed=asked.detailed), allow_nan=False, indent=1)
            asked.output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise SpecError(f"cannot be written: {error.strerror}", where=str(asked.output)) from error
    if asked.plot is not None:
        title = f"{bench.facts.model}: {bench.measures.completed} requests, {bench.measures.tokens_s:.1f} tokens/s"
        write_plot(asked.plot, bench.outcome, bench.measures, title)
    if asked.as_json:
        typer.echo(json.dumps(as_object(shown, detailed=asked.detailed), allow_nan=False))
    else:
        show(shown)
        for target in (asked.output, asked.plot):
            if target is not None:
                say(f"wrote {target}")


async def _measure(asked: BenchRequest, load: Load, expected: Expected | None, signals: StopSignals) -> Bench:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals.on_stop = lambda: _later(loop, stop)
    client = _client(asked)
    if load.trace is not None and asked.concurrency is None:
        say(f"replaying {len(load.trace)} requests over {load.trace.arrival_s[-1]:.0f} s")

    def check_plan_served(_: ServerFacts, state: ServerState) -> None:
        if expected is not None:
            check_server(expected, state)

    options = BenchOptions(
        concurrency=asked.concurrency, warm_ups=asked.warm_ups, timeout_s=asked.timeout_s, slo=load.slo
    )
    try:
        with _progress(asked) as on_done:
            return await run_bench(client, load.asks, options, check=check_plan_served, stop=stop, on_done=on_done)
    finally:
        await client.close()


def _later(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    loop.call_soon_threadsafe(stop.set)


def _client(asked: BenchRequest) -> Client:
    options = AskOptions(asked.model, asked.chat, asked.ignore_eos, asked.api_key)
    if asked.grpc is not None:
        from hexgen.bench.grpc import GrpcClient  # late: grpc takes a while to import

        return GrpcClient(asked.grpc, options, asked.tls_ca)
    cafile = None if asked.tls_ca is None else str(asked.tls_ca)
    return OpenAIClient(target_of(asked.url or DEFAULT_URL, cafile), options)


@contextmanager
def _progress(asked: BenchRequest) -> Iterator[OnDone | None]:
    """Requests done and failed, on a terminal; nothing where standard error is a pipe or a file."""
    if asked.as_json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=None)
        failed = 0

        def on_done(record: Record) -> None:
            nonlocal failed
            failed += record.error is not None
            text = f"requests ({failed} failed)" if failed else "requests"
            progress.update(task, advance=1, description=text)

        yield on_done
