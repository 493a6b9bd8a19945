"""Shared stages: equal loads by few routes, the model against closed forms, the search against brute force."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, device_type, tiny_model

from hexgen.cluster import Cluster, Link, load_cluster
from hexgen.memory import plan_memory
from hexgen.model import load_model
from hexgen.plan import EngineOptions, Hop, Plan, Prediction, Route, Stage, dump_plan, load_plan
from hexgen.routing import Need, Router, RouteState
from hexgen.scheduler import evaluate
from hexgen.scheduler.best import best_on_nodes, solver_for
from hexgen.scheduler.cost import CostModel, GroupShape
from hexgen.scheduler.front import front as shown_front
from hexgen.scheduler.groups import Topology, node_groups
from hexgen.scheduler.lanes.best import best_lanes, front
from hexgen.scheduler.lanes.kinds import Kind, Range, kinds_of, layouts
from hexgen.scheduler.lanes.model import Stop, Way, flow_limit, pace, served, stop_times, way_times
from hexgen.scheduler.lanes.moves import neighbours
from hexgen.scheduler.lanes.ways import MOST_ROUTES, Space, concurrency, most_deals, passable, routes_of, ways_of
from hexgen.scheduler.tables import load_table
from hexgen.scheduler.task import Task, make_task
from hexgen.validate import check_plan
from hexgen.workload import Slo

OPTIONS = EngineOptions(dtype="float16", token_budget=64, max_sequences=32)
MODEL = tiny_model(6)
BIG, SMALL = device_type("cuda", 30, 1.0, "big"), device_type("cuda", 10, 0.4, "small")
LINK = Link(1e9, 1e-4)
PROFILE = CostModel(MODEL, "float16", OPTIONS).profile(GroupShape((BIG,), LINK))
ROOT = Path(__file__).parents[1]


def task_of(folder: Path, cluster: Cluster, most: tuple[int, int], rates: tuple[float, float]) -> Task:
    """Two types that hold up to ``most`` layers, at ``rates`` layers x tokens a second."""
    types = {}
    for name, layers, rate in zip(("big", "small"), most, rates, strict=True):
        held = range(1, layers + 1)
        types[name] = {
            "tokens_per_s_by_layers": {str(n): rate / n for n in held},
            "kv_token_layers_by_layers": {str(n): 12000 - 1000 * n for n in held},
        }
    values = {
        "model": "tiny", "layers": 6, "activation_bytes_per_token": 256, "layer_bytes": 1e3, "types": types,
    }  # fmt: skip
    path = folder / "table.json"
    path.write_text(json.dumps(values))
    return make_task(cluster, MODEL, WORKLOAD, "throughput", None, 0, "auto", OPTIONS, load_table(path))


def space_of(task: Task) -> Space:
    solver = solver_for(task, task.cluster.nodes, "throughput")
    return Space(solver, tuple(kinds_of(solver)))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_routes_load_the_lanes_of_each_range_equally(lanes: list[int]) -> None:
    shape = tuple(Range(0, 1, p) for p in lanes)
    routes = routes_of(shape)
    assert sum(weight for weight, _ in routes) == 1
    assert len(routes) <= 1 + sum(p - 1 for p in lanes)
    for i, p in enumerate(lanes):
        loads = [sum((w for w, path in routes if path[i] == lane), Fraction(0)) for lane in range(p)]
        assert loads == [Fraction(1, p)] * p


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6), st.integers(2, 3))
def test_dealt_anew_neighbours_are_independent_and_loads_stay_equal(lanes: list[int], deals: int) -> None:
    routes = routes_of(tuple(Range(0, 1, p) for p in lanes), deals)
    assert sum(weight for weight, _ in routes) == 1
    assert len({path for _, path in routes}) == len(routes)
    for i, p in enumerate(lanes):
        for lane in range(p):
            assert sum((w for w, path in routes if path[i] == lane), Fraction(0)) == Fraction(1, p)
    several = [i for i, p in enumerate(lanes) if p > 1]
    for i, j in itertools.pairwise(several):
        for a, b in itertools.product(range(lanes[i]), range(lanes[j])):
            both = sum((w for w, path in routes if path[i] == a and path[j] == b), Fraction(0))
            assert both == Fraction(1, lanes[i] * lanes[j])


@settings(max_examples=50)
@given(st.data())
def test_neighbours_are_shapes_of_the_same_machines_and_layers(data: st.DataObject) -> None:
    layers, held, count = 12, 5, 6
    cluster = cluster_of(*[(BIG, 1)] * count, *[(SMALL, 1)] * count, link=LINK)
    topology = Topology(cluster)
    kinds = [
        Kind(tuple(node_groups(topology, i, [1])[0] for i in places), PROFILE, "", held)
        for places in (range(count), range(count, 2 * count))
    ]
    first = [Range(0, held, data.draw(st.integers(1, 3))) for _ in range(2)]
    start = (*first, Range(1, 2, data.draw(st.integers(1, 6))))
    found = list(neighbours(start, kinds, layers, lambda part: part.lanes / part.layers))
    assert found
    assert start not in found
    assert len(set(found)) == len(found)
    for shape in found:
        assert sum(part.layers for part in shape) == layers
        assert all(1 <= part.layers <= held and part.lanes >= 1 for part in shape)
        for kind in (0, 1):
            assert sum(part.lanes for part in shape if part.kind == kind) <= count


@given(machines=st.integers(1, 12), most=st.integers(1, 7), layers=st.integers(1, 40))
def test_layouts_use_the_machines_that_are_there(machines: int, most: int, layers: int) -> None:
    found = layouts(0, machines, most, layers)
    assert len(set(found)) == len(found)
    for shape in found:
        assert sum(part.lanes for part in shape) == machines
        assert sum(part.layers for part in shape) <= layers
        assert all(1 <= part.layers <= most for part in shape)
        assert max(part.lanes for part in shape) - min(part.lanes for part in shape) <= 1
    for total in range(1, min(layers, machines * most) + 1):
        if total <= most:  # all in parallel
            assert (Range(0, total, machines),) in found
        if total >= machines and machines <= 32:  # all in series, as even as can be
            base, more = divmod(total, machines)
            even = (Range(0, base + 1, 1),) * more + (Range(0, base, 1),) * (machines - more)
            assert even in found


def test_a_decode_behind_prompts_loses_what_the_closed_form_says(tmp_path: Path) -> None:
    """Equal stages in series: one that starts ``a`` behind a prompt is delayed by ``D - a``, a exponential."""
    task = task_of(tmp_path, cluster_of((BIG, 1), link=LINK), (6, 6), (1e9, 1e9))
    space = space_of(task)
    traffic = space.solver.traffic
    stop = Stop(space.kinds[0].profile, 3, False, False, 1.0)
    stages = 200
    one = stop_times(stop, traffic, 1.0).prompt_s
    for wanted in (0.3, 1.0, 3.0):  # E
        rate = wanted / (stages * one)
        times = stop_times(stop, traffic, rate)
        whole = times.prompt_s * stages
        free = space.solver.cost.edge(stop.profile, stop.profile, Link(1e18, 0.0))
        edges = (dataclasses.replace(free, delay_s=0.0, token_s=0.0),) * (stages - 1)
        long = Way(1.0, (stop,) * stages, edges, (1.0,) * (stages - 1), None)
        _, trip, quiet = way_times(long, traffic, rate)
        meets = 1.5 * rate  # delays go with the square of prompts' lengths
        assert trip - quiet == pytest.approx(whole - (1 - math.exp(-meets * whole)) / meets, rel=0.02)


def test_parallel_lanes_spare_decodes_the_prompts_of_the_others(tmp_path: Path) -> None:
    task = task_of(tmp_path, cluster_of(*[(BIG, 1)] * 4, link=LINK), (3, 3), (1e5, 1e5))
    space = space_of(task)
    series, lanes = (Range(0, 3, 1),) * 2, (Range(0, 3, 2),) * 2
    traffic = space.solver.traffic
    for rate in (1.0, 10.0, 100.0):
        one, two = (pace(ways_of(space, shape), traffic, rate) for shape in (series, lanes))
        assert two.trip_s - two.quiet_s < one.trip_s - one.quiet_s
        # Half of the requests on each of two machines is what one machine does at half the rate.
        half = pace(ways_of(space, series), traffic, rate / 2)
        assert two.trip_s == pytest.approx(half.trip_s, rel=1e-6)


@settings(deadline=None, max_examples=15, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@example(big=3, small=3, most=(2, 1), rates=(80331.0, 9568.0))  # more routes take more sequences
@given(
    big=st.integers(1, 3),
    small=st.integers(0, 4),
    most=st.tuples(st.integers(2, 6), st.integers(1, 4)),
    rates=st.tuples(st.floats(2e3, 1e5), st.floats(1e3, 5e4)),
)
def test_the_search_finds_what_brute_force_finds(
    big: int,
    small: int,
    most: tuple[int, int],
    rates: tuple[float, float],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """All layouts of both kinds in both orders, each priced by the same model."""
    cluster = cluster_of(*[(BIG, 1)] * big, *[(SMALL, 1)] * small, link=LINK)
    task = task_of(tmp_path_factory.mktemp("t"), cluster, most, rates)
    space = space_of(task)
    options = [[(), *layouts(i, len(kind.groups), kind.most_layers, 6)] for i, kind in enumerate(space.kinds)]
    best = 0.0
    for order in itertools.permutations(range(len(options))):
        for parts in itertools.product(*(options[i] for i in order)):
            shape = tuple(part for layout in parts for part in layout)
            if sum(part.layers for part in shape) != 6 or not passable(space, shape):
                continue
            for deals in {1, most_deals(space, shape)}:
                at_once = concurrency(space, shape, deals)
                if at_once >= 1:
                    ways = ways_of(space, shape, deals)
                    best = max(best, served(ways, space.solver.traffic, at_once).requests_s)
    found = front(task)
    assert bool(found) == (best > 0)
    if found:  # layouts are as even as can be, and the search goes on from them: it may find more
        assert found[0].pace.requests_s >= best * 0.95
        for a, b in itertools.pairwise(found):
            assert b.tokens_s <= a.tokens_s
            assert b.pace.trip_s < a.pace.trip_s


def test_what_no_two_pipelines_can_hold_is_shared(tmp_path: Path) -> None:
    """One big machine takes half of the model, and two small ones the rest, in parallel."""
    cluster = cluster_of((BIG, 1), (SMALL, 1), (SMALL, 1), link=LINK)
    task = task_of(tmp_path, cluster, (3, 3), (1e5, 3e3))
    plan = best_lanes(task)
    assert plan is not None
    assert plan.predicted is not None
    check_plan(plan, cluster, MODEL)
    assert sorted(stage.layers for stage in plan.stages) == [(0, 3), (0, 3), (3, 6)] or sorted(
        stage.layers for stage in plan.stages
    ) == [(0, 3), (3, 6), (3, 6)]
    apart = best_on_nodes(task, cluster.nodes, "throughput")
    assert apart is not None
    disjoint = apart.emit(task, "throughput").predicted
    assert disjoint is not None
    # 3000 layers x tokens a second: in series a small one holds 2 layers, in parallel 3 for half of the requests.
    # Of the 63 tokens that a request takes through the stages, 24 are what it asked for (the first comes with it).
    assert disjoint.tokens_s == pytest.approx(3000 / 2 * 24 / 63, rel=0.01)
    assert plan.predicted.tokens_s == pytest.approx(2 * 3000 / 3 * 24 / 63, rel=0.01)


def test_the_prediction_is_what_the_search_went_by(tmp_path: Path) -> None:
    cluster = cluster_of((BIG, 1), (BIG, 1), *[(SMALL, 1)] * 4, link=LINK)
    task = task_of(tmp_path, cluster, (2, 2), (1e5, 1e5))
    points = [point for point in front(task) if len(routes_of(point.shape, point.deals)) > 1]
    assert points
    for point in points:
        predicted = point.plan(task).predicted
        assert predicted is not None
        assert predicted.tokens_s == pytest.approx(point.tokens_s, rel=0.05)
        assert predicted.tokens_s <= (predicted.upper_bound_tokens_s or math.inf) * (1 + 1e-6)


def test_what_is_served_is_the_largest_rate_that_has_room(tmp_path: Path) -> None:
    task = task_of(tmp_path, cluster_of((BIG, 1), (BIG, 1), *[(SMALL, 1)] * 2, link=LINK), (2, 2), (1e5, 1e4))
    space = space_of(task)
    shape = (Range(0, 2, 1), Range(0, 2, 1), Range(1, 2, 2))
    ways, traffic = ways_of(space, shape), space.solver.traffic
    limit = flow_limit(ways, traffic)
    for most in (1.0, 1.5, 3.0, 10.0, 100.0, 1e6):
        state = served(ways, traffic, most)
        assert state.in_flight <= most
        assert state.requests_s == limit or pace(ways, traffic, state.requests_s + 3e-5 * limit).in_flight > most
        kept = dataclasses.replace(traffic, slo=Slo(tpot_s=1.5 * pace(ways, traffic, 0.0).trip_s))
        assert served(ways, kept, most, True).trip_s <= kept.slo.tpot_s * (1 + 1e-9)


def test_helix_own_cluster_under_its_table(tmp_path: Path) -> None:
    """Of a plan with four lanes' few routes 285 tokens/s were predicted; dealt out anew, unlike ranges pay."""
    cluster = load_cluster(ROOT / "cluster_specs" / "helix-single24.yaml")
    table = load_table(ROOT / "tests" / "data" / "helix_single24_70b.json")
    model = load_model("llama-2-70b")
    task = make_task(cluster, model, None, "throughput", None, 0, "auto", None, table)
    plan = best_lanes(task)
    assert plan is not None
    assert plan.predicted is not None
    assert plan.predicted.tokens_s > 340
    assert len(plan.routes) <= MOST_ROUTES
    memory = plan_memory(plan, cluster, model)
    assert min(memory.max_context) == model.max_context  # no route refuses what the model takes
    # A file, and the coordinator's router, keep every machine's share.
    dump_plan(plan, tmp_path / "plan.yaml")
    read = load_plan(tmp_path / "plan.yaml")
    assert read.routes == plan.routes
    router = Router(
        RouteState(i, route.weight, 4096, 10**6, 16, 256, free_pages=10**6) for i, route in enumerate(read.routes)
    )
    chosen: Counter[str] = Counter()
    number = 600
    for _ in range(number):
        at = router.choose(Need(700))
        assert at is not None
        chosen.update(hop.stage for hop in read.routes[at].path)
        router.routes[at].free_pages = 10**6
    alike = Counter(stage.layers for stage in plan.stages)
    for stage in plan.stages:
        assert chosen[stage.name] == pytest.approx(number / alike[stage.layers], abs=len(plan.routes) / 2)


def test_the_front_has_the_picked_plan_and_none_that_another_beats(tmp_path: Path) -> None:
    cluster = cluster_of((BIG, 1), (BIG, 1), *[(SMALL, 1)] * 4, link=LINK)
    small = cluster_of((BIG, 1), (SMALL, 1), (SMALL, 1), link=LINK)
    for task in (
        task_of(tmp_path, cluster, (3, 2), (1e5, 1e5)),
        make_task(small, MODEL, WORKLOAD, "throughput", None, 0, "heuristic", OPTIONS),
    ):
        cluster = task.cluster
        shared = best_lanes(task) if task.cost_table is not None else None
        apart = best_on_nodes(task, cluster.nodes, "throughput")
        assert apart is not None
        picked = apart.emit(task, "throughput") if shared is None else shared
        points = shown_front(task, picked)
        assert [point.picked for point in points].count(True) == 1
        rest = [point for point in points if not point.picked]
        assert len(points) > 1
        for a, b in itertools.pairwise(rest):
            assert b.predicted.tokens_s <= a.predicted.tokens_s
            assert b.predicted.tpot_s < a.predicted.tpot_s
        for point in points:
            check_plan(point.plan, cluster, MODEL)
            if point.tpot_limit_s is not None:
                assert point.predicted.tpot_s <= point.tpot_limit_s * (1 + 1e-6)


def test_limits_are_kept_at_a_lower_rate(tmp_path: Path) -> None:
    cluster = cluster_of((BIG, 1), *[(SMALL, 1)] * 2, link=LINK)
    task = task_of(tmp_path, cluster, (3, 3), (1e5, 3e3))
    free = best_lanes(task)
    assert free is not None
    assert free.predicted is not None
    quiet = min(point.pace.quiet_s for point in front(task))
    limited = dataclasses.replace(task, workload=dataclasses.replace(task.workload, slo=Slo(tpot_s=1.2 * quiet)))
    kept = best_lanes(limited, "slo")
    assert kept is not None
    assert kept.predicted is not None
    assert kept.predicted.tpot_s <= 1.2 * quiet * (1 + 1e-6)
    assert 0 < kept.predicted.tokens_s <= free.predicted.tokens_s * (1 + 1e-6)


def test_plans_with_and_without_shared_stages_are_predicted_alike(tmp_path: Path) -> None:
    """A plan of two pipelines that share nothing serves what its mirror image with crossed halves serves."""
    cluster = cluster_of(*[(BIG, 1)] * 4, link=LINK)
    task = task_of(tmp_path, cluster, (3, 3), (1e5, 1e5))
    stages = tuple(Stage(f"s{i}", (0, 3) if i < 2 else (3, 6), (f"n{i}/0",)) for i in range(4))

    def told(paths: list[tuple[int, int]]) -> Prediction:
        routes = tuple(Route((Hop(f"s{a}", (0, 3)), Hop(f"s{b}", (3, 6))), 1.0) for a, b in paths)
        plan = Plan("tiny", cluster, stages, routes, OPTIONS)
        return evaluate(plan, cluster, MODEL, WORKLOAD, cost_table=task.cost_table)

    apart, crossed = told([(0, 2), (1, 3)]), told([(0, 2), (0, 3), (1, 2), (1, 3)])
    # Crossed, twice as many routes may each hold their own most at once; links and prompts ahead are fewer a way.
    assert crossed.tokens_s >= apart.tokens_s * (1 - 1e-6)
    for prediction in (apart, crossed):
        assert len({round(stage.utilisation, 6) for stage in prediction.stages}) == 1
