"""``hexgen serve``: start a plan on Ray and answer over HTTP and gRPC until told to stop."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hexgen.cli._common import (
    ModelOption,
    PlanArgument,
    RayOption,
    StopSignals,
    say,
    say_remarks,
    shown_progress,
)
from hexgen.errors import DeploymentError, SpecError

if TYPE_CHECKING:
    from hexgen.deploy.ray_deployment import RayDeployment
    from hexgen.deploy.ray_launch import Launchable
    from hexgen.server.serve import ServeOptions

DEFAULT_PORT = 8000
DEFAULT_GRPC_PORT = 50051
WATCH_INTERVAL_S = 0.5
API_KEY_VARIABLE = "HEXGEN_API_KEY"


def serve_command(
    plan: PlanArgument = None,
    model: ModelOption = None,
    ray_address: RayOption = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0: all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="HTTP port; 0: any free one.")
    ] = DEFAULT_PORT,
    grpc_port: Annotated[
        int, typer.Option("--grpc-port", min=0, max=65535, help="gRPC port; 0: any free one.")
    ] = DEFAULT_GRPC_PORT,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar=API_KEY_VARIABLE,
            show_envvar=True,
            help="The bearer token that clients must send (default: none).",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", help="Certificate chain, PEM: HTTPS and gRPC over TLS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its private key, PEM.")] = None,
) -> None:
    """Serve a plan over HTTP (OpenAI's interface) and gRPC until Ctrl-C or SIGTERM."""
    _check_tls(tls_cert, tls_key)
    if api_key == "":
        raise SpecError("is empty", where="--api-key", remedy="leave it out to serve everybody who can connect")
    if port == grpc_port != 0:
        raise SpecError(f"HTTP and gRPC cannot share port {port}", where="--grpc-port", remedy="choose another")
    # Before anything starts: a busy port is known at once, not after a model was loaded.
    _check_free(host, port, "--port")
    _check_free(host, grpc_port, "--grpc-port")
    from hexgen.server.serve import ServeOptions

    options = ServeOptions(
        host=host, port=port, grpc_port=grpc_port, api_key=api_key, tls_cert=tls_cert, tls_key=tls_key
    )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)  # to stderr
    run(plan, model, ray_address, options)


def run(plan: str | None, model: str | None, ray_address: str | None, options: ServeOptions) -> None:
    """Serve until a signal comes (returns) or the engine fails (raises why)."""
    from hexgen.deploy.ray_launch import deploy, prepare

    with StopSignals() as signals:
        ready = prepare(plan, model, ray_address=ray_address)
        say(f"starting {ready.plan.model}: {len(ready.plan.stages)} stages, {len(ready.plan.routes)} routes")
        for remark in ready.remarks:
            say(f"note: {remark}")
        with shown_progress() as show:
            deployment = deploy(ready, ray_address=ray_address, on_progress=show)
        with deployment:
            try:
                say_remarks(deployment)
                asyncio.run(_serve(deployment, ready, options, signals))
            finally:
                signals.shield()


async def _serve(
    deployment: RayDeployment, ready: Launchable, options: ServeOptions, signals: StopSignals
) -> None:
    from hexgen.coordinator.coordinator import Coordinator, ServedModel
    from hexgen.coordinator.tokenizer import load_tokenizer
    from hexgen.server.serve import serve

    coordinator = Coordinator(
        deployment.endpoints(),
        deployment.secret,
        ServedModel(
            ready.plan.model,
            ready.model.vocab_size,
            ready.model.eos_token_ids,
            aliases=(str(ready.model_path), ready.model_path.name),
        ),
        load_tokenizer(ready.model_path),
        plan=ready.plan,
        reports=deployment.reports,
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def set_stop() -> None:
        loop.call_soon_threadsafe(stop.set)

    signals.on_stop = set_stop
    watcher = asyncio.create_task(_stop_on_failure(deployment, stop))
    try:
        await coordinator.start()
        await serve(coordinator, options, stop, _say_ready)
    finally:
        watcher.cancel()
        await coordinator.close()
    failure = deployment.failure()
    if failure is not None:
        raise failure


async def _stop_on_failure(deployment: RayDeployment, stop: asyncio.Event) -> None:
    while deployment.failure() is None:
        await asyncio.sleep(WATCH_INTERVAL_S)
    stop.set()


def _say_ready(http: str, grpc: str) -> None:
    print(f"ready http={http} grpc={grpc}", flush=True)


def _check_tls(cert: Path | None, key: Path | None) -> None:
    if (cert is None) != (key is None):
        raise SpecError("TLS needs both a certificate and a key", remedy="give --tls-cert and --tls-key")
    for option, path in (("--tls-cert", cert), ("--tls-key", key)):
        if path is not None and not path.is_file():
            raise SpecError(f"there is no file {path}", where=option)


def _check_free(host: str, port: int, option: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise SpecError(f"{host} is no address of this machine: {error.strerror}", where="--host") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise DeploymentError(
                f"cannot listen on {host}, port {port}: {error.strerror}",
                where=option,
                remedy=f"choose another with {option} (0 takes any free one), or end what uses it",
            ) from error
