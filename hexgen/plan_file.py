"""Plan files: parsed strictly, written so that parsing gives the same plan back.

Parsing checks the file's own shape (keys, types, ranges). Whether the plan fits its cluster and its model is
``hexgen.validate``'s question.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hexgen import yamlfile
from hexgen.cluster import Cluster, cluster_to_dict, load_cluster, parse_cluster
from hexgen.errors import SpecError
from hexgen.model_spec import DTYPE_BYTES, DType
from hexgen.plan_spec import (
    DevicePrediction,
    EngineOptions,
    Hop,
    Layers,
    Plan,
    Prediction,
    Route,
    Stage,
    StagePrediction,
)
from hexgen.yamlfile import Inline, Place, Section

VERSION = 1
MAX_LAYERS = 10_000
MAX_STAGES = 65_536
MAX_TOKENS = 1 << 40  # of KV cache
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}/(?:0|[1-9][0-9]{0,5})")
_FIGURE = yamlfile.number(allow_equal=True)
_COUNT = yamlfile.integer(0)


def load_plan(path: str | Path) -> Plan:
    """The plan in a YAML file. ``plan.cluster`` stays as written there: see ``resolve_cluster``."""
    return parse_plan(yamlfile.read_yaml(path), str(path), Path(path).parent)


def dump_plan(plan: Plan, path: str | Path, comment: str = "") -> None:
    Path(path).write_text(yamlfile.write_yaml(plan_to_dict(plan), comment), encoding="utf-8")


def resolve_cluster(plan: Plan, base_dir: str | Path | None = None) -> Cluster:
    """The cluster of a plan: its own, or the file it names, beside the plan (``base_dir``) or where we are."""
    if isinstance(plan.cluster, Cluster):
        return plan.cluster
    path = Path(plan.cluster).expanduser()
    if base_dir is not None and (Path(base_dir) / path).is_file():
        path = Path(base_dir) / path
    return load_cluster(path)


def parse_plan(value: Mapping[str, Any], where: str | Place = "plan", base_dir: str | Path | None = None) -> Plan:
    place = where if isinstance(where, Place) else Place(where)
    section = Section(value, place, ("version", "model", "cluster", "stages", "routes", "engine", "predicted"))
    version = section.get("version", yamlfile.integer(0), VERSION)
    if version != VERSION:
        raise SpecError(
            f"version {version} is not known here",
            where=str(place.key("version")),
            remedy=f"this hexgen reads version {VERSION}",
        )
    stages = section.require("stages", _stages)
    by_name = {stage.name: stage for stage in stages}
    return Plan(
        model=section.require("model", yamlfile.text),
        cluster=section.require("cluster", lambda v, p: _cluster(v, p, base_dir)),
        stages=stages,
        routes=section.require(
            "routes", yamlfile.list_of(lambda v, p: _route(v, p, by_name), MAX_STAGES, least=1)
        ),
        engine=section.get("engine", _engine, EngineOptions()),
        predicted=section.optional("predicted", _predicted),
        version=version,
    )


def _cluster(value: object, place: Place, base_dir: str | Path | None) -> Cluster | str:
    if isinstance(value, dict):
        return parse_cluster(value, place, base_dir)
    if not isinstance(value, str):
        yamlfile.wrong(value, place, "the path of a cluster file, or a cluster")
    return yamlfile.text(value, place)


def _stages(value: object, place: Place) -> tuple[Stage, ...]:
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_STAGES:
        yamlfile.wrong(value, place, "a mapping of stages by name")
    return tuple(_stage(yamlfile.name(key, place), entry, place.key(key)) for key, entry in value.items())


def _stage(name: str, value: object, place: Place) -> Stage:
    section = Section(value, place, ("layers", "devices", "shares"))
    devices = section.require("devices", yamlfile.list_of(_device_id, MAX_STAGES, least=1))
    shares = section.optional("shares", yamlfile.list_of(yamlfile.number(), MAX_STAGES, least=1))
    if shares is not None and len(shares) != len(devices):
        raise SpecError(
            f"{len(shares)} shares for {len(devices)} devices",
            where=str(place.key("shares")),
            remedy="give one positive number a device",
        )
    return Stage(name, section.require("layers", _layers), devices, shares)


def _device_id(value: object, place: Place) -> str:
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        yamlfile.wrong(value, place, "a device, like node/0")
    return value


def _layers(value: object, place: Place) -> Layers:
    first, end = yamlfile.list_of(yamlfile.integer(0, MAX_LAYERS), 2, least=2)(value, place)
    if first >= end:
        raise SpecError(
            f"[{first}, {end}] holds no layer",
            where=str(place),
            remedy="layers are half-open: [0, 4] is 0 to 3",
        )
    return first, end


def _route(value: object, place: Place, stages: Mapping[str, Stage]) -> Route:
    section = Section(value, place, ("weight", "path", "kv_tokens"))
    return Route(
        path=section.require("path", yamlfile.list_of(lambda v, p: _hop(v, p, stages), MAX_STAGES, least=1)),
        weight=section.get("weight", yamlfile.number(), 1.0),
        kv_tokens=section.optional("kv_tokens", yamlfile.integer(1, MAX_TOKENS)),
    )


def _hop(value: object, place: Place, stages: Mapping[str, Stage]) -> Hop:
    layers: Layers | None = None
    if isinstance(value, dict):
        section = Section(value, place, ("stage", "layers"))
        name, at = section.require("stage", yamlfile.name), place.key("stage")
        layers = section.optional("layers", _layers)
    else:
        name, at = yamlfile.name(value, place), place
    if name not in stages:
        close = difflib.get_close_matches(name, list(stages), n=1)
        raise SpecError(
            f"there is no stage {name!r}",
            where=str(at),
            remedy=f"did you mean {close[0]!r}?" if close else f"stages: {', '.join(list(stages)[:10])}",
        )
    return Hop(name, layers or stages[name].layers)


def _engine(value: object, place: Place) -> EngineOptions:
    section = Section(value, place, [field.name for field in dataclasses.fields(EngineOptions)])
    default = EngineOptions()
    return EngineOptions(
        dtype=section.optional("dtype", _dtype),
        page_size=section.get("page_size", yamlfile.integer(1, 4096), default.page_size),
        token_budget=section.get("token_budget", yamlfile.integer(1, 1 << 20), default.token_budget),
        max_sequences=section.get("max_sequences", yamlfile.integer(1, 1 << 16), default.max_sequences),
        max_context=section.optional("max_context", yamlfile.integer(1, 1 << 24)),
        prefix_cache=section.get("prefix_cache", yamlfile.flag, default.prefix_cache),
    )


def _dtype(value: object, place: Place) -> DType:
    for dtype in DTYPE_BYTES:
        if value == dtype:
            return dtype
    yamlfile.wrong(value, place, f"one of {', '.join(DTYPE_BYTES)}")


def _predicted(value: object, place: Place) -> Prediction:
    section = Section(value, place, [field.name for field in dataclasses.fields(Prediction)])
    return Prediction(
        objective=section.require("objective", yamlfile.text),
        tokens_s=section.require("tokens_s", _FIGURE),
        requests_s=section.require("requests_s", _FIGURE),
        ttft_s=section.require("ttft_s", _FIGURE),
        tpot_s=section.require("tpot_s", _FIGURE),
        latency_s=section.require("latency_s", _FIGURE),
        single_tokens_s=section.require("single_tokens_s", _FIGURE),
        bottleneck=section.require("bottleneck", yamlfile.text),
        upper_bound_tokens_s=section.optional("upper_bound_tokens_s", _FIGURE),
        price_usd_h=section.optional("price_usd_h", _FIGURE),
        max_flow_tokens_s=section.optional("max_flow_tokens_s", _FIGURE),
        max_flow_bound_tokens_s=section.optional("max_flow_bound_tokens_s", _FIGURE),
        slo_requests_s=section.optional("slo_requests_s", _FIGURE),
        slo_attainment=section.optional("slo_attainment", _FIGURE),
        source=section.optional("source", yamlfile.text),
        devices=section.get("devices", yamlfile.list_of(_device_prediction, MAX_STAGES), ()),
        stages=section.get("stages", yamlfile.list_of(_stage_prediction, MAX_STAGES), ()),
    )


def _device_prediction(value: object, place: Place) -> DevicePrediction:
    section = Section(value, place, [field.name for field in dataclasses.fields(DevicePrediction)])
    return DevicePrediction(
        device=section.require("device", _device_id),
        weights_bytes=section.require("weights_bytes", _COUNT),
        kv_bytes=section.require("kv_bytes", _COUNT),
        buffers_bytes=section.require("buffers_bytes", _COUNT),
        memory_bytes=section.require("memory_bytes", _COUNT),
    )


def _stage_prediction(value: object, place: Place) -> StagePrediction:
    section = Section(value, place, [field.name for field in dataclasses.fields(StagePrediction)])
    return StagePrediction(
        stage=section.require("stage", yamlfile.name),
        prefill_step_s=section.require("prefill_step_s", _FIGURE),
        decode_step_s=section.require("decode_step_s", _FIGURE),
        utilisation=section.require("utilisation", _FIGURE),
        prefill_utilisation=section.optional("prefill_utilisation", _FIGURE),
        decode_utilisation=section.optional("decode_utilisation", _FIGURE),
    )


# ---- writing -------------------------------------------------------------------------------------------------


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Plain values, as a plan file has them; ``parse_plan`` of it gives an equal plan."""
    out: dict[str, Any] = {
        "version": plan.version,
        "model": plan.model,
        "cluster": cluster_to_dict(plan.cluster) if isinstance(plan.cluster, Cluster) else plan.cluster,
        "stages": {stage.name: _stage_to_dict(stage) for stage in plan.stages},
        "routes": [_route_to_dict(route, plan) for route in plan.routes],
    }
    engine = {
        field.name: getattr(plan.engine, field.name)
        for field in dataclasses.fields(EngineOptions)
        if getattr(plan.engine, field.name) != field.default
    }
    if engine:
        out["engine"] = engine
    if plan.predicted is not None:
        out["predicted"] = _predicted_to_dict(plan.predicted)
    return out


def _stage_to_dict(stage: Stage) -> Inline:
    out = Inline(layers=list(stage.layers), devices=list(stage.devices))
    if stage.shares is not None:
        out["shares"] = [yamlfile.plain(share) for share in stage.shares]
    return out


def _route_to_dict(route: Route, plan: Plan) -> Inline:
    whole = {stage.name: stage.layers for stage in plan.stages}
    path = [
        hop.stage if hop.layers == whole.get(hop.stage) else Inline(stage=hop.stage, layers=list(hop.layers))
        for hop in route.path
    ]
    out = Inline(weight=yamlfile.plain(route.weight), path=path)
    return out if route.kv_tokens is None else Inline(out, kv_tokens=route.kv_tokens)


def _predicted_to_dict(predicted: Prediction) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in dataclasses.fields(Prediction):
        value = getattr(predicted, field.name)
        if isinstance(value, tuple):
            if value:
                out[field.name] = [
                    Inline({k: v for k, v in dataclasses.asdict(entry).items() if v is not None})
                    for entry in value
                ]
        elif value is not None:
            out[field.name] = value
    return out
