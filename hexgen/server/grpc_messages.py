"""Between the protocol's messages and the coordinator's data."""

from __future__ import annotations

from typing import Any

from hexgen.coordinator.coordinator import Coordinator
from hexgen.coordinator.stream import Delta, RequestStream, RequestUpdate
from hexgen.coordinator.tokenizer import Tokenizer
from hexgen.errors import RequestError
from hexgen.proto import inference_pb2 as pb
from hexgen.request import SamplingParams
from hexgen.routing import RouteState
from hexgen.worker.report import RankReport

_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}
_SCALARS = (
    "max_tokens", "min_tokens", "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "seed", "ignore_eos",
)  # fmt: skip


def prompt_of(request: pb.GenerateRequest) -> str | tuple[int, ...]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise RequestError("is missing", where="prompt", remedy="set text or token_ids")
    return request.text if kind == "text" else tuple(request.token_ids.ids)


def sampling_of(request: pb.GenerateRequest) -> SamplingParams:
    """The engine's parameters; fields left out keep the defaults that the protocol names."""
    message = request.sampling
    values: dict[str, Any] = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    if request.HasField("return_logprobs"):
        values["logprobs"] = request.return_logprobs
    sampling = SamplingParams(
        **values,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
    )
    sampling.validate()
    return sampling


def response_of(
    stream: RequestStream, update: RequestUpdate, tokenizer: Tokenizer | None, *, first: bool
) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        request_id=stream.request_id,
        deltas=[_delta(delta, tokenizer) for delta in update.deltas],
        finished=update.finished,
    )
    if first:
        response.prompt_token_ids.extend(stream.prompt_token_ids)
    if update.finished:
        timing = stream.timing
        response.usage.prompt_tokens = len(stream.prompt_token_ids)
        response.usage.output_tokens = stream.output_tokens
        response.timing.queue_s = timing.admitted_s - timing.arrived_s
        response.timing.ttft_s = timing.ttft_s
        response.timing.total_s = timing.finished_s - timing.arrived_s
    return response


def _delta(delta: Delta, tokenizer: Tokenizer | None) -> pb.Delta:
    message = pb.Delta(index=delta.index, text=delta.text, token_ids=delta.token_ids)
    for entry in delta.logprobs:
        top = [
            pb.Alternative(
                token_id=token, logprob=logprob, text=tokenizer.token_text(token) if tokenizer is not None else ""
            )
            for token, logprob in entry.top
        ]
        message.logprobs.append(pb.TokenLogprobs(logprob=entry.chosen, top=top))
    if delta.finish_reason is not None:
        message.finish_reason = _REASONS.get(delta.finish_reason, pb.FINISH_REASON_ABORT)
    if isinstance(delta.stop_reason, str):
        message.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        message.stop_token_id = delta.stop_reason
    return message


def model_info(coordinator: Coordinator) -> pb.ModelInfoResponse:
    tokenizer = coordinator.tokenizer
    return pb.ModelInfoResponse(
        name=coordinator.model.name,
        vocab_size=coordinator.model.vocab_size,
        max_context=coordinator.max_context,
        eos_token_ids=coordinator.model.eos_token_ids,
        has_tokenizer=tokenizer is not None,
        has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
        aliases=coordinator.model.aliases,
    )


def cluster_info(coordinator: Coordinator) -> pb.ClusterInfoResponse:
    plan = coordinator.plan
    response = pb.ClusterInfoResponse(
        model=coordinator.model.name,
        waiting_requests=coordinator.waiting,
        running_requests=coordinator.running,
        routes=[_route(coordinator, state) for state in coordinator.route_states],
    )
    for stage in plan.stages if plan is not None else ():
        response.stages.append(
            pb.Stage(
                name=stage.name,
                first_layer=stage.layers[0],
                end_layer=stage.layers[1],
                devices=stage.devices,
                shares=stage.shares or (),
                ranks=[_rank(report) for report in coordinator.rank_reports if report.stage == stage.name],
            )
        )
    return response


def _rank(report: RankReport) -> pb.Rank:
    seconds = {f"{kind}_s": value for kind, value in report.seconds.items()}
    return pb.Rank(rank=report.rank, device=report.device, steps=report.steps, **seconds)


def _route(coordinator: Coordinator, state: RouteState) -> pb.RouteStatus:
    plan, stats = coordinator.plan, coordinator.route_stats(state.route)
    message = pb.RouteStatus(
        route=state.route,
        weight=state.weight,
        up=state.up,
        max_context=state.max_context,
        page_size=state.page_size,
        total_pages=state.total_pages,
        free_pages=state.free_pages,
    )
    if plan is not None and state.route < len(plan.routes):
        for hop in plan.routes[state.route].path:
            message.path.append(pb.Hop(stage=hop.stage, first_layer=hop.layers[0], end_layer=hop.layers[1]))
    if stats is not None:
        for name in (
            "free_pages", "running", "waiting", "steps", "preemptions", "cached_tokens", "prompt_tokens",
            "output_tokens", "step_s", "host_s",
        ):  # fmt: skip
            setattr(message, name, getattr(stats, name))
    return message
