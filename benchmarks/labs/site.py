"""One laboratory while it stands: discovery, servers and loads inside it, without quotas while programs start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hexgen.cluster import Cluster
from hexgen.lab.groups import find_groups
from hexgen.lab.laboratory import Laboratory, member_of
from hexgen.workload import Workload

_READY_S = 120.0
_STOP_S = 60.0
_WEIGHT = 40  # of the laboratory against what else may run here, which it should not
_TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Use:
    """What the nodes' processes took of the processor during a run, in cores; and the share of periods in which
    the quota held a node back.
    """

    cores: dict[str, float]
    throttled: dict[str, float]


class Site:
    """``folder`` is where files go; commands run with it as their directory's parent."""

    def __init__(self, laboratory: Laboratory, folder: Path) -> None:
        self.laboratory = laboratory
        self.folder = folder

    def discover(self, model_ref: str) -> Path:
        """The measured cluster's file, with its table beside it."""
        target = self.folder / "measured-cluster.yaml"
        self.laboratory.lift()
        with open(self.folder / "discover.log", "wb") as log:
            process = self.laboratory.begin(
                [sys.executable, str(Path(__file__).with_name("inside.py")), str(target), model_ref],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
            assert process.stdin is not None  # noqa: S101 - pipes were asked for
            assert process.stdout is not None  # noqa: S101
            told = process.stdout.readline()
            self.laboratory.restore()
            time.sleep(0.2)
            if told == b"prepared\n":
                process.stdin.write(b"go\n")
                process.stdin.close()
            status = process.wait()
        text = (self.folder / "discover.log").read_text()
        print("\n".join(f"    {line}" for line in text.splitlines() if not line.endswith("...")), flush=True)
        if status:
            raise SystemExit(f"discovery failed with status {status}")
        return target

    @contextmanager
    def served(self, plan: Path) -> Iterator[None]:
        """The plan's server at 127.0.0.1:8000 of the head; quotas hold once it is ready."""
        self.laboratory.lift()
        with open(self.folder / "serve.log", "ab") as log:
            process = self.laboratory.begin(
                ["hexgen", "serve", str(plan)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        try:
            assert process.stdout is not None  # noqa: S101 - a pipe was asked for
            if not process.stdout.readline().startswith(b"ready"):
                raise SystemExit(f"the server did not start:\n{(self.folder / 'serve.log').read_text()[-2000:]}")
            self.laboratory.restore()
            yield
        finally:
            self.laboratory.lift()
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()

    def bench(self, options: Sequence[str], against: Path | None = None) -> tuple[dict[str, Any], Use]:
        """`hexgen bench` with each request's own times."""
        target = self.folder / "bench.json"
        command = ["hexgen", "bench", *options, "--detailed", "-o", str(target)]
        command += [] if against is None else ["--against", str(against)]
        before, began = self._counts(), time.monotonic()
        with open(self.folder / "bench.log", "wb") as log:
            process = self.laboratory.begin(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            status = process.wait()
        after, seconds = self._counts(), time.monotonic() - began
        if status:
            raise SystemExit(f"hexgen bench failed:\n{(self.folder / 'bench.log').read_text()[-2000:]}")
        found: dict[str, Any] = json.loads(target.read_text())
        found["log"] = (self.folder / "bench.log").read_text()
        # Starting and ending the client is part of these seconds: divide by those of the run.
        run_s = min(seconds, found["duration"])
        use = Use(
            {name: (after[name][0] - before[name][0]) / run_s for name in after},
            {
                name: (after[name][2] - before[name][2]) / max(1, after[name][1] - before[name][1])
                for name in after
            },
        )
        return found, use

    def _counts(self) -> dict[str, tuple[float, int, int]]:
        """Of each node: processor seconds, periods, periods held back. Control groups of version 1 count these."""
        found = {}
        for node in self.laboratory.cluster.nodes:
            doors = self.laboratory.door(node.name).groups
            folder = next(door.parent for door in doors if member_of(node.name) in door.parts)
            spent = sum(_spent_s(pid) for pid in (folder / "cgroup.procs").read_text().split())
            stat = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
            found[node.name] = spent, int(stat.get("nr_periods", 0)), int(stat.get("nr_throttled", 0))
        return found


def _spent_s(pid: str) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_S


def lengths(workload: Workload) -> tuple[str, str]:
    """`hexgen bench`'s option for requests of the workload's mean lengths."""
    return "--workload", f"prompt={workload.prompt_tokens.mean:g},output={workload.output_tokens.mean:g}"


@contextmanager
def built(cluster: Cluster, folder: Path) -> Iterator[Site]:
    folder.mkdir(parents=True, exist_ok=True)
    with Laboratory(cluster, find_groups(), where=cluster.name) as laboratory:
        laboratory.weigh(_WEIGHT)
        yield Site(laboratory, folder)


def others_busy(seconds: float = 1.0) -> float:
    """Cores that something keeps busy while this process waits."""
    from hexgen.discover.timing import Others

    with Others() as others:
        time.sleep(seconds)
    return others.cores
