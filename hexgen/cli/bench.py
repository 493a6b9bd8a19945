"""``hexgen bench``: the options of the command. What it then does is in `hexgen.cli.bench_run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hexgen.cli._common import CostOption, JsonOption, WorkloadOption
from hexgen.cli._load import BurstinessOption, ConcurrencyOption, TraceOption


def bench_command(
    url: Annotated[
        str | None,
        typer.Option("--url", help="Any server of OpenAI's interface (default: http://127.0.0.1:8000)."),
    ] = None,
    grpc: Annotated[str | None, typer.Option("--grpc", help="HOST:PORT of a hexgen server's gRPC.")] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", help="How many (default: 100; of a trace, all).")
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Requests per second, or max (all at once); open loop.")
    ] = None,
    burstiness: BurstinessOption = 1.0,
    concurrency: ConcurrencyOption = None,
    workload: WorkloadOption = None,
    trace: TraceOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A prompt a line, or .jsonl with prompt and output_tokens."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of arrivals, lengths and prompts.")] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option("--goodput", help="A limit in ms: ttft:2000, tpot:100 or e2el:10000. May be repeated."),
    ] = None,
    warm_ups: Annotated[
        int, typer.Option("--num-warmups", min=0, max=1000, help="Requests before those that count.")
    ] = 1,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model's name (default: the server's first).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask for chats; needs --prompts of texts.")] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Answers as long as asked for.")
    ] = True,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size", min=1, max=2**31 - 1, help="Draw token ids below it (default: the server's)."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that one request may take.")] = 600.0,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="HEXGEN_API_KEY", show_envvar=True, help="What the server asks for."),
    ] = None,
    tls_ca: Annotated[
        Path | None, typer.Option("--tls-ca", help="Certificates to trust, PEM; gRPC is encrypted with it.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="PLAN", help="Predicted beside measured, and why.")
    ] = None,
    cost: CostOption = None,
    as_json: JsonOption = False,
    detailed: Annotated[
        bool, typer.Option("--detailed", help="Each request's own figures in the JSON as well.")
    ] = False,
    fail_on_errors: Annotated[
        bool,
        typer.Option("--fail-on-errors", help="Exit status 1 where any request failed (default: only if all)."),
    ] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the JSON here as well.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="A picture of the run: .png or .svg.")] = None,
) -> None:
    """Measure a running server: latencies, throughput, goodput, by the names of `vllm bench serve`."""
    # Late: `hexgen --help` should not pay for the planner.
    from hexgen.cli.bench_run import BenchRequest, run

    run(
        BenchRequest(
            url=url,
            grpc=grpc,
            requests=requests,
            rate=rate,
            burstiness=burstiness,
            concurrency=concurrency,
            workload=workload,
            trace=trace,
            prompts=prompts,
            seed=seed,
            goodput=tuple(goodput or ()),
            warm_ups=warm_ups,
            model=model,
            chat=chat,
            ignore_eos=ignore_eos,
            vocab_size=vocab_size,
            timeout_s=timeout,
            api_key=api_key,
            tls_ca=tls_ca,
            against=against,
            cost=cost,
            as_json=as_json,
            detailed=detailed,
            fail_on_errors=fail_on_errors,
            output=output,
            plot=plot,
        )
    )
