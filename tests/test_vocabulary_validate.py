"""Plans against their cluster and model: one clear error for whatever is wrong."""

import dataclasses
from typing import Any

import pytest
from vocabulary_strategies import MODEL

from hexgen.cluster import parse_cluster
from hexgen.errors import InfeasibleError, SpecError
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.validate import check_plan

CLUSTER = parse_cluster(
    {"nodes": [{"name": "a", "device": "cpu", "count": 9, "memory": "1GB"}, {"name": "b", "device": "T4"}]},
    "c.yaml",
)
S0 = Stage("s0", (0, 4), ("a/0", "a/1"))
S1 = Stage("s1", (4, 8), ("a/2",))
GOOD = Plan("tiny", "c.yaml", (S0, S1), (Route((Hop("s0", (0, 4)), Hop("s1", (4, 8)))),))


def test_good_plans_pass() -> None:
    memory = check_plan(GOOD, CLUSTER, MODEL)
    assert len(memory.devices) == 3
    three = dataclasses.replace(GOOD, stages=(S0, dataclasses.replace(S1, devices=("a/2", "b/0", "a/5"))))
    assert check_plan(three, CLUSTER, MODEL).dtype == "float32"
    partial = dataclasses.replace(
        GOOD,
        stages=(S0, Stage("s1", (2, 8), ("a/2",))),
        routes=(Route((Hop("s0", (0, 4)), Hop("s1", (4, 8)))), Route((Hop("s0", (0, 2)), Hop("s1", (2, 8))))),
    )
    assert len(check_plan(partial, CLUSTER, MODEL).kv_tokens) == 2


def with_stages(*stages: Stage, **changes: Any) -> Plan:
    path = tuple(Hop(stage.name, stage.layers) for stage in stages)
    return dataclasses.replace(GOOD, **({"stages": stages, "routes": (Route(path),)} | changes))


def with_path(*hops: tuple[str, int, int]) -> Plan:
    return dataclasses.replace(GOOD, routes=(Route(tuple(Hop(n, (a, b)) for n, a, b in hops)),))


BROKEN: list[tuple[Plan, str]] = [
    (dataclasses.replace(GOOD, version=2), "p.yaml: version: version 2 is not known"),
    (dataclasses.replace(GOOD, routes=()), "p.yaml: routes: there are no routes"),
    (with_stages(S0, dataclasses.replace(S1, name="s0")), "the stage 's0' stands twice"),
    (
        with_stages(S0, dataclasses.replace(S1, devices=("c/0",))),
        "p.yaml: stages.s1.devices[0]: there is no device 'c/0' in the cluster 'cluster' (known: a, b)",
    ),
    (
        with_stages(S0, dataclasses.replace(S1, devices=("a/9",))),
        "there is no device 'a/9' in the cluster 'cluster' (a has 9",
    ),
    (with_stages(S0, dataclasses.replace(S1, devices=("b/1",))), "(b has 1: b/0)"),
    (
        with_stages(S0, dataclasses.replace(S1, devices=("a/1",))),
        "p.yaml: stages.s1.devices[0]: the device a/1 is used twice, by s0 and s1",
    ),
    (with_stages(S0, dataclasses.replace(S1, devices=("a/2", "a/2"))), "the device a/2 is used twice"),
    (
        with_stages(S0, dataclasses.replace(S1, layers=(4, 9))),
        "p.yaml: stages.s1.layers: [4, 9] is not a range of the 8 layers of tiny",
    ),
    (
        with_stages(S0, dataclasses.replace(S1, layers=(5, 8))),
        "p.yaml: routes[0].path[1]: layer 4 is missing before s1",
    ),
    (
        with_stages(S0, dataclasses.replace(S1, layers=(6, 8))),
        "p.yaml: routes[0].path[1]: layers 4 to 5 are missing before s1",
    ),
    (
        with_stages(S0, dataclasses.replace(S1, layers=(3, 8))),
        "p.yaml: routes[0].path[1]: layer 3 comes again in s1: layers below 4 are already covered (use a part",
    ),
    (with_stages(S0), "p.yaml: routes[0].path: layers 4 to 7 are missing at its end"),
    (with_path(("s1", 4, 8)), "layers 0 to 3 are missing before s1"),
    (with_path(("s0", 0, 4), ("s0", 0, 4)), "p.yaml: routes[0].path[1]: the route passes s0 twice"),
    (with_path(("s0", 0, 4), ("s3", 4, 8)), "p.yaml: routes[0].path[1]: there is no stage 's3'"),
    (
        with_path(("s0", 0, 5), ("s1", 5, 8)),
        "routes[0].path[0]: uses layers [0, 5] of s0, which holds [0, 4]",
    ),
    (
        with_stages(S0, dataclasses.replace(S1, devices=tuple(f"a/{i}" for i in range(9)))),
        "p.yaml: stages.s1.devices: 9 devices for 8 attention heads",
    ),
    (
        with_stages(dataclasses.replace(S0, shares=(1.0,)), S1),
        "stages.s0.shares: [1.0] are not 2 positive",
    ),
    (with_stages(dataclasses.replace(S0, shares=(1.0, 0.0)), S1), "p.yaml: stages.s0.shares"),
    (
        dataclasses.replace(GOOD, routes=(dataclasses.replace(GOOD.routes[0], weight=0.0),)),
        "p.yaml: routes[0].weight: the weight 0.0 is not",
    ),
    (
        dataclasses.replace(GOOD, stages=(S0, S1, Stage("s9", (0, 1), ("a/7",)))),
        "p.yaml: stages.s9: no route passes the stage 's9'",
    ),
    (
        dataclasses.replace(GOOD, engine=EngineOptions(max_context=4096)),
        "p.yaml: engine.max_context: 4096 tokens are more than tiny was made for (512)",
    ),
]


@pytest.mark.parametrize(("plan", "message"), BROKEN, ids=lambda v: v[:50] if isinstance(v, str) else "")
def test_what_is_wrong_is_named(plan: Plan, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_plan(plan, CLUSTER, MODEL, "p.yaml")
    assert message in str(caught.value)


def test_a_plan_larger_than_memory() -> None:
    small = parse_cluster({"nodes": [{"name": "a", "device": "cpu", "count": 3, "memory": "1MB"}]}, "c.yaml")
    with pytest.raises(InfeasibleError, match=r"device a/2, stage s1: lacks .*MB"):
        check_plan(GOOD, small, MODEL)
