"""Weights of routes by max-flow: for plans that people wrote, and where routes share stages."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, device_type, tiny_model

from hexgen.cluster import load_cluster
from hexgen.errors import InfeasibleError
from hexgen.model import load_model
from hexgen.plan import EngineOptions, Hop, Plan, Prediction, Route, Stage
from hexgen.scheduler import programs
from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.planner import plan
from hexgen.scheduler.task import Task, make_task
from hexgen.scheduler.weights import _flow_limits, _flows, _space, max_flow, routed, weighted
from hexgen.validate import check_plan

SPECS = Path(__file__).parent.parent / "cluster_specs"
OPTIONS = EngineOptions(token_budget=64, max_sequences=8)
LAYERS = 6


def predicted(made: Plan) -> Prediction:
    assert made.predicted is not None
    return made.predicted


def task_of(made: Plan) -> Task:
    assert not isinstance(made.cluster, str)
    model = tiny_model(LAYERS) if made.model == "tiny" else load_model(made.model)
    workload = WORKLOAD if made.model == "tiny" else None
    return make_task(made.cluster, model, workload, "throughput", None, 0, "auto", made.engine)


@pytest.mark.parametrize("name", ["hexgen-half30", "helix-distributed24", "helix-hetero42"])
def test_a_written_plan_without_weights_serves_as_the_planner_s(name: str) -> None:
    made = plan(load_cluster(SPECS / f"{name}.yaml"), load_model("llama-2-70b"), engine="heuristic")
    assert len(made.routes) > 1
    plain = dataclasses.replace(
        made, routes=tuple(dataclasses.replace(route, weight=1.0) for route in made.routes), predicted=None
    )
    found = weighted(plain, task_of(made))
    assert [route.path for route in found.routes] == [route.path for route in made.routes]
    assert predicted(found).tokens_s >= 0.95 * predicted(made).tokens_s


def layered(speeds: list[list[float]], weight: float = 1.0) -> Plan:
    """Stages in columns, each column the same layers, a device of its own speed each; a route for every way."""
    flat = [speed for column in speeds for speed in column]
    cluster = cluster_of(*((device_type("cpu", 50, speed), 1) for speed in flat))
    edges = [LAYERS * i // len(speeds) for i in range(len(speeds) + 1)]
    stages: list[Stage] = []
    columns: list[list[Hop]] = []
    for i, column in enumerate(speeds):
        columns.append([])
        for _ in column:
            name = f"s{len(stages)}"
            stages.append(Stage(name, (edges[i], edges[i + 1]), (f"n{len(stages)}/0",)))
            columns[-1].append(Hop(name, (edges[i], edges[i + 1])))
    paths: list[tuple[Hop, ...]] = [()]
    for hops in columns:
        paths = [(*path, hop) for path in paths for hop in hops]
    return Plan("tiny", cluster, tuple(stages), tuple(Route(path, weight) for path in paths), OPTIONS)


speeds = st.lists(st.lists(st.sampled_from([0.05, 0.1, 0.2, 0.5]), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
@given(columns=speeds)
def test_the_weights_of_all_ways_carry_the_max_flow(columns: list[list[float]]) -> None:
    """Two independent solvers: routes by a linear program, the graph by networkx. Links do not bind here."""
    made = layered(columns)
    task = task_of(made)
    value = max_flow(*_space(made, task)).tokens_s
    assert sum(_flows(*_flow_limits(made, task)) or ()) == pytest.approx(
        value, rel=2e-3
    )  # paths of next to nothing are left out


@settings(deadline=None, max_examples=25)
@given(columns=speeds)
def test_weights_never_serve_less_than_those_that_were_there(columns: list[list[float]]) -> None:
    made = layered(columns)
    task = task_of(made)
    before = plan_value(made, task)
    after = weighted(made, task)
    assert predicted(after).tokens_s >= before * (1 - 1e-9)
    check_plan(after, task.cluster, task.model)


def plan_value(made: Plan, task: Task) -> float:
    return evaluate(made, task.cluster, task.model, task.workload).tokens_s


def test_an_unequal_pair_behind_one_stage() -> None:
    """The second column's devices are 1:4, so should their routes be; alike they would serve less."""
    made = layered([[0.5, 0.5, 0.5], [0.1, 0.4]])
    found = weighted(made, task_of(made))
    shares = {"s3": 0.0, "s4": 0.0}
    for route in found.routes:
        shares[route.path[-1].stage] += route.weight
    assert shares["s4"] / shares["s3"] == pytest.approx(4, rel=0.1)
    assert predicted(found).tokens_s > 1.3 * plan_value(made, task_of(made))


@settings(deadline=None, max_examples=25)
@given(columns=speeds)
def test_stages_alone_become_a_plan(columns: list[list[float]]) -> None:
    made = layered(columns)
    task = task_of(made)
    found = routed(dataclasses.replace(made, routes=()), task)
    check_plan(found, task.cluster, task.model)
    assert sum(route.weight for route in found.routes) == pytest.approx(1, abs=1e-4)
    assert predicted(found).tokens_s > 0


def test_a_stage_entered_in_its_middle() -> None:
    """s1 holds layers that s0 also has: the route uses only those that are left."""
    cluster = cluster_of((device_type("cpu", 50, 0.1), 1), (device_type("cpu", 50, 0.1), 1))
    stages = (Stage("s0", (0, 4), ("n0/0",)), Stage("s1", (2, 6), ("n1/0",)))
    made = Plan("tiny", cluster, stages, (), OPTIONS)
    found = routed(made, task_of(made))
    assert found.routes == (Route((Hop("s0", (0, 4)), Hop("s1", (4, 6))), 1.0),)


def test_stages_that_leave_a_gap_are_refused() -> None:
    made = layered([[0.1], [0.1]])
    gap = dataclasses.replace(made, stages=(made.stages[0], dataclasses.replace(made.stages[1], layers=(4, 6))))
    with pytest.raises(InfeasibleError, match="no chain of these stages"):
        routed(gap, task_of(made))


@pytest.mark.parametrize("module", ["pulp", "highspy"])
def test_without_a_solver_shared_routes_keep_their_weights(
    module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = layered([[0.5, 0.5], [0.1, 0.4]])
    programs._warn_once.cache_clear()
    if module == "pulp":
        monkeypatch.setitem(sys.modules, "pulp", None)
    else:

        def missing(*_: object, **__: object) -> None:
            raise pulp.PulpSolverError("HiGHS: Not Available")

        monkeypatch.setattr(pulp.HiGHS, "actualSolve", missing)
    with caplog.at_level(logging.WARNING):
        found = weighted(made, task_of(made))
    assert [route.weight for route in found.routes] == [1.0] * 4
    assert len([record for record in caplog.records if "without linear programs" in record.message]) == 1
