"""Signals, progress and processes: what the running commands share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from hexgen.cli._common import StopSignals, shown_progress
from hexgen.cli.generate import _prompts
from hexgen.deploy.ray_deployment import StageProgress
from hexgen.deploy.ray_processes import Process, children_about, descendants, end_processes, identify


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # until the interpreter has called the handler


def test_the_first_signal_interrupts_and_the_next_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals():
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGINT)
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.splitlines() == ["stopping ...", "still stopping ...", "still stopping ..."]


def test_sigterm_is_exit_status_143() -> None:
    with StopSignals(), pytest.raises(SystemExit) as caught:
        send(signal.SIGTERM)
    assert caught.value.code == 143


def import_that_hides_an_interrupt() -> None:
    try:
        send(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ImportError("could not import") from error


def test_an_interrupt_that_a_library_took_for_its_own_failure() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals():
        import_that_hides_an_interrupt()


def test_rays_own_handler_gives_the_same_status() -> None:
    with pytest.raises(SystemExit) as caught, StopSignals():
        sys.exit(signal.SIGTERM)
    assert caught.value.code == 143


def test_a_running_server_is_told_instead() -> None:
    told: list[str] = []
    with StopSignals() as signals:
        signals.on_stop = lambda: told.append("stop")
        send(signal.SIGTERM)
        send(signal.SIGTERM)
    assert told == ["stop"]


def test_nothing_interrupts_the_clean_up() -> None:
    with StopSignals() as signals:
        signals.shield()
        send(signal.SIGINT)


def test_progress_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress() as show:
        assert show is not None
        for done in (0, 5_000_000, 10_000_000, 10_000_000):
            show([StageProgress("s0", done, 10_000_000), StageProgress("s1", 0, 0)])
    captured = capsys.readouterr()
    assert captured.err == "loading s0: 10 MB of 10 MB\n"
    assert captured.out == ""


def test_prompts_keep_the_order_of_the_command_line(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("from a file\n")
    given = {"prompt": ["a", "b"], "prompt_ids": ["1, 2"], "prompt_file": [path]}
    order = ["prompt", "max_tokens", "prompt_file", "prompt_ids", "prompt"]
    assert _prompts(given, order) == ["a", "from a file\n", (1, 2), "b"]


def test_processes_are_found_and_ended() -> None:
    mark = f"mark-{os.getpid()}"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, mark], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert children_about(mark) == [parent.pid]
        family = descendants(parent.pid)
        assert {process.pid for process in family} == {parent.pid, child}
        assert {process.pid for process in end_processes(family, 0.0)} == {parent.pid, child}
        assert identify(child) is None
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    assert end_processes(family, 0.0) == []


def test_a_process_with_a_reused_id_is_not_ours() -> None:
    me = identify(os.getpid())
    assert me is not None
    assert end_processes([Process(me.pid, "0")], 0.0) == []
