"""The largest rate within limits, and ``hexgen simulate`` as a person and as a script meets it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from test_simulation_run import MODEL, fixed, gpus, row

from hexgen.cli import main
from hexgen.errors import SpecError
from hexgen.plan import EngineOptions, dump_plan
from hexgen.scheduler.simulation import attainment_curve, carries, largest_rate, requests_of, simulate
from hexgen.workload import Lengths, Slo, Workload

CLUSTER = gpus(2)
PLAN = row(2, ["n0/0", "n1/0"])
WORKLOAD = Workload(Lengths(60, max=200), Lengths(40, max=120), rate=1.0)


def test_the_largest_rate_keeps_the_limits_and_a_larger_one_does_not() -> None:
    requests = requests_of(WORKLOAD, 600)
    alone = simulate(PLAN, CLUSTER, MODEL, fixed(60, 40, 1))
    slo = Slo(ttft_s=4 * float(alone.ttft_s[0]), tpot_s=2 * float(alone.tpot_s[0]))
    found = largest_rate(PLAN, CLUSTER, MODEL, requests, slo, attainment=0.95)
    below, above = attainment_curve(PLAN, CLUSTER, MODEL, requests, slo, [found, 1.05 * found])
    assert below.attainment >= 0.95 > above.attainment
    assert above.rate == pytest.approx(1.05 * found)
    # Another start finds the same.
    again = largest_rate(PLAN, CLUSTER, MODEL, requests, slo, attainment=0.95, start=1000.0)
    assert again == pytest.approx(found, rel=0.05)


def test_looser_limits_carry_more() -> None:
    requests = requests_of(WORKLOAD, 400)
    longest_s = float(simulate(PLAN, CLUSTER, MODEL, fixed(200, 120, 1)).latency_s[0])
    limits = [Slo(latency_s=times * longest_s) for times in (1.1, 1.6, 3.0)]
    rates = [largest_rate(PLAN, CLUSTER, MODEL, requests, limit, start=30.0) for limit in limits]
    assert 0 < rates[0] < rates[1] < rates[2]


def test_one_at_a_time_carries_what_the_queue_allows() -> None:
    """M/D/1 with a limit of one service time on the whole: whoever waits is late. P(no wait) = 1 - load."""
    made = row(1, ["n0/0"], EngineOptions(token_budget=128, max_sequences=1))
    service_s = float(simulate(made, CLUSTER, MODEL, fixed(100, 1, 1)).latency_s[0])
    requests = requests_of(Workload(Lengths(100), Lengths(1), rate=1.0), 5000)
    limit = Slo(latency_s=service_s * 1.0000001)
    found = largest_rate(made, CLUSTER, MODEL, requests, limit, attainment=0.9, start=0.2 / service_s)
    assert found * service_s == pytest.approx(0.1, rel=0.15)


def test_a_deadline_ends_the_search_for_a_rate() -> None:
    requests, slo = requests_of(WORKLOAD, 600), Slo(ttft_s=10.0)
    past = time.monotonic() - 1
    assert largest_rate(PLAN, CLUSTER, MODEL, requests, slo, deadline=past) == 0.0
    assert not carries(PLAN, CLUSTER, MODEL, requests, slo, 1.0, deadline=past)
    assert carries(PLAN, CLUSTER, MODEL, requests, slo, 1.0, deadline=past + 3600)


def test_limits_that_nothing_keeps() -> None:
    requests = requests_of(WORKLOAD, 200)
    assert largest_rate(PLAN, CLUSTER, MODEL, requests, Slo(ttft_s=1e-9)) == 0.0
    with pytest.raises(SpecError, match="no limits"):
        largest_rate(PLAN, CLUSTER, MODEL, requests, Slo())
    with pytest.raises(SpecError, match="at least 113"):
        largest_rate(PLAN, CLUSTER, MODEL, requests_of(WORKLOAD, 50), Slo(ttft_s=1.0))


# ---- the command -----------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["simulate", *arguments])
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    tmp_path = tmp_path_factory.mktemp("simulated")
    cluster = tmp_path / "lab.yaml"
    cluster.write_text(
        "name: lab\nnodes:\n  - {name: a, device: RTX3090, count: 4}\nmodel: llama-2-13b\n"
        "workload: {prompt_tokens: 200, output_tokens: 100, rate: 1.0, slo: {ttft: 2s, tpot: 100ms}}\n"
    )
    with pytest.raises(SystemExit):
        main(["plan", str(cluster), "-o", str(tmp_path / "plan.yaml")])
    return str(tmp_path / "plan.yaml")


def test_json_is_one_object(plan_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(plan_file, "--json", "--requests", "50", "--slo-attainment", "0.9") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    value = json.loads(out)
    assert value["completed"] == 50
    assert value["mean_ttft_ms"] <= value["mean_e2el_ms"]
    assert value["p50_tpot_ms"] <= value["p99_tpot_ms"]
    assert value["largest_rate"] > 0
    assert sum(route["requests"] for route in value["routes"]) == 50
    assert value["predicted"]["output_throughput"] > 0


def test_a_clock_that_stops_before_anything_ends_says_so(
    plan_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(plan_file, "--rate", "4", "--requests", "20", "--until", "0.001") == 0
    told = capsys.readouterr()
    assert "0 finished" in told.out
    assert "nan" not in told.out
    assert "0 s" not in told.out.split("ITL")[1].splitlines()[0]
    assert "note: no request ended from 0 s to 1 ms, so there are no times" in told.err
    assert "--until" in told.err
    assert run(plan_file, "--rate", "4", "--requests", "20", "--until", "0.001", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["mean_itl_ms"] is value["routes"][0]["kv_used_mean"] is None


def test_a_table_for_people(plan_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(plan_file, "--workload", "prompt=100,output=20,rate=max") == 0
    text = capsys.readouterr().out
    for expected in ("output tokens/s", "TTFT", "TPOT", "ITL", "E2EL", "s0", "KV used", "busy"):
        assert expected in text


def test_a_trace_and_a_closed_loop(plan_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp,prompt_tokens,output_tokens\n0,10,5\n1,20,5\n2,30,5\n")
    capsys.readouterr()
    assert run(plan_file, "--trace", str(trace), "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["completed"] == 3
    assert value["workload"]["prompt_tokens"]["mean"] == 20  # the trace's own, and so in what is predicted
    assert value["workload"]["rate"] == 1.0
    dated = tmp_path / "dated.csv"
    dated.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    assert run(plan_file, "--trace", str(dated), "--json") == 0
    assert json.loads(capsys.readouterr().out)["completed"] == 1
    assert run(plan_file, "--concurrency", "2", "--requests", "20", "--json") == 0
    assert json.loads(capsys.readouterr().out)["routes"][0]["running_mean"] <= 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--requests", "0"], "--requests"),
        (["--rate", "fast"], "--rate"),
        (["--rate", "-1"], "--rate"),
        (["--rate", "2", "--concurrency", "2"], "not both"),
        (["--burstiness", "0"], "burstiness"),
        (["--slo-attainment", "2"], "--slo-attainment"),
        (["--trace", "no-such.csv"], "no-such.csv"),
        (["--workload", "prompt=1e9"], "workload"),
        (["--workload", "prompt=10,output=10,rate=2", "--slo-attainment", "0.9"], "no limits"),
        (["--warmup", "5", "--until", "5"], "until"),
        (["--cost", "no-such.json"], "no-such.json"),
        (["--workload", ""], "--workload: is empty"),
        (["--workload", "prompt=4000,output=200"], "a mean request has 4200 tokens"),
    ],
)
def test_bad_input_is_one_line(
    plan_file: str, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(plan_file, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert complaint in error


def test_a_plan_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "missing.yaml")) == 2
    assert "missing.yaml" in capsys.readouterr().err
    broken = PLAN
    dump_plan(broken, tmp_path / "broken.yaml")
    assert run(str(tmp_path / "broken.yaml")) == 2
