"""Published and measured cost tables: read strictly, matched by name, and nothing is faster than they say."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, device_type, tiny_model

from hexgen.catalogue import DEVICE_TYPES, LINKS
from hexgen.cluster import Cluster, Link, Node, load_cluster
from hexgen.errors import InfeasibleError, SpecError
from hexgen.model import load_model
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage, parse_plan, plan_to_dict
from hexgen.scheduler import evaluate, plan
from hexgen.scheduler.cost import CostModel, GroupShape
from hexgen.scheduler.simulation import requests_of, simulate
from hexgen.scheduler.tables import CostTable, load_table
from hexgen.scheduler.tables.measured import Grid
from hexgen.scheduler.tables.source import find_type
from hexgen.scheduler.traffic import mix_of, traffic_of

ROOT = Path(__file__).parent.parent
PUBLISHED = Path(__file__).parent / "data" / "helix_single24_70b.json"  # figures of Helix's artifact (ASPLOS'25)
MODEL = load_model("llama-2-70b")
OPTIONS = EngineOptions(max_sequences=256)


def published() -> CostTable:
    return load_table(PUBLISHED)


def written(values: object, folder: Path) -> Path:
    path = folder / "table.json"
    path.write_text(json.dumps(values))
    return path


def stage_of(table: CostTable | None, device: str, width: int = 1) -> Any:
    cost = CostModel(MODEL, "float16", OPTIONS, table)
    return cost.profile(GroupShape((DEVICE_TYPES[device],) * width, LINKS["pcie4"]))


# ---- published -------------------------------------------------------------------------------------------------


def test_a_step_is_never_faster_than_published_nor_than_reading_the_weights() -> None:
    figures = json.loads(PUBLISHED.read_text())
    traffic = traffic_of(MODEL, WORKLOAD, OPTIONS)
    for name, device in (("A100", "A100-40G-SXM"), ("L4", "L4"), ("T4", "T4")):
        stage = stage_of(published(), device)
        rates = figures["types"][name]["tokens_per_s_by_layers"]
        for n in range(1, stage.most_layers + 1):
            large = traffic.prefill_load(400.0)
            assert stage.step_s(n, large, False, False) == pytest.approx(400 / rates[str(n)])
            read = n * figures["layer_bytes"] / DEVICE_TYPES[device].bandwidth_bytes_s
            one = stage.step_s(n, traffic.decode_load(1.0), False, False)
            assert one > read
            assert 1 / one < rates[str(n)]
            assert stage.flow_tokens_s(n, mix_of(traffic, 8.0, 1), 0) == rates[str(n)]
        times = stage.times(mix_of(traffic, 64.0, 4))
        busy = [times.busy_s(n, 0) for n in range(1, stage.most_layers + 1)]
        assert all(a <= b for a, b in pairwise(busy))


def test_kv_room_is_the_table_s() -> None:
    figures = json.loads(PUBLISHED.read_text())["types"]["L4"]
    stage = stage_of(published(), "L4")
    for n in range(1, 8):
        tokens = stage.kv_tokens(n, False, False)
        assert 0 <= figures["kv_token_layers_by_layers"][str(n)] / n - tokens < 16
        assert stage.max_layers(tokens, False, False) == n
        assert stage.max_layers(tokens + 16, False, False) == n - 1
    assert stage.kv_tokens(8, False, False) == 0
    assert stage_of(published(), "L4", 2).max_layers(16, False, False) == 0, "nobody measured two as one"


def test_a_plan_under_a_published_table_says_so_and_stays_below_its_bound() -> None:
    cluster = load_cluster(ROOT / "cluster_specs" / "helix-single24.yaml")
    made = plan(cluster, MODEL, cost=published())
    predicted = made.predicted
    assert predicted is not None
    assert "published table" in (predicted.source or "")
    assert predicted.upper_bound_tokens_s is not None
    assert 0 < predicted.tokens_s <= predicted.upper_bound_tokens_s
    assert cluster.workload is not None
    again = evaluate(made, cluster, MODEL, cluster.workload, cost_table=published())
    assert dataclasses.replace(again, upper_bound_tokens_s=predicted.upper_bound_tokens_s) == predicted
    assert evaluate(made, cluster, MODEL, cluster.workload).source is None
    assert parse_plan(plan_to_dict(made), "x") == made


def test_a_person_s_plan_beyond_the_table_is_refused() -> None:
    node = Node("a", DEVICE_TYPES["A100-80G-SXM"], 8, LINKS["nvlink3"], "A100")
    devices = [f"a/{i}" for i in range(8)]
    stages = tuple(Stage(f"s{i}", (10 * i, 10 * i + 10), (devices[i],)) for i in range(8))
    stages = (Stage("s0", (0, 13), ("a/0",)), Stage("s1", (13, 20), ("a/1",)), *stages[2:])
    draft = Plan(
        "m", Cluster("c", (node,), Link(1e9, 0.0)), stages, (Route(tuple(Hop(s.name, s.layers) for s in stages)),)
    )
    with pytest.raises(InfeasibleError, match="no room for keys and values beside 13 layers"):
        evaluate(draft, Cluster("c", (node,), Link(1e9, 0.0)), MODEL, WORKLOAD, cost_table=published())


def test_types_are_found_by_name() -> None:
    names = ["A100", "A100-80G", "L4", "L40-PCIe", "L40-SXM"]
    assert find_type("A100-40G-SXM", names) == "A100"
    assert find_type("A100-80G-SXM", names) == "A100-80G"
    assert find_type("L4", names) == "L4"
    assert find_type("T4", names) is None
    assert find_type("A10", names) is None
    with pytest.raises(SpecError, match="L40-PCIe, L40-SXM"):
        find_type("L40", names)


def test_a_table_of_something_else_is_refused() -> None:
    cluster = load_cluster(ROOT / "cluster_specs" / "helix-hetero42.yaml")
    with pytest.raises(SpecError, match=r"no figures for V100-16G .* it has A100, L4, T4"):
        plan(cluster, MODEL, cost=published())
    with pytest.raises(SpecError, match="80 layers, and tiny has 4"):
        plan(cluster, tiny_model(), WORKLOAD, cost=published())


BROKEN: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda t: t.pop("types"), "is not a cost table"),
    (lambda t: t.update(layrs=3), "unknown key 'layrs'.*did you mean 'layers'"),
    (lambda t: t.update(layer_bytes=-1), "layer_bytes: must be a number above 0"),
    (lambda t: t.update(types={}), "types: must be figures by device type"),
    (
        lambda t: t["types"]["L4"].pop("kv_token_layers_by_layers"),
        r"types\.L4: 'kv_token_layers_by_layers' is missing",
    ),
    (lambda t: t["types"]["L4"].update(max_layers=6), r"types\.L4: .*max_layers is 6"),
    (lambda t: t["types"]["L4"]["tokens_per_s_by_layers"].pop("3"), "none for 3 layers.*without gaps"),
    (lambda t: t["types"]["L4"]["tokens_per_s_by_layers"].update({"2": "fast"}), "must be a number"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN)
def test_a_broken_table_says_what_is_wrong(
    break_it: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    figures = json.loads(PUBLISHED.read_text())
    break_it(figures)
    path = written(figures, tmp_path)
    with pytest.raises(SpecError, match=message) as caught:
        load_table(path)
    assert str(path) in str(caught.value)


def test_scatter_is_smoothed_as_the_machine_could(tmp_path: Path) -> None:
    """Who does three layers at 3,000 tokens/s does two at least as fast."""
    figures = json.loads(PUBLISHED.read_text())
    figures["types"]["L4"]["tokens_per_s_by_layers"]["3"] = 4000.0
    stage = stage_of(load_table(written(figures, tmp_path)), "L4")
    assert [round(stage.rate_tokens_s(n)) for n in range(6)] == [0, 7558, 4000, 4000, 1476, 1018]


def test_no_table_at_all(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load_table(tmp_path / "nothing.json")


# ---- measured --------------------------------------------------------------------------------------------------

ENTRY: dict[str, Any] = {
    "device": "T4",
    "width": 1,
    "dtype": "float16",
    "layer": {"hidden_size": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate_size": 352},
    "versions": {"torch": "2.9.1"},
    "prefill": {"tokens": [16, 64], "context": [0, 100], "seconds": [[0.001, 0.002], [0.003, 0.006]]},
    "decode": {"sequences": [1, 8], "context": [10, 100], "seconds": [[0.0005, 0.0006], [0.0008, 0.0012]]},
    "step_s": 0.0001,
}
MEASURED = {"version": 1, "source": "these tests", "entries": [ENTRY]}


def test_measured_times_are_used_where_there_are_any(tmp_path: Path) -> None:
    model, engine = tiny_model(), EngineOptions(dtype="float16")
    t4, other = device_type("cuda", 50, 1.0, "T4"), device_type("cuda", 50, 1.0, "P100")
    cluster = cluster_of((t4, 1), (other, 1))
    table = load_table(written(MEASURED, tmp_path))
    cost, roofline = CostModel(model, "float16", engine, table), CostModel(model, "float16", engine)
    traffic = traffic_of(model, WORKLOAD, engine)
    ours, theirs = (c.profile(GroupShape((t4,), LINKS["none"])) for c in (cost, roofline))
    prompt, decode = traffic.prefill_load(16.0), traffic.decode_load(1.0)
    seen = prompt.attended / 16
    assert ours.layer_s(prompt) == pytest.approx(0.001 + 0.001 * seen / 100)
    at_one = 0.0005 + 0.0001 * (decode.attended - 10) / 90
    assert ours.layer_s(decode) == pytest.approx(at_one)
    assert ours.layer_s(decode.plus(prompt)) == pytest.approx(ours.layer_s(prompt) + at_one)
    assert ours.fixed_s(decode, False, False) == pytest.approx(0.0001)
    assert ours.kv_tokens(2, True, False) == theirs.kv_tokens(2, True, False)
    away = GroupShape((other,), LINKS["none"])
    assert cost.profile(away).layer_s(decode) == roofline.profile(away).layer_s(decode)
    made = plan(cluster, model, WORKLOAD, options=engine, cost=table)
    assert made.predicted is not None
    assert "measured table" in (made.predicted.source or "")


def test_the_simulator_charges_prompts_and_decodes_what_was_measured_for_each(tmp_path: Path) -> None:
    model, engine = tiny_model(), EngineOptions(dtype="float16")
    t4 = device_type("cuda", 50, 1.0, "T4")
    cluster = cluster_of((t4, 1))
    table = load_table(written(MEASURED, tmp_path))
    made = plan(cluster, model, WORKLOAD, options=engine, cost=table)
    assert made.predicted is not None
    alone = simulate(made, cluster, model, requests_of(WORKLOAD, 1), cost_table=table)
    prompt_s = 4 * (0.002 + 0.002 * 20.5 / 100)  # four layers, halfway between the table's corners
    assert prompt_s < alone.ttft_s[0] < 1.05 * prompt_s  # and little else
    # Steps of decodes are taken linear in cells of contexts, and the table begins inside the first.
    assert 24 / alone.latency_s[0] == pytest.approx(made.predicted.single_tokens_s, rel=0.02)


def test_measured_kv_room_and_the_newest_entry_count(tmp_path: Path) -> None:
    model, engine = tiny_model(), EngineOptions(dtype="float16")
    t4 = device_type("cuda", 50, 1.0, "T4")
    newer = {**ENTRY, "step_s": 0.5, "kv_token_layers_by_layers": {"1": 640, "2": 320, "3": 48}}
    table = load_table(written({"entries": [ENTRY, newer]}, tmp_path))
    stage = CostModel(model, "float16", engine, table).profile(GroupShape((t4,), LINKS["none"]))
    assert stage.fixed_s(traffic_of(model, WORKLOAD, engine).decode_load(1.0), False, False) == pytest.approx(0.5)
    assert [stage.kv_tokens(n, False, False) for n in (1, 2, 3, 4)] == [640, 160, 16, 0]
    assert [stage.max_layers(tokens, False, False) for tokens in (16, 17, 160, 640, 656)] == [3, 2, 2, 1, 0]


def test_a_measured_table_of_another_model_is_refused(tmp_path: Path) -> None:
    cluster = load_cluster(ROOT / "cluster_specs" / "helix-single24.yaml")
    with pytest.raises(SpecError, match=r"no figures for llama-2-70b on .*128 wide"):
        plan(cluster, MODEL, cost=load_table(written(MEASURED, tmp_path)))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("prefill", "tokens"), [64, 16], r"entries\[0\]\.prefill\.tokens: is not rising"),
        (("prefill", "seconds"), [[1.0, 2.0]], "needs 2 rows of 2"),
        (("decode", "seconds"), [[1.0, 0.0], [1.0, 2.0]], "must be a number above 0"),
        (("layer", "heads"), 0, "must be a whole number"),
        (("dtype",), "int3", "must be one of"),
    ],
)
def test_a_broken_measurement_says_what_is_wrong(
    path: tuple[str, ...], value: object, message: str, tmp_path: Path
) -> None:
    table = copy.deepcopy(MEASURED)
    place: Any = table["entries"][0]  # type: ignore[index]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(SpecError, match=message):
        load_table(written(table, tmp_path))


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(st.lists(st.integers(1, 50), min_size=3, max_size=3), min_size=2, max_size=4),
    at=st.floats(0, 60),
    more=st.floats(0, 30),
    seen=st.floats(0, 500),
)
def test_more_load_never_takes_less(rows: list[list[int]], at: float, more: float, seen: float) -> None:
    across = tuple(float(10 * i + 1) for i in range(len(rows)))
    columns = zip(*(sorted(row) for row in rows), strict=True)
    rising = tuple(zip(*(map(float, sorted(column)) for column in columns), strict=True))
    grid = Grid(across, (1.0, 10.0, 100.0), rising)
    assert [grid.at(a, 10.0) for a in across] == [row[1] for row in rising]
    # Beyond the last point of one axis the other's slopes may cross.
    assert grid.at(at + more, min(seen, 100.0)) >= grid.at(at, min(seen, 100.0)) * (1 - 1e-12)
    inside = min(at, across[-1])
    assert grid.at(inside, seen + more) >= grid.at(inside, seen) * (1 - 1e-12)
