"""Bad input on the command line: one line on stderr, the right exit status, no traceback, nothing started."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import yaml

from hexgen.cli import main

NODES = [{"name": "a", "device": "cpu", "count": 2, "memory": "1GB"}, {"name": "b", "device": "cpu", "count": 1}]


def plan_of(model: Path | str, **changes: object) -> dict[str, object]:
    return {
        "version": 1,
        "model": str(model),
        "cluster": {"name": "c", "nodes": NODES},
        "stages": {"s0": {"layers": [0, 2], "devices": ["a/0"]}, "s1": {"layers": [2, 4], "devices": ["b/0"]}},
        "routes": [{"path": ["s0", "s1"]}],
    } | changes


def stages(*entries: tuple[list[int], list[str]]) -> dict[str, object]:
    return {f"s{i}": {"layers": layers, "devices": devices} for i, (layers, devices) in enumerate(entries)}


def refused(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """The error line of a command that must fail with ``status`` before anything starts."""
    ray_was_there = "ray" in sys.modules
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == status
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert ray_was_there or "ray" not in sys.modules
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": stages(([0, 2], ["z/0"]), ([2, 4], ["b/0"]))}, "z"),
        ({"stages": stages(([0, 2], ["a/7"]), ([2, 4], ["b/0"]))}, "a/7"),
        ({"stages": stages(([0, 2], ["a/0"]), ([2, 4], ["a/0"]))}, "a/0"),
        ({"stages": stages(([0, 1], ["a/0"]), ([2, 4], ["b/0"]))}, "layer"),
        ({"stages": stages(([0, 3], ["a/0"]), ([2, 4], ["b/0"]))}, "layer"),
        ({"stages": stages(([0, 2], ["a/0"]), ([2, 9], ["b/0"]))}, "layer"),
        ({"routes": []}, "routes"),
        ({"colour": "red"}, "colour"),
        ({"version": 7}, "version 7"),
        ({"cluster": "nowhere.yaml"}, "nowhere.yaml"),
        ({"cluster": {"nodes": [{"name": "a", "device": "abacus", "count": 1}]}}, "abacus"),
        (
            {"cluster": {"nodes": [*NODES[1:], {"name": "a", "device": "cpu", "count": 1, "memory": "1KB"}]}},
            "a/0",
        ),
    ],
)
def test_bad_plans(
    capsys: pytest.CaptureFixture[str],
    tiny_llama: Path,
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan_of(tiny_llama, **changes)))
    for command in (["serve"], ["generate", "--prompt-ids", "1,2"]):
        line = refused(capsys, 2, command[0], path, *command[1:])
        assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [("version: [1", "plan.yaml"), ("- 1\n- 2\n", "plan.yaml"), ("", "plan.yaml"), ("a: 1\na: 2\n", "a")],
)
def test_malformed_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    assert message in refused(capsys, 2, "serve", path)


def test_no_such_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "nothing.yaml" in refused(capsys, 2, "serve", tmp_path / "nothing.yaml")


def test_models_that_cannot_be_run(capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan_of(tiny_llama)))
    assert "no weights" in refused(capsys, 2, "serve", path, "--model", "llama-2-7b")
    assert "nobody" in refused(capsys, 2, "serve", path, "--model", "nobody")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(tiny_llama / "config.json", empty)
    assert "safetensors" in refused(capsys, 2, "serve", path, "--model", empty)
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert "config.json" in refused(capsys, 2, "serve", path, "--model", odd)


def test_ports_that_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in refused(capsys, 1, "serve", "--port", port)
        assert f"port {port}" in refused(capsys, 1, "serve", "--port", 0, "--grpc-port", port)
    assert "share" in refused(capsys, 2, "serve", "--port", 7001, "--grpc-port", 7001)


def test_addresses_that_are_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--host" in refused(capsys, 2, "serve", "--host", "no.such.host.invalid", "--port", 0)


def test_half_of_tls_and_an_empty_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "both" in refused(capsys, 2, "serve", "--tls-cert", tmp_path / "a.pem")
    missing = ["--tls-cert", tmp_path / "a.pem", "--tls-key", tmp_path / "b.pem"]
    assert "a.pem" in refused(capsys, 2, "serve", *missing)
    assert "--api-key" in refused(capsys, 2, "serve", "--api-key", "", "--port", 0, "--grpc-port", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt"),
        (["--prompt-ids", "1,x"], "1,x"),
        (["--prompt-ids", ""], "empty"),
        (["--prompt", ""], "empty"),
        (["--prompt-file", "no-such-file"], "no-such-file"),
        (["--prompt-ids", "1", "--max-tokens", "0"], "max_tokens"),
        (["--prompt-ids", "1", "--temperature", "-1"], "temperature"),
        (["--prompt-ids", "1", "--top-p", "1.5"], "top_p"),
        (["--prompt-ids", "1", "--top-k", "-7"], "top_k"),
        (["--prompt-ids", "1", "--seed", "-1"], "seed"),
    ],
)
def test_bad_requests(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, 2, "generate", *arguments)


def test_text_for_a_checkpoint_without_a_tokenizer(capsys: pytest.CaptureFixture[str], tiny_llama: Path) -> None:
    line = refused(capsys, 2, "generate", "--model", tiny_llama, "--prompt", "hello")
    assert "--prompt-ids" in line


@pytest.mark.parametrize(
    ("ids", "message"), [("7,999999", "999999 is not a token id"), (",".join(["5"] * 600), "600 tokens")]
)
def test_prompts_that_can_never_run(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path, ids: str, message: str
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan_of(tiny_llama, engine={"max_context": 64})))
    assert message in refused(capsys, 2, "generate", path, "--prompt-ids", ids)


def test_a_ray_client_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Ray client" in refused(capsys, 1, "generate", "--prompt", "x", "--ray-address", "ray://host:10001")


def test_help_lists_the_commands_without_heavy_imports(capsys: pytest.CaptureFixture[str]) -> None:
    import subprocess

    code = (
        "import sys\nfrom hexgen.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert not {'torch', 'ray', 'transformers', 'grpc', 'fastapi'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("plan", "serve", "generate", "discover"):
        assert command in done.stdout
