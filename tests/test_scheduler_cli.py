"""``hexgen plan`` as a person and as a script meets it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hexgen.cli import main
from hexgen.cli.plan_progress import progress_text, search_shown
from hexgen.cli.plan_run import PlanRequest
from hexgen.cluster import load_cluster
from hexgen.model import load_model
from hexgen.plan import load_plan, parse_plan, resolve_cluster
from hexgen.scheduler.progress import Progress
from hexgen.validate import check_plan

SPECS = Path(__file__).parent.parent / "cluster_specs"
CLUSTER = """
name: lab
nodes:
  - {name: a, device: RTX3090, count: 4, price: 1.0}
  - {name: b, device: T4, count: 2, price: 0.5}
model: llama-2-13b
workload: {prompt_tokens: 200, output_tokens: 100, rate: 1.0}
"""


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    return int(caught.value.code or 0)


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return str(path)


def test_a_table_for_people(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cluster, "--explain", "--compare") == 0
    text = capsys.readouterr().out
    for expected in ("llama-2-13b on lab", "s0", "[0, ", "predicted:", "TTFT", "bottleneck:", "stranded", "busy"):
        assert expected in text
    for baseline in ("best single node", "symmetric TP x PP", "this plan"):
        assert baseline in text


def test_the_table_says_how_far_from_the_best_possible(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cluster, "--json") == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]
    gap = 1 - predicted["tokens_s"] / predicted["upper_bound_tokens_s"]
    assert run(cluster) == 0
    text = capsys.readouterr().out
    assert f"within {gap:.1%} of the best possible" in text
    assert f"{predicted['upper_bound_tokens_s']:,.1f} tokens/s (proven)" in text


def test_an_explanation_in_json(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cluster, "--json") == 0
    assert "explain" not in json.loads(capsys.readouterr().out)
    assert run(cluster, "--json", "--explain") == 0
    value = json.loads(capsys.readouterr().out)
    said = value["explain"]
    assert [use["device"] for use in said["devices"]] == [
        d for s in value["stages"].values() for d in s["devices"]
    ]
    for use in said["devices"]:
        memory, time = use["memory"], use["time"]
        assert memory["total_bytes"] == sum(
            memory[f"{part}_bytes"] for part in ("weights", "kv", "buffers", "kept", "stranded")
        )
        assert time["busy"] == pytest.approx(time["prefill"] + time["decode"])
    assert said["value"] == pytest.approx(value["predicted"]["tokens_s"])
    assert said["bottleneck"]["text"] == value["predicted"]["bottleneck"]
    added = [change for change in said["what_if"]["changes"] if change["kind"] == "add node"]
    assert {change["price_usd_h"] for change in added} <= {1.0, 0.5}
    assert all(
        change["gain_per_usd_h"] == pytest.approx(change["gain"] / change["price_usd_h"]) for change in added
    )
    assert run(cluster, "--json", "--explain", "--what-if", "0") == 0
    assert json.loads(capsys.readouterr().out)["explain"]["what_if"] is None


def test_a_page_and_a_chart_are_written(cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, chart = tmp_path / "plan.html", tmp_path / "plan.png"
    assert run(cluster, "--html", str(page), "--plot", str(chart), "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    stages = json.loads(captured.out)["stages"]
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert all(f">{name}<" in text for name in stages)
    assert "What would change it" not in text
    assert chart.read_bytes().startswith(b"\x89PNG")
    written = tmp_path / "plan.yaml"
    assert run(cluster, "-o", str(written), "--html", str(page), "--explain", "--what-if", "0.1") == 0
    captured = capsys.readouterr()
    assert "predicted:" in captured.out
    assert f"wrote {written}" in captured.err
    assert f"wrote {page}" in captured.err
    assert "What would change it" in page.read_text()


def test_a_plan_from_an_old_one(cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.yaml"
    assert run(cluster, "-o", str(old)) == 0
    smaller = tmp_path / "smaller.yaml"
    smaller.write_text(CLUSTER.replace("  - {name: b, device: T4, count: 2, price: 0.5}\n", ""))
    assert run(str(smaller), "--from", str(old), "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert all(d.startswith("a/") for stage in value["stages"].values() for d in stage["devices"])
    assert value["replan"]["gone"] == [] or set(value["replan"]["gone"]) <= {"b/0", "b/1"}
    moved = value["replan"]["moves"]
    assert value["replan"]["loads_bytes"] == sum(move["loads_bytes"] for move in moved)
    assert run(str(smaller), "--from", str(old)) == 0
    assert "from the old plan:" in capsys.readouterr().out
    # The bound of the old file goes along through files; on more devices it says nothing.
    assert run(cluster, "--from", str(old)) == 0
    assert (
        f"no plan serves more than {load_plan(old).predicted.upper_bound_tokens_s:,.1f}" in capsys.readouterr().out
    )
    larger = tmp_path / "larger.yaml"
    larger.write_text(CLUSTER.replace("{name: b, device: T4, count: 2", "{name: b, device: T4, count: 4"))
    assert run(str(larger), "--from", str(old)) == 0
    text = capsys.readouterr().out
    assert "best possible is not known" in text
    assert "(proven)" not in text
    assert run(str(smaller), "--from", str(old), "--model", "llama-2-7b") == 2
    assert "old.yaml: is a plan of llama-2-13b" in capsys.readouterr().err


def test_progress_is_for_terminals_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with search_shown() as report:
        assert report is None  # standard error is captured here, not a terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with search_shown(wanted=False) as report:
        assert report is None
    with search_shown() as report:
        assert report is not None
        report(Progress(950.0, 1000.0, 1.0, "pricing"))
    assert capsys.readouterr().out == ""


def test_progress_in_words() -> None:
    assert progress_text(None, 1.25) == "searching: 1.2 s"
    assert progress_text(Progress(0.0, 1000.0, 1.0), 1.0) == "searching: bound 1,000, 1.0 s"
    told = progress_text(Progress(950.0, 1000.0, 1.0, "pricing"), 61.0)
    assert told == "searching: 950 tokens/s, bound 1,000, gap 5.0%, 61.0 s (pricing)"
    assert Progress(1.0, None, 1.0).gap is None
    assert Progress(5.0, 4.0, 1.0).gap == 0.0  # rounding never makes a gap negative


def test_a_published_cost_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Path(__file__).parent / "data" / "helix_single24_70b.json"
    asked = [str(SPECS / "helix-single24.yaml"), "--objective", "maxflow", "--cost", str(table)]
    assert run(*asked, "--explain", "--what-if", "0") == 0
    text = capsys.readouterr().out
    assert "figures: " in text
    assert "measured" in text  # a table does not say what a step consists of
    table = tmp_path / "table.json"
    table.write_text("{}")
    assert run(str(SPECS / "helix-single24.yaml"), "--cost", str(table)) == 2
    assert "is not a cost table" in capsys.readouterr().err


def test_unused_devices_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = "[{name: a, device: cpu, count: 1}, {name: slow, device: cpu, count: 1, memory: 6MB, speed: 0.001}]"
    (tmp_path / "c.yaml").write_text(f"name: 'a [/b] :smile:'\nnodes: {nodes}\n")
    assert run(str(tmp_path / "c.yaml")) == 0
    text = capsys.readouterr().out
    assert "1 of 2 devices unused: slow/0" in text
    assert "demo on a [/b] :smile:" in text  # as it is written, and no style


def test_json_is_one_object_and_the_plan_itself(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cluster, "--json", "--compare") == 0
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    compared = value.pop("compare")
    assert {entry["name"] for entry in compared} >= {"best single node", "symmetric TP x PP"}
    plan = parse_plan(value)
    check_plan(plan, resolve_cluster(plan), load_model(plan.model))
    assert value["predicted"]["tokens_s"] > 0


def test_the_written_plan_serves_from_anywhere(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plan.yaml"
    assert run(cluster, "-o", str(target)) == 0
    assert capsys.readouterr().out == ""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    plan = load_plan(target)
    assert plan.model == "llama-2-13b"
    assert resolve_cluster(plan, tmp_path) == load_cluster(cluster)
    check_plan(plan, resolve_cluster(plan, tmp_path), load_model(plan.model))


def test_a_model_directory_is_written_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(load_model("demo").name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "c.yaml").write_text("name: c\nnodes:\n  - {name: n, device: cpu, count: 1}\nmodel: mine\n")
    assert run(str(tmp_path / "c.yaml"), "--json") == 0
    assert Path(json.loads(capsys.readouterr().out)["model"]) == (tmp_path / "mine").resolve()


def test_the_bundled_model_is_the_last_resort(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("name: c\nnodes:\n  - {name: n, device: cpu, count: 1}\n")
    assert run(str(tmp_path / "c.yaml"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"] == "demo"


@pytest.mark.parametrize("objective", ["throughput", "latency", "cost", "maxflow"])
def test_every_objective(cluster: str, objective: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cluster, "--objective", objective, "--json") == 0
    assert json.loads(capsys.readouterr().out)["predicted"]["objective"] == objective


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "llama-2-70b"], "missing"),
        (["--model", ""], "--model: is empty"),
        (["--workload", " "], "--workload: is empty"),
        (["--objective", "slo"], "needs limits"),
        (["--time-limit", "-1"], "time limit"),
        (["--workload", "no-such-file.yaml"], "no-such-file.yaml"),
        (["-o", "/no/such/folder/plan.yaml"], "/no/such/folder"),
        (["--html", "/no/such/folder/plan.html"], "/no/such/folder/plan.html: cannot be written"),
        (["--html", "/"], "is a folder"),
        (["--plot", "/no/such/folder/plan.png"], "/no/such/folder/plan.png: cannot be written"),
        (["--plot", "plan.jpg"], "name it plan.png or plan.svg"),
        (["--cost", "no-such-table.json"], "no-such-table.json"),
        (["--from", "no-such-plan.yaml"], "no-such-plan.yaml"),
        (["--from", "no-such-plan.yaml", "--engine", "exact"], "leave out one of them"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    cluster: str, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cluster, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert "Traceback" not in captured.err


def test_no_file_is_written_over_another(cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(cluster).read_text()
    assert run(cluster, "-o", cluster) == 2
    assert "is the cluster file" in capsys.readouterr().err
    assert Path(cluster).read_text() == before
    page = str(tmp_path / "plan.html")
    assert run(cluster, "-o", page, "--html", page) == 2
    assert "one file cannot be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("beside", "shows"),
    [
        ({}, True),
        ({"output": "p.yaml"}, False),
        ({"output": "p.yaml", "html": "p.html"}, True),
        ({"output": "p.yaml", "plot": "p.svg"}, True),
        ({"output": "p.yaml", "explain": True}, True),
        ({"as_json": True, "compare": True}, False),
    ],
)
def test_tables_are_printed_unless_only_a_file_or_json_is_asked_for(beside: dict[str, Any], shows: bool) -> None:
    given = {name: Path(value) if isinstance(value, str) else value for name, value in beside.items()}
    plain = PlanRequest(
        cluster=Path("c.yaml"), model=None, workload=None, objective="throughput", time_limit_s=None,
        engine="auto", cost=None, seed=0, old=None, output=None, as_json=False, explain=False, what_if_s=0.0,
        compare=False, html=None, plot=None,
    )  # fmt: skip
    assert dataclasses.replace(plain, **given).shows is shows


def test_a_missing_cluster_file_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("no-such-cluster.yaml") == 2
    assert "no-such-cluster.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "single", "mixed", "hexgen-asym-example8"])
def test_the_shipped_clusters_are_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(SPECS / f"{name}.yaml"), "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["predicted"]["tokens_s"] > 0
