"""A peer at work: its process, asked by lines of JSON (``lines.py``)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from peers.environments import Peer, PeerError, python_of
from peers.race import Contender

STOP_LIMIT_S = 30.0


class PeerProcess:
    """``model``: a Llama checkpoint in safetensors of the dtype to run. Sleeps while it is not asked."""

    def __init__(
        self, peer: Peer, folder: Path, model: Path, dtype: str, threads: int, sizes: tuple[int, int]
    ) -> None:
        self.name = peer.name
        python = python_of(peer, folder)
        script = Path(__file__).parent / peer.script
        sequences, positions = (str(size) for size in sizes)
        arguments = ["--model", str(model), "--dtype", dtype, "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)
        self._log = (model / f"{peer.script}.log").open("w+")
        self._process = subprocess.Popen(
            [str(python), str(script), *arguments, "--sequences", sequences, "--positions", positions],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip
        self._usage = psutil.Process(self._process.pid)
        self.facts: dict[str, str] = self._hear("ready")

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Greedy, ``tokens`` for each prompt."""
        if self._process.stdin is None:
            raise PeerError("has no input", where=self.name)
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(f"ended: {error}{self._tail()}", where=self.name) from error
        found: list[list[int]] = self._hear("tokens")
        if [len(sequence) for sequence in found] != [tokens] * len(prompts):
            raise PeerError("did not generate what was asked for", where=self.name)
        return found

    def contender(self, prompts: list[list[int]], tokens: int) -> Contender:
        def run() -> int:
            return sum(len(sequence) for sequence in self.generate(prompts, tokens))

        return Contender(run, lambda: sum(self._usage.cpu_times()[:2]))

    def _hear(self, what: str) -> Any:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        message = json.loads(line) if line else {"error": f"ended with {self._process.wait()}"}
        if what not in message:
            raise PeerError(f"failed: {message.get('error', message)}{self._tail()}", where=self.name)
        return message[what]

    def _tail(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return "\n" + "\n".join(lines[-5:]) if lines else ""

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
