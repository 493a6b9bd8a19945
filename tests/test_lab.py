"""A lab on this machine, for real: namespaces, shaped links, quotas, and nothing left however it ends.

Needs root and iproute2. Ray is in one test alone, which is slow.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hexgen.cli import main
from hexgen.cluster import Cluster, parse_cluster
from hexgen.errors import DeploymentError
from hexgen.lab import namespaces, tools
from hexgen.lab.claims import claim
from hexgen.lab.groups import Groups, find_groups
from hexgen.lab.laboratory import Laboratory
from hexgen.lab.names import LabName, number_of
from hexgen.lab.teardown import clean, clean_dead

HEXGEN = [sys.executable, "-m", "hexgen", "lab"]
ROOT = Path(__file__).parent.parent


def _why_not() -> str | None:
    try:
        tools.check_machine()
        find_groups()
        probe = f"hexlab-probe-{os.getpid()}"
        tools.run("ip", "netns", "add", probe)
        tools.run("ip", "netns", "delete", probe)
    except DeploymentError as error:
        return str(error)
    return None


REASON = _why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no lab here: {REASON}")


def two() -> Cluster:
    return parse_cluster({
        "name": "two",
        "nodes": [
            {"name": "a", "device": "cpu", "speed": 0.3, "memory": "1GB"},
            {"name": "b", "device": "cpu", "speed": 0.1},
            {"name": "c", "device": "cpu", "speed": 0.1},
        ],
        "links": {
            "default": {"bandwidth": "16Mbps", "latency": "1ms"},
            "nodes": [{"between": ["a", "c"], "bandwidth": "4Mbps", "latency": "1ms"}],
        },
    })  # fmt: skip


def everything_of(number: int, groups: Groups) -> list[object]:
    """All that is on this machine of the lab of this number."""
    return [
        *(name for name in namespaces.existing() if number_of(name) == number),
        *groups.processes(number),
        *(number for found in groups.labs() if found == number),
        *(path for path in [LabName(number).folder, Path(f"/run/hexgen-lab/{number}.lock")] if path.exists()),
        *(line for line in tools.run("ip", "link").splitlines() if "hexlab" in line),
        *watchdogs(number),
    ]


def watchdogs(number: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"hexgen.lab.watchdog" in words and str(number).encode() in words:
            found.append(int(entry.name))
    return found


def eventually_nothing(number: int, groups: Groups, within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while left := everything_of(number, groups):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def groups() -> Groups:
    return find_groups()


@pytest.fixture(scope="module")
def lab(groups: Groups) -> Iterator[Laboratory]:
    with Laboratory(two(), groups, with_ray=False) as laboratory:
        yield laboratory
    eventually_nothing(laboratory.name.number, groups)


# ---- what is built --------------------------------------------------------------------------------------------

_RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 7000))
print("listening", flush=True)
connection, _ = server.accept()
first = len(connection.recv(65536)); began = time.monotonic(); total = 0
while data := connection.recv(65536): total += len(data)
print(total / (time.monotonic() - began), flush=True)
"""
_SEND = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7000))
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until: connection.sendall(bytes(8192))
"""


def measured_bytes_s(lab: Laboratory, sender: str, receiver: str, seconds: float = 0.7) -> float:
    address = lab.name.addresses(lab.cluster)[receiver]
    interpreter = sys.executable
    receiving = lab.start(receiver, [interpreter, "-c", _RECEIVE, address], stdout=subprocess.PIPE)
    assert receiving.stdout is not None
    assert receiving.stdout.readline() == b"listening\n"
    sending = lab.start(sender, [interpreter, "-c", _SEND, receiver, str(seconds)])
    assert sending.wait(60) == 0
    output, _ = receiving.communicate(timeout=60)
    return float(output)


@pytest.mark.parametrize(("sender", "receiver", "bits_s"), [("a", "b", 16e6), ("c", "a", 4e6)])
def test_each_link_carries_what_the_file_says(lab: Laboratory, sender: str, receiver: str, bits_s: float) -> None:
    found = 8 * measured_bytes_s(lab, sender, receiver)
    # TCP's and Ethernet's headers take 5 %. A busy machine may send less, never more.
    assert 0.6 * bits_s < found < 1.05 * bits_s


def test_nodes_know_their_names_and_see_nobody_else(lab: Laboratory) -> None:
    script = (
        "cat /proc/sys/kernel/hostname; tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort; "
        "getent hosts c; env | grep HEXGEN_LAB | sort"
    )
    process = lab.start("b", ["sh", "-c", script], stdout=subprocess.PIPE)
    lines = process.communicate(timeout=60)[0].decode().split("\n")
    addresses = lab.name.addresses(lab.cluster)
    assert lines[:3] == ["b", "eth0", "lo"]
    assert addresses["c"] in lines[3]
    assert f"HEXGEN_LAB={lab.name.text}" in lines
    assert f"HEXGEN_LAB_LATENCY={addresses['a']}=0.001,{addresses['c']}=0.001" in lines


def test_devices_know_their_memory_and_quotas_can_be_lifted(lab: Laboratory) -> None:
    script = (
        "from hexgen.discover.machine import look; found = look(); print(found.lab_memory_bytes, found.cpu_quota)"
    )

    def told(node: str) -> str:
        process = lab.start(node, [sys.executable, "-c", script], stdout=subprocess.PIPE)
        return process.communicate(timeout=120)[0].decode().strip()

    lab.lift()
    try:
        assert told("a") == "1000000000 None"
        assert told("b") == "None None"
    finally:
        lab.restore()
    assert told("a") == "1000000000 0.3"


def test_a_busy_node_gets_its_share_of_the_processor(lab: Laboratory) -> None:
    script = (
        "import time; t = time.monotonic()\nwhile time.monotonic() < t + 1.5: pass\nprint(time.process_time())"
    )
    began = time.monotonic()
    process = lab.start("a", [sys.executable, "-S", "-c", script], stdout=subprocess.PIPE)
    used_s = float(process.communicate(timeout=60)[0])
    share = used_s / (time.monotonic() - began)
    assert 0.05 < share < 0.3 * 1.15  # less where others take the processor


def test_memory_is_what_the_file_says_and_what_an_interpreter_needs(lab: Laboratory, groups: Groups) -> None:
    assert groups.memory is not None
    folder = groups.memory / lab.name.group
    name = "memory.max" if groups.version == 2 else "memory.limit_in_bytes"
    limit = int((folder / "node.a" / name).read_text())
    assert 2 * 10**9 < limit < 3 * 10**9
    without = (folder / "node.b" / name).read_text().strip()
    assert without == "max" or int(without) > 10**15


@pytest.mark.slow
def test_a_process_that_takes_more_memory_is_ended(lab: Laboratory) -> None:
    script = "b = []\nfor _ in range(400): b.append(bytearray(b'x') * 10_000_000)"
    process = lab.start("a", [sys.executable, "-S", "-c", script])
    assert process.wait(60) == -signal.SIGKILL


def test_two_labs_at_once_do_not_meet(lab: Laboratory, groups: Groups) -> None:
    with Laboratory(two(), groups, with_ray=False) as other:
        assert other.name.number != lab.name.number
        assert set(other.name.addresses(two()).values()).isdisjoint(lab.name.addresses(two()).values())
        there = other.name.addresses(two())["b"]
        script = f"import socket; socket.create_connection(('{there}', 7000), timeout=0.5)"
        process = lab.start("a", [sys.executable, "-S", "-c", script], stdout=subprocess.DEVNULL)
        assert process.wait(60) != 0
        assert claim(lab.name.number) is None  # it lives: nobody may clean it up
        assert all(name.number not in (lab.name.number, other.name.number) for name, _ in clean_dead(groups))
    eventually_nothing(other.name.number, groups)
    assert any(number_of(name) == lab.name.number for name in namespaces.existing())


# ---- how it ends ----------------------------------------------------------------------------------------------


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("nodes:\n  - {name: one, device: cpu, speed: 0.5}\n  - {name: two, device: cpu, speed: 0.5}\n")
    return path


def started(cluster_file: Path, command: str, before: str = ":") -> tuple[subprocess.Popen[str], int]:
    """A lab that runs ``command`` in a shell (after ``before``) beside a child of it, and the lab's number."""
    script = f'{before}; echo "$HEXGEN_LAB"; sleep 300 & {command}'
    process = subprocess.Popen(
        [*HEXGEN, "--no-ray", str(cluster_file), "--", "sh", "-c", script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    number = number_of(name)
    assert number is not None
    return process, number


def test_the_command_s_exit_status_is_the_lab_s(cluster_file: Path, groups: Groups) -> None:
    process, number = started(cluster_file, "exit 7")  # its child sleeps on, and is ended
    assert process.wait(60) == 7
    eventually_nothing(number, groups, within_s=0)


def test_sigterm_reaches_the_command_and_ends_everything(cluster_file: Path, groups: Groups) -> None:
    process, number = started(cluster_file, "while :; do sleep 0.1; done", "trap 'echo asked; exit 5' TERM")
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert output == "asked\n"
    assert process.returncode == 5
    eventually_nothing(number, groups, within_s=0)


@pytest.mark.slow
def test_a_killed_command_ends_the_lab(cluster_file: Path, groups: Groups) -> None:
    process, number = started(cluster_file, "kill -9 $$")
    assert process.wait(60) == 128 + signal.SIGKILL
    eventually_nothing(number, groups, within_s=0)


def test_a_killed_lab_is_cleaned_up_by_its_watchdog(cluster_file: Path, groups: Groups) -> None:
    process, number = started(cluster_file, "sleep 300")
    process.kill()
    process.wait(60)
    eventually_nothing(number, groups)


def test_what_a_crash_left_is_removed_and_said(cluster_file: Path, groups: Groups) -> None:
    process, number = started(cluster_file, "sleep 300")
    for watchdog in watchdogs(number):
        os.kill(watchdog, signal.SIGKILL)
    process.kill()
    process.wait(60)
    assert everything_of(number, groups)
    done = subprocess.run([*HEXGEN, "--clean"], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60)
    assert f"removed what a killed lab had left (hexlab-{number}): " in done.stderr
    assert "3 network namespaces" in done.stderr
    eventually_nothing(number, groups, within_s=0)


def test_a_failure_while_building_leaves_nothing(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LabName] = []

    def fail(_: Cluster, name: LabName) -> tuple[str, ...]:
        made.append(name)
        tools.run("tc", "-n", name.namespace("a"), "qdisc", "add", "dev", "nowhere", "root", "htb")
        return ()

    monkeypatch.setattr("hexgen.lab.links.shape", fail)
    with pytest.raises(DeploymentError, match="nowhere"):
        Laboratory(two(), groups, with_ray=False)
    eventually_nothing(made[0].number, groups)


# ---- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: [{name: a, device: cpu, speed: 0}]", "nodes[0].speed"),
        ("nodes: [{name: a, device: cpu, speed: 0.0001}]", "the least that can be given is 0.001"),
        ("nodes: [{name: a, device: T4}]", "a lab's nodes compute on the CPU"),
        ("nodes: [{name: a, device: cpu}]\nlinks: {nodes: [{between: [a, b], bandwidth: 1Gbps, latency: 1ms}]}",
         "there is no node 'b'"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line_and_nothing_starts(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text + "\n")
    before = namespaces.existing()
    with pytest.raises(SystemExit) as ended:
        main(["lab", str(path), "--", "true"])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(f"error: {path}")
    assert said in error
    assert error.count("\n") == 1
    assert [name for name in namespaces.existing() if name not in before and "hexlab" in name] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lab"], "no cluster file"),
        (["lab", "cluster_specs/lab-two-speeds.yaml"], "no command"),
        (["lab", "--clean", "cluster_specs/lab-two-speeds.yaml"], "stands alone"),
        (["lab", "nowhere.yaml", "--", "true"], "nowhere.yaml"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_command_that_is_not_there(cluster_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["lab", "--no-ray", str(cluster_file), "--", "no-such-command"])
    assert ended.value.code == 2
    assert "error: the command 'no-such-command' was not found" in capsys.readouterr().err


# ---- with Ray -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_plan_answers_on_the_lab_s_own_ray_nodes(tmp_path: Path, groups: Groups) -> None:
    spec, plan = ROOT / "cluster_specs/lab-two-speeds.yaml", tmp_path / "plan.yaml"
    module = [sys.executable, "-m", "hexgen"]
    subprocess.run([*module, "plan", str(spec), "-o", str(plan)], check=True, cwd=ROOT, capture_output=True)
    ask = ["generate", str(plan), "--prompt", "def main(", "--max-tokens", "8", "--temperature", "0"]
    alone = subprocess.run([*module, *ask], check=True, cwd=ROOT, capture_output=True, text=True)
    command = [*HEXGEN, str(spec), "--", *module, *ask]
    in_lab = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert in_lab.returncode == 0, in_lab.stderr
    assert in_lab.stdout == alone.stdout != ""
    number = number_of(in_lab.stderr.partition(" is up")[0].split()[-1])
    assert number is not None
    eventually_nothing(number, groups, within_s=0)


def test_clean_is_safe_where_there_is_nothing(groups: Groups) -> None:
    free = next(number for number in range(511, 0, -1) if not everything_of(number, groups))
    mine = claim(free)
    assert mine is not None
    assert not clean(mine.lab, groups)
    mine.release()
    mine.release()
