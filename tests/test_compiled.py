"""Libraries compiled at first use: once, in a directory that is nobody else's, and nothing left of what failed."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hexgen.compiled import CppSources, load, private_directory
from hexgen.errors import EngineError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
ANSWER = CppSources(
    "answer",
    {
        "answer.h": "#define ANSWER 42\n",
        "main.cpp": '#include "answer.h"\nextern "C" int told() { return ANSWER; }\n',
    },
    "main.cpp",
    ("-fPIC", "-shared"),
)
# Says what it finds, from the sources of the first argument into the directory of the second.
PROCESS = "import sys; sys.path.insert(0, sys.argv[1]); import test_compiled as t; t.tell(sys.argv[2])"


def tell(directory: str) -> None:
    print(load(ANSWER, Path(directory)).told())


def libraries(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.suffix != ".lock"]


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent), str(tmp_path / "kept")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in started] == ["42\n"] * 3
    (path,) = libraries(tmp_path / "kept")
    made = path.stat().st_ino
    assert load(ANSWER, tmp_path / "kept", compiling=False).told() == 42
    assert path.stat().st_ino == made


def test_other_sources_are_another_library(tmp_path: Path) -> None:
    other = CppSources("answer", {**ANSWER.files, "answer.h": "#define ANSWER 7\n"}, "main.cpp", ANSWER.flags)
    assert [load(one, tmp_path / "kept").told() for one in (ANSWER, other)] == [42, 7]
    assert len(libraries(tmp_path / "kept")) == 2


def test_a_library_others_could_write_is_not_loaded(tmp_path: Path) -> None:
    mine, open_to_all = tmp_path / "mine", tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert private_directory(open_to_all) is None
    assert private_directory(mine) == mine
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    assert load(ANSWER, open_to_all).told() == 42  # compiled for this once
    assert list(open_to_all.iterdir()) == []


def test_what_was_not_compiled_is_not_compiled_unasked(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not been compiled yet"):
        load(ANSWER, tmp_path / "kept", compiling=False)


def test_what_does_not_compile_leaves_nothing(tmp_path: Path) -> None:
    broken = CppSources("broken", {"main.cpp": "int told( { }"}, "main.cpp", ANSWER.flags)
    with pytest.raises(EngineError, match=r"does not compile: .*error"):
        load(broken, tmp_path / "kept")
    assert libraries(tmp_path / "kept") == []


def test_a_broken_library_is_compiled_again(tmp_path: Path) -> None:
    load(ANSWER, tmp_path / "kept")
    (path,) = libraries(tmp_path / "kept")
    broken = private_directory(tmp_path / "broken")
    assert broken is not None
    (broken / path.name).write_bytes(b"no library")
    with pytest.raises(EngineError, match="cannot be loaded"):
        load(ANSWER, broken)
    assert load(ANSWER, broken).told() == 42
