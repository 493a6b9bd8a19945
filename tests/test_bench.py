"""``hexgen bench`` on the real engine: two stages of the bundled model on CPU, over HTTP and over gRPC."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, engine, served

from hexgen.cli import main
from hexgen.coordinator.admission import AdmissionLimits
from hexgen.deploy.in_process import InProcessDeployment
from hexgen.plan import dump_plan, load_plan

LOAD = "prompt=24,output=12"


@pytest.fixture(scope="module")
def deployment() -> Iterator[InProcessDeployment]:
    with engine(stages=(((0, 5), 1), ((5, 8), 2))) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def plan(deployment: InProcessDeployment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "plan.yaml"
    dump_plan(deployment.plan, path)  # type: ignore[attr-defined]
    return path


def bench(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    main_exits(0, "bench", *arguments, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def main_exits(status: int, *arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert (ended.value.code or 0) == status


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_a_closed_loop_beside_its_prediction(
    capsys: pytest.CaptureFixture[str], server: Served, plan: Path, door: str
) -> None:
    where = ("--url", server.http) if door == "http" else ("--grpc", server.grpc)
    options = ("--workload", LOAD, "--requests", 12, "--concurrency", 3, "--detailed", "--goodput", "e2el:600000")
    found = bench(capsys, *where, *options, "--against", plan)
    assert (found["completed"], found["failed"], found["model_id"]) == (12, 0, "tested")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12 * 24, 12 * 12)
    assert found["output_throughput"] == pytest.approx(144 / found["duration"])
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert 0 < found["mean_ttft_ms"] < found["mean_e2el_ms"] <= found["duration"] * 1e3
    assert all(sum(itls) < e2el for itls, e2el in zip(found["itls"], found["e2els"], strict=True))
    # Throughput, TTFT and TPOT hang together: three at a time, each as long as its parts.
    assert found["mean_e2el_ms"] == pytest.approx(found["mean_ttft_ms"] + 11 * found["mean_tpot_ms"])
    against = found["against"]
    assert [stage["stage"] for stage in against["stages"]] == ["s0", "s1"]
    assert against["steps"]["measured"] > 0  # as the head told last, ten times a second
    for stage in against["stages"]:
        measured = stage["measured_s"]
        assert stage["steps"] >= 12 * 12 / 3  # three sequences at a time: no step makes more tokens than that
        assert measured["compute"] > 0
        assert measured["host"] > 0
        assert sum(measured.values()) >= against["measured_duration"] * (1 - 1e-9)  # all of it is accounted for
        assert sum(measured.values()) < against["measured_duration"] + 3  # a rank's own time ends with the look
        assert sum(stage["predicted_s"].values()) == pytest.approx(against["simulated_duration"])
    figures = {figure["name"]: figure for figure in against["figures"]}
    assert figures["mean tpot"]["measured"] == pytest.approx(found["mean_tpot_ms"])
    assert figures["output tokens/s"]["measured"] == pytest.approx(found["output_throughput"])
    assert figures["output tokens/s"]["simulated"] > 0
    assert all(d["what"] and d["cause"] for d in against["differences"])


def test_an_open_loop_as_a_table(
    capsys: pytest.CaptureFixture[str], server: Served, plan: Path, tmp_path: Path
) -> None:
    options = ("--rate", 50, "--burstiness", 0.5, "--requests", 6, "--workload", LOAD, "-o", tmp_path / "out.json")
    main_exits(0, "bench", "--url", server.http, *options, "--against", plan)
    out = capsys.readouterr().out
    for text in (
        "50 requests/s, burstiness 0.5",
        "6 completed, 0 failed",
        "TPOT (each further token)",
        "simulated",
    ):
        assert text in out
    assert json.loads((tmp_path / "out.json").read_text())["completed"] == 6


def test_another_plan_than_the_one_that_runs_is_refused(
    capsys: pytest.CaptureFixture[str], server: Served, plan: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(plan.read_text().replace("s1", "another"))
    main_exits(2, "bench", "--url", server.http, "--workload", LOAD, "--against", other)
    assert "the server runs the stages s0, s1, the plan has another, s0" in capsys.readouterr().err


def test_a_plan_of_other_layers_than_those_that_run_is_refused(
    capsys: pytest.CaptureFixture[str], server: Served, plan: Path, tmp_path: Path
) -> None:
    made, other = load_plan(plan), tmp_path / "other.yaml"
    cut, end = made.stages[0].layers[1], made.stages[1].layers[1]
    moved = {"s0": (0, cut - 1), "s1": (cut - 1, end)}
    stages = tuple(replace(stage, layers=moved[stage.name]) for stage in made.stages)
    routes = tuple(
        replace(route, path=tuple(replace(hop, layers=moved[hop.stage]) for hop in route.path))
        for route in made.routes
    )
    dump_plan(replace(made, stages=stages, routes=routes, predicted=None), other)
    for where in (("--url", server.http), ("--grpc", server.grpc)):
        main_exits(2, "bench", *where, "--workload", LOAD, "--against", other)
        said = f"the server's stage s0 holds layers 0 to {cut}, the plan's 0 to {cut - 1}"
        assert said in capsys.readouterr().err


def test_who_lacks_the_key_is_told(capsys: pytest.CaptureFixture[str], deployment: InProcessDeployment) -> None:
    with served(deployment, api_key="sesame") as locked:
        for where in (("--url", locked.http), ("--grpc", locked.grpc)):
            main_exits(2, "bench", *where)
            assert "give its key with --api-key" in capsys.readouterr().err
            assert (
                bench(capsys, *where, "--api-key", "sesame", "--workload", LOAD, "--requests", 2)["completed"] == 2
            )


def test_refusals_are_counted(capsys: pytest.CaptureFixture[str], deployment: InProcessDeployment) -> None:
    """A queue of one: most of what comes at once is refused, and said."""
    with served(deployment, waiting=AdmissionLimits(max_waiting_requests=1)) as narrow:
        load = ("--workload", "prompt=400,output=4", "--requests", 16, "--rate", "max")
        for where in (("--url", narrow.http), ("--grpc", narrow.grpc)):
            found = bench(capsys, *where, *load)
            assert 0 < found["completed"] < 16
            assert found["completed"] + found["failed"] == 16
            assert sum(found["failures"].values()) == found["failed"]
            assert any(word in reason for reason in found["failures"] for word in ("429", "RESOURCE_EXHAUSTED"))
        narrow.wait_idle()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_encrypted(capsys: pytest.CaptureFixture[str], deployment: InProcessDeployment, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    with served(deployment, tls_cert=cert, tls_key=key) as server:
        load = ("--workload", LOAD, "--requests", 2)
        for where in (("--url", server.http), ("--grpc", server.grpc)):
            assert bench(capsys, *where, "--tls-ca", cert, *load)["completed"] == 2
        main_exits(1, "bench", "--url", server.http)
        assert "certificate" in capsys.readouterr().err.lower()


def test_metrics_tell_where_the_ranks_time_went(server: Served) -> None:
    text = httpx.get(f"{server.http}/metrics").text
    for rank in ('rank="0",stage="s0"', 'rank="1",stage="s1"'):
        assert f'hexgen_stage_compute_seconds_total{{device="cpu",{rank}}}' in text
