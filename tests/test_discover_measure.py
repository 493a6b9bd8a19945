"""What discovery measures: the clock, an edge of the engine, a model's layers; and the planner's use of it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import RayCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, tiny_model

from hexgen.catalogue import DEVICE_TYPES, LINKS
from hexgen.cluster import Cluster, Link, Node, load_cluster
from hexgen.discover import calibrate as calibration
from hexgen.discover import loops, timing, wires
from hexgen.discover.points import decode_load, prefill_load, step_of
from hexgen.discover.table import Timed, table_text
from hexgen.discover.timing import Others, Stopwatch, least_quarter
from hexgen.errors import SpecError
from hexgen.model import ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler import plan
from hexgen.scheduler.cost import CostModel, GroupShape
from hexgen.scheduler.tables import load_table, table_for
from hexgen.scheduler.traffic import traffic_of

CPU = DEVICE_TYPES["cpu"]
OPTIONS = EngineOptions()


# ---- the clock -------------------------------------------------------------------------------------------------


class FakeClocks:
    """Each call of `work` takes ``cpu_s`` of the processor and ``wall_s`` on the wall."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpu_s: float, wall_s: float) -> None:
        self.cpu = self.wall = 0.0
        self._step = cpu_s, wall_s
        monkeypatch.setattr(timing.time, "thread_time", lambda: self.cpu)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.wall)

    def work(self) -> None:
        self.cpu += self._step[0]
        self.wall += self._step[1]


def test_other_programs_do_not_count_and_quotas_do(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = FakeClocks(monkeypatch, cpu_s=0.01, wall_s=0.08)
    watch = Stopwatch(share=0.5)
    assert watch.seconds(clocks.work, 1.0) == pytest.approx(0.02)
    assert watch.disturbance == pytest.approx(4.0)
    assert Stopwatch(threads=2).seconds(clocks.work, 1.0) == pytest.approx(0.08)


def test_parts_are_timed_in_turn_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = FakeClocks(monkeypatch, cpu_s=0.01, wall_s=0.02)
    order: list[str] = []

    def longer() -> None:
        order.append("longer")
        clocks.work()
        clocks.work()

    def shorter() -> None:
        order.append("shorter")
        clocks.work()

    assert Stopwatch(share=0.5).parts([longer, shorter], 0.3) == pytest.approx([0.04, 0.02])
    assert order == ["longer", "shorter"] * (len(order) // 2)
    assert len(order) > 6
    order.clear()
    monkeypatch.setattr(timing, "LONG_S", 0.05)
    assert Stopwatch(share=0.5).parts([longer, shorter], 0.05) == pytest.approx([0.04, 0.02])
    assert order == ["longer", "shorter"]  # so long that once is enough


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1))
def test_the_least_quarter(times: list[float]) -> None:
    found = least_quarter(times)
    assert sum(time < found for time in times) <= len(times) / 4
    assert sum(time <= found for time in times) > len(times) / 4


def test_what_others_do_on_this_machine_is_counted() -> None:
    with Others() as others:
        program = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
        try:
            time.sleep(0.5)
        finally:
            program.kill()
            program.wait()
    assert others.cores > 0.1  # one that wants a whole core, however busy the machine is
    with Others() as rest:
        own_s, began = time.process_time(), time.perf_counter()
        while time.process_time() < own_s + 0.3:
            pass
        own = 0.3 / (time.perf_counter() - began)
    assert rest.cores < (os.cpu_count() or 1) - own + 0.2  # our own work is not others'


# ---- an edge ---------------------------------------------------------------------------------------------------


def test_an_edge_to_oneself_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wires, "MOST_PINGS", 20)
    monkeypatch.setattr(wires, "STREAM_S", 0.02)
    assert 1e-6 < wires.hop_s("127.0.0.1") < 1.0


# ---- loads -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(2, 600), st.integers(1, 1000), st.integers(600, 4000))
def test_a_prompt_s_load_is_what_it_says(tokens: int, seen: int, most: int) -> None:
    load = prefill_load(tokens, seen, most)
    assert load.tokens == tokens
    assert all(start + length <= most for start, length in load.runs)
    mean = load.attended / tokens
    if 2 * seen < tokens:
        assert mean <= seen + 0.5 + 1e-9  # whole prompts of 2 x seen, and a shorter rest
        assert mean >= seen / 2
    elif seen <= most - tokens:
        assert abs(mean - max(seen, (tokens + 1) / 2)) <= 0.51


def test_a_decode_s_load_and_its_pages() -> None:
    load = decode_load(3, 40)
    assert (load.tokens, load.attended) == (3, 120)
    first, again = step_of(load, 5, 100, 8, 16, True)
    assert [(a.sequence, a.pages) for a in first.admitted] == [
        (100, (0, 1, 2)), (101, (3, 4, 5)), (102, (6, 7, 0)),
    ]  # fmt: skip
    assert [s.start for s in again.segments] == [39, 39, 39]
    assert all(s.sample for s in again.segments)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=4))
def test_smoothed_times_never_fall_and_are_never_raised(rows: list[list[int]]) -> None:
    found = calibration.smoothed(rows)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            beyond = [rows[a][b] for a in range(i, len(rows)) for b in range(j, 3)]
            assert found[i][j] == min(beyond) <= value


# ---- a model's layers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return replace(tiny_model(), max_context=300)


@pytest.fixture(scope="module")
def timed(model: ModelSpec) -> Iterator[Timed]:
    """Really timed, as briefly as it goes: one repeat a point."""
    patch = pytest.MonkeyPatch()
    patch.setattr(calibration, "WINDOW_S", 0.0)
    patch.setattr(calibration, "DECODE_SEQUENCES", (1, 4))
    patch.setattr(calibration, "PREFILL_TOKENS", (16, 64))
    patch.setattr(calibration, "LOOP_SEQUENCES", (1, 4))
    patch.setattr(loops, "WARM_UP_S", 0.02)
    patch.setattr(loops, "WINDOW_S", 0.1)
    yield Timed(CPU, "here", calibration.calibrate(model, "float32", "cpu", 1, 60.0))
    patch.undo()


def cluster_of(*devices: tuple[str, float], table: Path | None = None) -> Cluster:
    nodes = []
    for i, (name, speed) in enumerate(devices):
        device = replace(
            CPU, name=name, bandwidth_bytes_s=CPU.bandwidth_bytes_s * speed, fp32_flops=CPU.fp32_flops * speed
        )
        nodes.append(Node(f"n{i}", device, 1, LINKS["shm"], name))
    return Cluster("c", tuple(nodes), Link(1e9, 1e-3), cost_table=None if table is None else str(table))


@pytest.fixture
def table_file(timed: Timed, model: ModelSpec, tmp_path: Path) -> Path:
    path = tmp_path / "measured.yaml"
    path.write_text(table_text(model, "float32", [timed], [30e-6, 50e-6, 90e-6], "tiny"))
    return path


def test_the_table_holds_what_was_timed_and_the_planner_takes_it(
    timed: Timed, table_file: Path, model: ModelSpec
) -> None:
    found = timed.calibration
    assert found.contexts == (16, 128, 299)
    assert [len(row) for row in (*found.prefill, *found.decode)] == [3] * 4
    assert all(value > 0 for row in (*found.prefill, *found.decode) for value in row)
    table = load_table(table_file)
    cost = CostModel(model, "float32", OPTIONS, table)
    stage = cost.profile(GroupShape((CPU,), LINKS["shm"]))
    load = replace(traffic_of(model, WORKLOAD, OPTIONS).decode_load(4.0), attended=4 * 128.0)
    assert stage.layer_s(load) == pytest.approx(found.decode[1][1], rel=0.01)
    assert found.loops is not None
    batching_s, passing_s = found.loops.batching[1], found.loops.passing[1]
    middle = stage.fixed_s(load, False, False)
    assert middle == pytest.approx(found.step[1] + passing_s, rel=0.01)
    assert stage.fixed_s(load, False, True) - middle == pytest.approx(found.sample[1], rel=0.02)
    first = stage.fixed_s(load, True, False)
    assert first - middle == pytest.approx(batching_s + found.embed[0], rel=0.02)
    alone = stage.fixed_s(load, True, True)  # nobody to take from and to pass on to
    assert alone == pytest.approx(found.step[1] + batching_s + found.embed[0] + found.sample[1], rel=0.02)
    edge = cost.edge(stage, stage, Link(1e8, 2e-3))
    assert edge.delay_s == pytest.approx(2e-3 + 50e-6)
    assert edge.token_s == pytest.approx(4 * model.hidden_size / 1e8)


def test_the_engine_s_loop_costs_something_and_more_for_more_sequences(timed: Timed) -> None:
    """More answers take longer; a step from another stage is received, read and answered: 10 us at the least."""
    found = timed.calibration.loops
    assert found is not None
    assert found.sequences == (1, 4)
    assert 10e-6 < found.batching[0] <= found.batching[1] < 0.1
    assert 10e-6 < found.passing[0] <= found.passing[1] < 0.1


def test_half_the_speed_takes_twice_as_long(table_file: Path, model: ModelSpec) -> None:
    cost = CostModel(model, "float32", OPTIONS, load_table(table_file))
    load = traffic_of(model, WORKLOAD, OPTIONS).decode_load(2.0)
    full, half = (
        cost.profile(GroupShape((node.device,), LINKS["shm"]))
        for node in cluster_of(("cpu", 1.0), ("cpu", 0.5)).nodes
    )
    assert half.layer_s(load) == pytest.approx(2 * full.layer_s(load))
    assert half.software_s(load) == pytest.approx(2 * full.software_s(load))  # type: ignore[attr-defined]


def test_groups_that_nobody_timed_are_corrected_by_what_was(table_file: Path, model: ModelSpec) -> None:
    """On one device the correction gives the measured time itself; a pair lies between half of it and more."""
    table = load_table(table_file)
    cost, roofline = CostModel(model, "float32", OPTIONS, table), CostModel(model, "float32", OPTIONS)
    load = traffic_of(model, WORKLOAD, OPTIONS).decode_load(4.0)
    single, pair = GroupShape((CPU,), LINKS["shm"]), GroupShape((CPU, CPU), LINKS["shm"])
    ratio = cost.profile(single).layer_s(load) / roofline.profile(single).layer_s(load)
    exchanged = 2 * roofline.profile(pair).all_reduce_s(load.tokens)
    expected = exchanged + (roofline.profile(pair).layer_s(load) - exchanged) * ratio
    assert cost.profile(pair).layer_s(load) == pytest.approx(expected)
    unlike = GroupShape((CPU, replace(CPU, name="gpu-x", kind="cuda")), LINKS["shm"])
    assert cost.profile(unlike).layer_s(load) > 0


def test_a_table_that_does_not_fit(table_file: Path, model: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    cluster = cluster_of(("cpu", 1.0), ("T4", 1.0))
    with caplog.at_level(logging.WARNING, "hexgen.scheduler"):
        plan(cluster, model, WORKLOAD, cost=load_table(table_file))
    assert caplog.messages == [f"{table_file}: no figures for T4: the catalogue's are taken there"]
    with pytest.raises(SpecError, match="in float32, and the plan computes in bfloat16"):
        plan(cluster, model, WORKLOAD, cost=load_table(table_file), options=EngineOptions(dtype="bfloat16"))


def test_the_cluster_names_its_table(table_file: Path, model: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    file = table_file.parent / "cluster.yaml"
    file.write_text("nodes: [{name: a, device: cpu}]\ncost_table: measured.yaml\n")
    cluster = load_cluster(file)
    assert cluster.cost_table == str(table_file)
    assert table_for(None, cluster, model) == load_table(table_file)
    with caplog.at_level(logging.WARNING, "hexgen.scheduler"):
        assert table_for(None, cluster, replace(model, hidden_size=256)) is None
        table_file.unlink()
        assert table_for(None, cluster, model) is None
    assert "planned with the catalogue's figures" in caplog.messages[0]
    assert "has no figures for" in caplog.messages[0]
    assert "cannot be read" in caplog.messages[1]


def test_the_newest_torch_is_said_to_differ(
    table_file: Path, model: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    import re

    table_file.write_text(re.sub(r"torch: [^,}]*", "torch: 0.0.1", table_file.read_text()))
    with caplog.at_level(logging.WARNING, "hexgen.scheduler"):
        load_table(table_file).check(model, cluster_of(("cpu", 1.0)).nodes)
    assert "measured with torch 0.0.1" in caplog.text


# ---- on Ray ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_ray_nodes_one_of_which_dies(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from hexgen.discover import describe
    from hexgen.discover import survey as surveying

    for name, value in ray_cluster.environment.items():
        monkeypatch.setenv(name, value)
    with surveying.surveyed(ray_cluster.address, lambda *_: None) as surveyor:
        assert [node.name for node in surveyor.nodes] == ["big", "mid", "small"]
        ray.kill(surveyor.asker._probes["mid"], no_restart=True)  # type: ignore[attr-defined]
        found = surveying.survey(surveyor, threads=1)
    assert [node.name for node in found.nodes] == ["big", "small"]
    assert len(found.left_out) == 1
    assert "mid is left out" in found.left_out[0]
    cluster = describe.described("ray", found, 1).cluster
    assert [(node.name, node.count) for node in cluster.nodes] == [("big", 3), ("small", 1)]
    link = cluster.link("big", "small")
    assert link.bandwidth_bytes_s > 1e6
    assert link.latency_s < 0.1


@pytest.mark.slow
def test_the_command_measures_and_plans_with_what_it_measured(
    hexgen_command: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    done = hexgen_command(
        "discover", "-o", tmp_path / "c.yaml", "--model", "demo", "--cpu-threads", 1, timeout_s=280
    )
    assert done.returncode == 0, done.stderr
    shown = hexgen_command("plan", tmp_path / "c.yaml", "--model", "demo", timeout_s=200)
    assert shown.returncode == 0, shown.stderr
    assert "measured table measured.yaml" in " ".join(shown.stdout.split())
