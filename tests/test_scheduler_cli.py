"""``hexgen plan`` as a person and as a script meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hexgen.cli import main
from hexgen.cluster import load_cluster
from hexgen.model import load_model
from hexgen.plan import load_plan, parse_plan, resolve_cluster
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


def test_unused_devices_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = "[{name: a, device: cpu, count: 1}, {name: slow, device: cpu, count: 1, memory: 6MB, speed: 0.001}]"
    (tmp_path / "c.yaml").write_text(f"nodes: {nodes}\n")
    assert run(str(tmp_path / "c.yaml")) == 0
    assert "1 of 2 devices unused: slow/0" in capsys.readouterr().out


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
        (["--objective", "slo"], "needs limits"),
        (["--engine", "genetic"], "use --engine auto"),
        (["--time-limit", "-1"], "time limit"),
        (["--workload", "no-such-file.yaml"], "no-such-file.yaml"),
        (["-o", "/no/such/folder/plan.yaml"], "/no/such/folder"),
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


def test_a_missing_cluster_file_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("no-such-cluster.yaml") == 2
    assert "no-such-cluster.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "single", "mixed", "hexgen-asym-example8"])
def test_the_shipped_clusters_are_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(SPECS / f"{name}.yaml"), "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["predicted"]["tokens_s"] > 0
