"""Plan files: the published format, exact round trips, errors with their place."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabulary_strategies import clusters, names, texts

from hexgen.cluster import cluster_to_dict, dump_cluster, parse_cluster
from hexgen.errors import SpecError
from hexgen.model import load_model
from hexgen.plan import (
    DevicePrediction,
    EngineOptions,
    Hop,
    Plan,
    Prediction,
    Route,
    Stage,
    StagePrediction,
    dump_plan,
    load_plan,
    parse_plan,
    plan_to_dict,
    resolve_cluster,
)
from hexgen.validate import check_plan
from hexgen.yamlfile import parse_yaml, write_yaml

figures = st.just(0.0) | st.floats(1e-12, 1e15)
counts = st.integers(0, 10**15)
device_ids = st.builds("{}/{}".format, names, st.integers(0, 99))
layers = st.tuples(st.integers(0, 50), st.integers(51, 100))
shares = st.floats(1e-6, 1e6)


@st.composite
def stages(draw: st.DrawFn, name: str) -> Stage:
    devices = tuple(draw(st.lists(device_ids, min_size=1, max_size=4)))
    own = draw(st.none() | st.lists(shares, min_size=len(devices), max_size=len(devices)).map(tuple))
    return Stage(name, draw(layers), devices, own)


predictions = st.builds(
    Prediction,
    objective=texts,
    tokens_s=figures,
    requests_s=figures,
    ttft_s=figures,
    tpot_s=figures,
    latency_s=figures,
    single_tokens_s=figures,
    bottleneck=texts,
    upper_bound_tokens_s=st.none() | figures,
    price_usd_h=st.none() | figures,
    devices=st.lists(st.builds(DevicePrediction, device_ids, counts, counts, counts, counts), max_size=2).map(
        tuple
    ),
    stages=st.lists(st.builds(StagePrediction, names, figures, figures, figures), max_size=2).map(tuple),
)
engines = st.builds(
    EngineOptions,
    dtype=st.sampled_from([None, "float32", "bfloat16", "float16"]),
    page_size=st.integers(1, 4096),
    token_budget=st.integers(1, 10**6),
    max_sequences=st.integers(1, 65_536),
    max_context=st.none() | st.integers(1, 10**6),
    prefix_cache=st.booleans(),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    every = tuple(draw(stages(name)) for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)))
    hops = st.sampled_from(every).flatmap(
        lambda stage: st.builds(Hop, st.just(stage.name), st.just(stage.layers) | layers)
    )
    routes = st.builds(
        Route,
        path=st.lists(hops, min_size=1, max_size=3).map(tuple),
        weight=st.floats(1e-6, 1e6),
        kv_tokens=st.none() | st.integers(1, 10**9),
    )
    return Plan(
        model=draw(texts),
        cluster=draw(texts | clusters()),
        stages=every,
        routes=tuple(draw(st.lists(routes, min_size=1, max_size=3))),
        engine=draw(st.just(EngineOptions()) | engines),
        predicted=draw(st.none() | predictions),
    )


@settings(deadline=None, max_examples=60)
@given(plans())
def test_round_trips_are_exact(plan: Plan) -> None:
    assert parse_plan(plan_to_dict(plan), "x") == plan
    assert parse_plan(parse_yaml(write_yaml(plan_to_dict(plan)), "x"), "x") == plan


PUBLISHED = """
version: 1
model: llama-2-70b
cluster: cluster.yaml
stages:
  s0: {layers: [0, 48], devices: [ice-1/0, ice-1/1, ice-1/2, ice-1/3]}
  s1: {layers: [48, 80], devices: [ice-2/0, ice-2/1], shares: [5, 3]}
routes:
  - {weight: 1.0, path: [s0, s1]}
  - {path: [s0, {stage: s1, layers: [60, 80]}]}
"""


def test_the_published_format(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PUBLISHED)
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.stage("s1") == Stage("s1", (48, 80), ("ice-2/0", "ice-2/1"), (5.0, 3.0))
    assert plan.routes[0] == Route((Hop("s0", (0, 48)), Hop("s1", (48, 80))), 1.0)
    assert plan.routes[1].path[1] == Hop("s1", (60, 80))
    assert plan.engine == EngineOptions()
    assert plan.predicted is None
    dump_plan(plan, tmp_path / "again.yaml", comment="a comment")
    assert load_plan(tmp_path / "again.yaml") == plan


def test_the_cluster_is_found_beside_the_plan(tmp_path: Path) -> None:
    cluster = parse_cluster({"nodes": [{"name": "a", "device": "T4"}]}, "x")
    dump_cluster(cluster, tmp_path / "cluster.yaml")
    plan = parse_plan(parse_yaml(PUBLISHED, "plan.yaml"), "plan.yaml")
    assert resolve_cluster(plan, tmp_path) == cluster
    assert resolve_cluster(dataclasses.replace(plan, cluster=cluster)) == cluster
    assert resolve_cluster(dataclasses.replace(plan, cluster=str(tmp_path / "cluster.yaml"))) == cluster
    with pytest.raises(SpecError, match=r"missing\.yaml: cannot be read"):
        resolve_cluster(dataclasses.replace(plan, cluster="missing.yaml"), tmp_path)
    inline = parse_plan(plan_to_dict(plan) | {"cluster": cluster_to_dict(cluster)}, "x")
    assert inline.cluster == cluster


def changed(**changes: Any) -> dict[str, Any]:
    return parse_yaml(PUBLISHED, "p") | changes


def stage(**changes: Any) -> dict[str, Any]:
    return changed(stages={"s0": {"layers": [0, 4], "devices": ["a/0"]} | changes})


BROKEN: list[tuple[dict[str, Any], str]] = [
    (changed(version=2), "p.yaml: version: version 2 is not known"),
    (changed(version="1"), "p.yaml: version: must be a whole number"),
    (changed(model=None), "p.yaml: 'model' is missing"),
    (changed(cluster=3), "p.yaml: cluster: must be the path"),
    (changed(cluster={"nodes": []}), "p.yaml: cluster.nodes: must be a list"),
    (changed(stages={}), "p.yaml: stages: must be a mapping of stages"),
    (changed(stages=[1]), "p.yaml: stages"),
    (changed(route=[]), "unknown key 'route' (did you mean 'routes'?)"),
    (changed(routes=[]), "p.yaml: routes: must be a list of 1 to"),
    (changed(routes=[{"path": ["s2"]}]), "p.yaml: routes[0].path[0]: there is no stage 's2' (stages: s0, s1)"),
    (changed(routes=[{"path": []}]), "p.yaml: routes[0].path: must be a list of 1 to"),
    (changed(routes=[{"path": ["s0"], "weight": 0}]), "p.yaml: routes[0].weight: must be a number above 0"),
    (changed(routes=[{"path": ["s0"], "kv_tokens": 0}]), "routes[0].kv_tokens"),
    (changed(routes=[{"path": [{"stage": "s0", "layers": [3, 3]}]}]), "path[0].layers: [3, 3] holds no layer"),
    (stage(layers=[0]), "p.yaml: stages.s0.layers: must be a list of 2 entries"),
    (stage(layers=[0, "4"]), "p.yaml: stages.s0.layers[1]: must be a whole number"),
    (stage(layers=[4, 0]), "p.yaml: stages.s0.layers: [4, 0] holds no layer"),
    (stage(devices=[]), "p.yaml: stages.s0.devices: must be a list of 1 to"),
    (stage(devices=["a"]), "p.yaml: stages.s0.devices[0]: must be a device, like node/0"),
    (stage(devices=["a/01"]), "stages.s0.devices[0]"),
    (stage(shares=[1, 2]), "p.yaml: stages.s0.shares: 2 shares for 1 devices"),
    (stage(shares=[-1]), "p.yaml: stages.s0.shares[0]: must be a number above 0"),
    (changed(engine={"page": 16}), "p.yaml: engine: unknown key 'page' (did you mean 'page_size'?)"),
    (changed(engine={"page_size": 0}), "engine.page_size"),
    (changed(engine={"dtype": "fp16"}), "p.yaml: engine.dtype: must be one of float32, bfloat16, float16"),
    (changed(engine={"prefix_cache": "no"}), "engine.prefix_cache: must be true or false"),
    (changed(predicted={"objective": "x"}), "p.yaml: predicted: 'tokens_s' is missing"),
]


@pytest.mark.parametrize(("value", "message"), BROKEN, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_what_is_wrong_is_named_with_its_place(value: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_plan(value, "p.yaml")
    assert message in str(caught.value)


def test_the_documented_examples_are_read() -> None:
    text = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    runs = itertools.groupby(text.splitlines(), key=lambda line: line.startswith("    "))
    blocks = ["\n".join(line[4:] for line in lines) for indented, lines in runs if indented]
    cluster = parse_cluster(parse_yaml(blocks[0], "docs"), "docs")
    plan = parse_plan(parse_yaml(blocks[1], "docs"), "docs")
    assert check_plan(plan, cluster, load_model(plan.model)).dtype == "float16"
