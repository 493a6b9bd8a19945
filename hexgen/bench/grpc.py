"""The client of our gRPC interface (package hexgen.v1)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc

from hexgen.bench.client import AnswerError, RankSeconds, ServerFacts, ServerState
from hexgen.bench.openai import AskOptions
from hexgen.bench.record import Record
from hexgen.errors import SpecError, UnavailableError
from hexgen.proto import inference_pb2 as pb
from hexgen.proto.inference_pb2_grpc import InferenceStub

_LOOK_S = 10.0
_MAX_MESSAGE_BYTES = 16 << 20
_COUNTS = ("steps", "preemptions", "cached_tokens", "prompt_tokens", "output_tokens")


class GrpcClient:
    """One channel: HTTP/2 carries all requests."""

    def __init__(self, address: str, options: AskOptions, ca: Path | None = None) -> None:
        """``ca``: certificates of whoever signed the server's, PEM; without it the channel is not encrypted."""
        limits = (
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.enable_http_proxy", 0),  # what is measured is the server
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1000),
        )
        if ca is None:
            self._channel = grpc.aio.insecure_channel(address, options=limits)
        else:
            self._channel = grpc.aio.secure_channel(
                address, grpc.ssl_channel_credentials(_read(ca)), options=limits
            )
        self._stub: Any = InferenceStub(self._channel)
        self._address = address
        self._options = options
        self._metadata = (("authorization", f"Bearer {options.api_key}"),) if options.api_key else ()

    @property
    def backend(self) -> str:
        return "hexgen-grpc"

    @property
    def where(self) -> str:
        return self._address

    async def look(self) -> ServerFacts:
        try:
            found = await self._stub.ModelInfo(pb.ModelInfoRequest(), metadata=self._metadata, timeout=_LOOK_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise SpecError(
                    "the server refuses us", where=self.where, remedy="give its key with --api-key"
                ) from error
            raise UnavailableError(
                f"no server answers: {_reason(error)}",
                where=self.where,
                remedy="start one with `hexgen serve`, or say where it is with --grpc",
            ) from error
        return ServerFacts(self._options.model or found.name, found.max_context, found.vocab_size, "hexgen")

    async def answer(self, record: Record) -> None:
        ask = record.ask
        request = pb.GenerateRequest(
            model=self._options.model or "",
            sampling=pb.Sampling(
                max_tokens=ask.output_tokens, temperature=0.0, ignore_eos=self._options.ignore_eos
            ),
        )
        if isinstance(ask.prompt, str):
            request.text = ask.prompt
        else:
            request.token_ids.ids.extend(ask.prompt.tolist())
        finished = False
        record.sent_s = time.perf_counter()
        try:
            async for response in self._stub.Generate(request, metadata=self._metadata):
                if any(delta.token_ids for delta in response.deltas):
                    record.times.append(time.perf_counter())
                if response.finished:
                    finished = True
                    record.prompt_tokens = response.usage.prompt_tokens
                    record.output_tokens = response.usage.output_tokens
                    record.server_queue_s = response.timing.queue_s
                    record.server_ttft_s = response.timing.ttft_s
        except grpc.aio.AioRpcError as error:
            begun = "the stream broke off: " if record.times else ""
            raise AnswerError(f"{begun}{error.code().name}: {_reason(error)}") from error
        if not finished:
            raise AnswerError("the stream broke off: it has no end")
        if not record.times:
            raise AnswerError("the answer has no token")

    async def state(self) -> ServerState:
        try:
            info = await self._stub.ClusterInfo(pb.ClusterInfoRequest(), metadata=self._metadata, timeout=_LOOK_S)
        except grpc.aio.AioRpcError:
            return ServerState()
        ranks = tuple(
            RankSeconds(
                stage.name, rank.rank, rank.steps, rank.compute_s, rank.wait_s, rank.transfer_s, rank.host_s
            )
            for stage in info.stages
            for rank in stage.ranks
        )
        totals = {f"{name}_total": float(sum(getattr(r, name) for r in info.routes)) for name in _COUNTS}
        layers = {stage.name: (stage.first_layer, stage.end_layer) for stage in info.stages}
        return ServerState(ranks, totals, layers)

    async def close(self) -> None:
        await self._channel.close()


def _reason(error: grpc.aio.AioRpcError) -> str:
    details = str(error.details() or error.code().name)
    return "connection refused" if "Connection refused" in details else details


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=str(path)) from error
