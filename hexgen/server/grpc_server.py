"""The gRPC interface (package hexgen.v1), with grpc.health.v1 and reflection beside it."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from hexgen.coordinator.coordinator import Coordinator
from hexgen.coordinator.stream import merge
from hexgen.errors import (
    DeploymentError,
    HexgenError,
    ModelNotFoundError,
    QueueFullError,
    RequestError,
    RequestTooLargeError,
    UnavailableError,
)
from hexgen.proto import inference_pb2 as pb
from hexgen.proto import inference_pb2_grpc
from hexgen.server.auth import authorized
from hexgen.server.grpc_messages import cluster_info, model_info, prompt_of, response_of, sampling_of

log = logging.getLogger("hexgen.server")

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_MAX_METADATA_BYTES = 64 * 1024
_MAX_CALLS = 4096
_CODES: tuple[tuple[type[HexgenError], grpc.StatusCode], ...] = (
    (ModelNotFoundError, grpc.StatusCode.NOT_FOUND),
    (RequestTooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (HexgenError, grpc.StatusCode.INTERNAL),
)


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """The protocol's calls over a coordinator; a cancelled Generate aborts its request."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        tokenizer = self._coordinator.tokenizer
        try:
            model = self._coordinator.model
            if request.model and not model.answers_to(request.model):
                raise ModelNotFoundError(
                    f"the model {request.model[:200]!r} is not served here",
                    where="model",
                    remedy=f"this server has {model.name!r}",
                )
            stream = await self._coordinator.submit(
                prompt_of(request), sampling_of(request), request.request_id or None
            )
        except HexgenError as error:
            await _refuse(context, error)
        first = True
        try:
            async for _, update in merge((stream,)):
                yield response_of(stream, update, tokenizer, first=first)
                first = False
        except HexgenError as error:
            await _refuse(context, error)
        finally:
            stream.abort()

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        return pb.AbortResponse(found=self._coordinator.abort(request.request_id))

    async def ModelInfo(  # noqa: N802
        self, request: pb.ModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInfoResponse:
        return model_info(self._coordinator)

    async def ClusterInfo(  # noqa: N802
        self, request: pb.ClusterInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ClusterInfoResponse:
        await self._coordinator.ranks.refresh()
        return cluster_info(self._coordinator)


async def _refuse(context: grpc.aio.ServicerContext, error: HexgenError) -> NoReturn:
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    metadata = ()
    if isinstance(error, QueueFullError):
        metadata = (("retry-after", str(math.ceil(error.retry_after_s))),)  # type: ignore[assignment]
    await context.abort(code, str(error), metadata)
    raise AssertionError("abort always raises")


class _KeyCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the API key; health checks need none."""

    def __init__(self, api_key: str) -> None:
        self._api_key = api_key

        async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the API key is missing or wrong")

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        given = next((v for k, v in details.invocation_metadata or () if k == "authorization"), None)
        if not details.method.startswith("/grpc.health.v1.") and not authorized(given, self._api_key):
            return self._refusal
        return await continuation(details)


class GrpcServer:
    """The server and its health service. ``port`` 0 takes any free one."""

    def __init__(
        self,
        coordinator: Coordinator,
        host: str,
        port: int,
        *,
        api_key: str | None = None,
        tls: tuple[bytes, bytes] | None = None,
    ) -> None:
        """``tls`` is the certificate chain and the private key, both PEM. ``DeploymentError`` on a busy port."""
        self._coordinator = coordinator
        self._server = grpc.aio.server(
            interceptors=(_KeyCheck(api_key),) if api_key is not None else (),
            maximum_concurrent_rpcs=_MAX_CALLS,
            options=(
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
                ("grpc.so_reuseport", 0),  # a busy port is an error, not a share of somebody else's calls
            ),
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(coordinator), self._server)
        self._health = health_aio.HealthServicer()
        self._serving: bool | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port: int = self._server.add_insecure_port(address)
            else:
                credentials = grpc.ssl_server_credentials([(tls[1], tls[0])])
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise DeploymentError(
                "cannot listen for gRPC: the port is in use or the address is not this machine's",
                where=address,
                remedy="choose another with --grpc-port (0 takes any free one)",
            ) from error

    async def start(self) -> None:
        await self.refresh_health()
        await self._server.start()

    async def refresh_health(self) -> None:
        """Tell watchers of the health service when the coordinator's own health has changed."""
        serving = self._coordinator.healthy
        if serving != self._serving:
            self._serving = serving
            status = (
                health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            )
            for name in ("", SERVICE):
                await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
