"""The engine's benchmark: its arithmetic in closed form, and the talk with a peer's process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import engine  # noqa: E402
from peers import process  # noqa: E402
from peers.environments import Peer, PeerError  # noqa: E402
from peers.race import Contender, Speeds, race, ratio  # noqa: E402

FAKE = """
import sys
sys.path.insert(0, {peers!r})
import lines

def generate(prompts, tokens):
    print("noise that is no answer")
    if tokens == 13:
        raise RuntimeError("thirteen")
    short = tokens == 7
    return [[sum(prompt) + i for i in range(tokens - short)] for prompt in prompts]

lines.serve(lambda: ({{"version": "1", "notes": " ".join(sys.argv[1:])}}, generate))
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[process.PeerProcess]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(peers=str(ROOT / "benchmarks" / "peers")))
    monkeypatch.setattr(process, "python_of", lambda *_: Path(sys.executable))
    with process.PeerProcess(Peer("fake", str(script), ()), tmp_path, tmp_path, "float32", 3, (16, 99)) as started:
        yield started


def test_a_peer_is_asked_by_lines(peer: process.PeerProcess) -> None:
    assert peer.facts["notes"].split()[2:] == [
        "--dtype",
        "float32",
        "--threads",
        "3",
        "--sequences",
        "16",
        "--positions",
        "99",
    ]
    assert peer.generate([[1, 2], [5]], 3) == [[3, 4, 5], [5, 6, 7]]
    contender = peer.contender([[1], [2]], 4)
    assert contender.run() == 8
    assert contender.cpu_s() > 0


def test_a_peer_that_fails_says_why(peer: process.PeerProcess) -> None:
    with pytest.raises(PeerError, match="did not generate what was asked for"):
        peer.generate([[1]], 7)
    with pytest.raises(PeerError, match="RuntimeError: thirteen"):
        peer.generate([[1]], 13)
    with pytest.raises(PeerError, match="fake"):  # it has ended
        peer.generate([[1]], 2)


def test_rounds_are_interleaved_and_begin_with_another_one_each() -> None:
    ran: list[str] = []

    def contender(name: str) -> Contender:
        return Contender(lambda: ran.append(name) or 1, lambda: float(len(ran)))  # type: ignore[func-returns-value]

    found = race(3, {name: contender(name) for name in "abc"})
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab"
    assert [len(speeds) for speeds in found.values()] == [3, 3, 3]
    assert all(speed.tokens_cpu_s == 1 for speeds in found.values() for speed in speeds)


def test_ratios_are_of_the_same_round() -> None:
    a = [Speeds(2, 10), Speeds(9, 10), Speeds(8, 40)]
    b = [Speeds(1, 10), Speeds(3, 20), Speeds(8, 10)]
    found = ratio("a / b", 2.0, a, b)
    assert (found.median, found.smallest, found.largest) == (2, 1, 3)
    assert (found.cpu_median, found.cpu_smallest, found.cpu_largest) == (1, 0.5, 4)
    assert (found.a_tokens_s, found.b_tokens_s) == (8, 3)


def test_agreement_ends_at_the_first_difference() -> None:
    assert engine.agreement([[1, 2, 3, 4]], [[1, 2, 3, 4]]) == 1
    assert engine.agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 9, 3, 4], [0, 6, 7, 8]]) == 1 / 8


def test_only_peers_that_exist_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.options_of(["--peers"]).peers == ["llama.cpp", "OpenVINO"]
    assert engine.options_of([]).peers == []
    with pytest.raises(SystemExit):
        engine.options_of(["--peers", "nobody"])
    assert "llama.cpp" in capsys.readouterr().err
