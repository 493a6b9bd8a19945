"""What cannot be planned, or not as asked: one clear line, what would help, and a plan where there is one."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, clusters, device_type, tiny_model

from hexgen.catalogue import DEVICE_TYPES
from hexgen.cluster import Cluster, cluster_to_dict, parse_cluster
from hexgen.errors import InfeasibleError, SpecError
from hexgen.model import ModelSpec, load_model
from hexgen.plan import EngineOptions, Plan
from hexgen.scheduler.changes import Asked, Change, smallest_changes, with_more
from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.planner import plan
from hexgen.scheduler.reachable import reachable
from hexgen.scheduler.traffic import traffic_of
from hexgen.validate import check_plan
from hexgen.workload import Lengths, Workload

OPTIONS = EngineOptions(token_budget=64, max_sequences=8)


def plans(cluster: Cluster, model: ModelSpec, options: EngineOptions, workload: Workload = WORKLOAD) -> bool:
    try:
        plan(cluster, model, workload, options=options)
    except InfeasibleError:
        return False
    return True


def lengths(change: Change, extra: int = 0) -> Workload:
    scale = 1 + extra / (change.traffic.prompt + change.traffic.output)
    return Workload(
        prompt_tokens=Lengths(mean=change.traffic.prompt * scale),
        output_tokens=Lengths(mean=change.traffic.output * scale),
    )


@settings(deadline=None, max_examples=60)
@given(cluster=clusters(most_devices=3), layers=st.integers(4, 12), budget=st.sampled_from([64, 512]))
def test_each_change_helps_and_a_smaller_one_does_not(cluster: Cluster, layers: int, budget: int) -> None:
    model = tiny_model(layers)
    options = dataclasses.replace(OPTIONS, token_budget=budget)
    assume(not plans(cluster, model, options))
    asked = Asked(cluster, model, options, traffic_of(model, WORKLOAD, options))
    for change in smallest_changes(asked):
        workload = lengths(change)
        assert plans(change.cluster, model, change.options, workload), change.text
        assert str(change.amount) in change.text or change.kind == "dtype"
        if change.kind == "devices" and change.amount > 1:
            like = change.cluster.nodes[-1]
            assert not plans(with_more(cluster, like, change.amount - 1), model, options)
        elif change.kind == "token_budget":
            more = dataclasses.replace(options, token_budget=change.amount + 16)
            assert not plans(cluster, model, more)
        elif change.kind == "max_sequences":
            more = dataclasses.replace(options, max_sequences=change.amount + 1)
            assert not plans(cluster, model, more)
        elif change.kind == "request_tokens":
            # A page more, so that rounding to whole pages cannot hide the difference.
            assert not plans(cluster, model, options, lengths(change, extra=16))


def test_the_refusal_names_bytes_and_the_number_of_devices() -> None:
    model = load_model("llama-2-70b")
    cluster = cluster_of((DEVICE_TYPES["T4"], 4), (DEVICE_TYPES["L4"], 1))
    with pytest.raises(InfeasibleError, match=r"are missing.*add 3 more devices of type L4 \(24 GB\)") as caught:
        plan(cluster, model)
    assert "138 GB in float16" in str(caught.value)
    l4 = cluster.nodes[1]
    plan(with_more(cluster, l4, 3), model)
    with pytest.raises(InfeasibleError):
        plan(with_more(cluster, l4, 2), model)


def test_shorter_requests_or_another_dtype_where_they_help() -> None:
    cpu = device_type("cpu", 2.8, 0.1)
    with pytest.raises(InfeasibleError, match=r"compute in bfloat16 .*plan for requests of at most \d+ tokens"):
        plan(
            cluster_of((cpu, 2)),
            tiny_model(4),
            Workload(prompt_tokens=Lengths(mean=400), output_tokens=Lengths(mean=100)),
            options=dataclasses.replace(OPTIONS, token_budget=16),
        )


def test_no_number_of_too_small_devices_is_enough() -> None:
    with pytest.raises(InfeasibleError, match="no device alone holds one layer"):
        plan(cluster_of((device_type("cpu", 0.2, 0.1), 2)), tiny_model(4), WORKLOAD, options=OPTIONS)


# ---- links ------------------------------------------------------------------------------------------------------


def split_cluster(**nodes: int) -> Cluster:
    """A100s and L4s in regions of their own, with no way between the regions."""
    return parse_cluster(
        {
            "name": "split",
            "nodes": [
                {"name": f"{name}-$i", "repeat": count, "region": name, "device": name.upper()}
                for name, count in nodes.items()
            ],
            "links": {
                "default": {"bandwidth": "0Gbps", "latency": "1ms"},
                "regions": [{"within": name, "bandwidth": "10Gbps", "latency": "1ms"} for name in nodes],
            },
        }
    )


def nodes_of(made: Plan) -> set[str]:
    return {device.split("/")[0] for stage in made.stages for device in stage.devices}


def test_what_no_link_leads_to_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    cluster = split_cluster(a100=4, l4=2)
    with caplog.at_level(logging.WARNING):
        made = plan(cluster, load_model("llama-2-13b"))
    assert nodes_of(made) <= {f"a100-{i}" for i in range(1, 5)}
    assert [record.message for record in caplog.records] == [
        "planned without nodes that no link leads to: l4-1, l4-2"
    ]
    assert parse_cluster(cluster_to_dict(cluster)) == cluster


def test_where_the_connected_rest_is_too_small_the_refusal_names_the_others() -> None:
    with pytest.raises(InfeasibleError, match=r"add 2 more devices of type A100.*") as caught:
        plan(split_cluster(a100=2, l4=2), load_model("llama-2-70b"))
    assert "no link leads to l4-1, l4-2" in str(caught.value)
    assert "(give the links to l4-1, l4-2 a bandwidth, so that they count too, or " in str(caught.value)


def test_no_route_crosses_a_missing_link() -> None:
    """A hub that reaches three nodes which do not reach each other: no chain of three comes back to its start."""
    value: dict[str, Any] = {
        "name": "star",
        "nodes": [{"name": "hub", "device": "A100"}, {"name": "spoke-$i", "repeat": 3, "device": "A100"}],
        "links": {
            "default": {"bandwidth": "0Gbps", "latency": "1ms"},
            "nodes": [
                {"between": ["hub", f"spoke-{i}"], "bandwidth": "10Gbps", "latency": "1ms"} for i in (1, 2, 3)
            ],
        },
    }
    cluster = parse_cluster(value)
    assert reachable(cluster) == (cluster, ())
    made = plan(cluster, load_model("llama-1-30b"))  # needs two of them
    check_plan(made, cluster, load_model("llama-1-30b"))
    assert [len(route.path) for route in made.routes] == [2]
    assert "hub" in nodes_of(made)
    large = load_model("llama-2-70b")
    with pytest.raises(InfeasibleError, match=r"keep them apart \(give links: default a bandwidth"):
        plan(cluster, large)
    value["links"]["default"]["bandwidth"] = "1Gbps"
    plan(parse_cluster(value), large, time_limit_s=0)


def test_a_missing_link_is_named_before_more_devices() -> None:
    """A chain of four regions: the way back from the last to the first is what is missing."""
    links = [{"between": [a, b], "bandwidth": "1Gbps", "latency": "1ms"} for a, b in ("ab", "bc", "cd")]
    links += [{"within": name, "bandwidth": "1Gbps", "latency": "1ms"} for name in "abcd"]
    value: dict[str, Any] = {
        "name": "chain",
        "nodes": [{"name": f"n{name}", "region": name, "device": "A100"} for name in "abcd"],
        "links": {"default": {"bandwidth": "0Gbps", "latency": "1ms"}, "regions": links},
    }
    model = load_model("llama-1-65b")
    options = EngineOptions(token_budget=64, max_sequences=8)
    workload = Workload(prompt_tokens=Lengths(mean=100), output_tokens=Lengths(mean=50))
    cluster = parse_cluster(value)
    traffic = traffic_of(model, workload, options)
    changes = smallest_changes(Asked(cluster, model, options, traffic))
    assert [change.text for change in changes][:1] == ["give the link between a and d a bandwidth"]
    assert not plans(cluster, model, options, workload)
    assert plans(changes[0].cluster, model, options, workload)


def test_a_written_plan_over_a_missing_link_is_refused() -> None:
    cluster = split_cluster(a100=1, l4=1)
    model = load_model("llama-2-13b")
    whole = plan(cluster_of((DEVICE_TYPES["A100-40G-SXM"], 1)), model)
    stage = whole.stages[0]
    hops = whole.routes[0].path
    two = dataclasses.replace(
        whole,
        cluster=cluster,
        stages=(
            dataclasses.replace(stage, name="a", layers=(0, 30), devices=("a100-1/0",)),
            dataclasses.replace(stage, name="b", layers=(30, 40), devices=("l4-1/0",)),
        ),
        routes=(
            dataclasses.replace(
                whole.routes[0],
                path=(
                    dataclasses.replace(hops[0], stage="a", layers=(0, 30)),
                    dataclasses.replace(hops[0], stage="b", layers=(30, 40)),
                ),
            ),
        ),
    )
    with pytest.raises(InfeasibleError, match="no link leads from a100-1 to l4-1"):
        check_plan(two, cluster, model)


def test_a_link_inside_a_node_must_have_bandwidth() -> None:
    with pytest.raises(SpecError, match="bandwidth"):
        parse_cluster(
            {
                "name": "x",
                "nodes": [{"name": "a", "device": "L4", "count": 2, "link": {"bandwidth": "0B/s", "latency": 0}}],
            }
        )


# ---- time -------------------------------------------------------------------------------------------------------


def test_no_time_gives_the_first_plan_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    cluster = cluster_of((DEVICE_TYPES["L4"], 1), (DEVICE_TYPES["A100-40G-SXM"], 1), (DEVICE_TYPES["L4"], 2))
    model = load_model("llama-2-13b")
    with caplog.at_level(logging.WARNING):
        made = plan(cluster, model, WORKLOAD, time_limit_s=0)
    assert [record.message for record in caplog.records if "0 s" in record.message] == [
        "a time limit of 0 s leaves no time to search: the plan is the first that was found"
    ]
    assert made.predicted is not None
    assert evaluate(made, cluster, model, WORKLOAD).tokens_s == pytest.approx(made.predicted.tokens_s)


@pytest.mark.parametrize("limit_s", [-1.0, float("nan"), float("inf")])
def test_impossible_time_limits(limit_s: float) -> None:
    with pytest.raises(SpecError, match="time limit"):
        plan(cluster_of((DEVICE_TYPES["L4"], 1)), load_model("llama-2-7b"), time_limit_s=limit_s)


# ---- solvers ----------------------------------------------------------------------------------------------------

_WITHOUT = """
import sys
sys.modules[{module!r}] = None
from hexgen.cluster import load_cluster
from hexgen.model import load_model
from hexgen.scheduler import plan
made = plan(load_cluster({cluster!r}), load_model("llama-2-70b"), objective={objective!r}, time_limit_s=2)
print(made.predicted.tokens_s)
"""


@pytest.mark.parametrize("objective", ["throughput", "maxflow"])
@pytest.mark.parametrize("module", ["pulp", "highspy"])
def test_without_a_solver_there_is_a_plan_and_one_line(module: str, objective: str) -> None:
    """In a process of its own: the module is missing from the start, as where it was never installed."""
    cluster = str(Path(__file__).parent.parent / "cluster_specs" / "helix-single24.yaml")
    code = _WITHOUT.format(module=module, cluster=cluster, objective=objective)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 50
    assert done.stderr.count("\n") <= 1, done.stderr  # none where the search solves no program at all
    if objective == "maxflow":
        assert "planned without linear programs" in done.stderr
