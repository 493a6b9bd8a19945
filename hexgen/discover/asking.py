"""Asking several nodes at once, where one that fails is named and left out, and the others go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from hexgen.deploy.ray_calls import POLL_S, translate
from hexgen.errors import HexgenError

T = TypeVar("T")
OnFailure = Callable[[str, str], None]  # node, reason


class Asker(Protocol):
    """Calls ``method`` of the probes on several nodes at the same time."""

    def ask(
        self, method: str, arguments: Mapping[str, tuple[Any, ...]], timeout_s: float, failed: OnFailure
    ) -> dict[str, Any]:
        """Answers by node. ``failed`` is called for each that raised, died or did not answer in time."""
        ...


class RayAsker:
    """Probes that are Ray actors, one pinned to each node."""

    def __init__(self, probes: Mapping[str, Any], meanwhile: Callable[[], None]) -> None:
        self._probes = probes
        self._meanwhile = meanwhile

    def ask(
        self, method: str, arguments: Mapping[str, tuple[Any, ...]], timeout_s: float, failed: OnFailure
    ) -> dict[str, Any]:
        import ray

        names = {getattr(self._probes[node], method).remote(*values): node for node, values in arguments.items()}
        pending, answers = list(names), {}
        deadline = time.monotonic() + timeout_s
        while pending and time.monotonic() < deadline:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            for reference in done:
                node = names[reference]
                try:
                    answers[node] = ray.get(reference)
                except ray.exceptions.RayError as error:
                    failed(node, translate(error, node, method).message)
            self._meanwhile()
        for reference in pending:
            failed(names[reference], f"did not answer within {timeout_s:.0f} s")
        return answers


class LocalAsker:
    """One probe in this process: this machine, without Ray."""

    def __init__(self, name: str, probe: Any) -> None:
        self._name, self._probe = name, probe

    def ask(
        self, method: str, arguments: Mapping[str, tuple[Any, ...]], timeout_s: float, failed: OnFailure
    ) -> dict[str, Any]:
        answers = {}
        for node, values in arguments.items():
            try:
                answers[node] = getattr(self._probe, method)(*values)
            except (HexgenError, OSError, RuntimeError) as error:
                failed(node, str(error))
        return answers
