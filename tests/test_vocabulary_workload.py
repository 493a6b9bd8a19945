"""Workloads: files, traces and short text on the command line."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from vocabulary_strategies import workloads

from hexgen.errors import SpecError
from hexgen.workload import Lengths, Slo, Workload, load_workload, parse_workload, workload_to_dict
from hexgen.yamlfile import parse_yaml, write_yaml


@settings(deadline=None, max_examples=60)
@given(workloads)
def test_round_trips_are_exact(workload: Workload) -> None:
    assert parse_workload(workload_to_dict(workload)) == workload
    assert parse_workload(parse_yaml(write_yaml(workload_to_dict(workload)), "x")) == workload


def test_defaults() -> None:
    assert parse_workload({}) == Workload()
    assert parse_workload({"prompt_tokens": 5}).output_tokens == Workload().output_tokens


def test_short_text() -> None:
    assert load_workload("prompt=763, output=232.5,rate=2.5,ttft=2s") == Workload(
        Lengths(763.0), Lengths(232.5), 2.5, Slo(ttft_s=2.0)
    )
    assert load_workload("{prompt_tokens: {mean: 4, p99: 9}, rate: max}").prompt_tokens == Lengths(4.0, 9.0)
    for wrong in ("prompt=x", "prompt=", "promt=3", "rate=1,rate=2", "nothing.yaml", "", "{", "x" * 10_000):
        with pytest.raises(SpecError, match="workload"):
            load_workload(wrong)


@pytest.mark.parametrize(
    "header",
    [
        "TIMESTAMP,ContextTokens,GeneratedTokens\n",
        "t_s,input_length,output_length\n",
        "arrived at,Request tokens,Response tokens\n",
        "timestamp,prompt_tokens,output_tokens\n",
        "",
    ],
)
def test_traces(tmp_path: Path, header: str) -> None:
    rows = "".join(f"{i * 0.5},{i + 1},{2 * (i + 1)}\n" for i in range(100))
    (tmp_path / "trace.csv").write_text(header + rows)
    workload = load_workload(tmp_path / "trace.csv")
    assert workload.prompt_tokens == Lengths(50.5, 99.0, 100, str(tmp_path / "trace.csv"))
    assert workload.output_tokens.mean == 101.0
    if "t_s" not in header:
        assert workload.rate == pytest.approx(2.0)
    inside = parse_workload({"prompt_tokens": {"trace": "trace.csv"}}, "w", tmp_path)
    assert inside.prompt_tokens == Lengths(50.5, 99.0, 100, "trace.csv")
    # Once read, the figures stay with the workload: it can be written elsewhere and read without the trace.
    assert parse_workload(workload_to_dict(inside)) == inside


def test_milliseconds(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("emission_time_ms,input_length,output_length\n0,1,1\n500,1,0\n1000,3,3\n")
    workload = load_workload(tmp_path / "t.csv")
    assert workload.rate == 2.0
    assert workload.output_tokens.mean == 2.0  # a request without output tells nothing about lengths


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("a,b\n", "no rows"),
        ("id,prompt_chars,output_tokens\n1,2,3\n", "none of the columns"),
        ("prompt_tokens,output_tokens\n1,x\n", "line 2: outputtokens is 'x'"),
        ("prompt_tokens,output_tokens\n1,2\n1\n", "line 3 has 1 cells"),
        ("prompt_tokens,output_tokens\n1,nan\n", "not a number"),
        ("prompt_tokens,output_tokens\n1,2\n-1,2\n", "line 3: prompttokens is '-1', less than nothing"),
        ("prompt_tokens,output_tokens\n0,0\n", "token counts"),
        ("prompt_tokens,output_tokens\n1e12,1\n", "line 2: prompttokens is '1e12', more than"),
    ],
)
def test_broken_traces(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(content)
    with pytest.raises(SpecError, match=r"trace\.csv") as caught:
        load_workload(path)
    assert message in str(caught.value)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("workload: {prompt_tokens: 9, rate: 1}")
    (tmp_path / "bare.yaml").write_text("{prompt_tokens: 9, rate: 1}")
    assert load_workload(tmp_path / "w.yaml") == load_workload("bare.yaml", tmp_path)
    (tmp_path / "bad.yaml").write_text("workload: {rate: 1, prompts: 3}")
    with pytest.raises(SpecError, match=r"bad\.yaml: workload: unknown key 'prompts'"):
        load_workload(tmp_path / "bad.yaml")
