"""Waiting for actors: all answers, or the first failure as one of our own errors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from hexgen.errors import CheckpointError, DeploymentError, EngineError, HexgenError

# Ctrl-C and progress are looked at between waits of this length.
POLL_S = 0.2


def gather(
    calls: Mapping[str, Any], what: str, timeout_s: float, meanwhile: Callable[[], None] | None = None
) -> dict[str, Any]:
    """The answers of ``calls`` (object references by device id). ``meanwhile`` is called between waits.

    The first call that fails ends the wait: ``HexgenError`` as the actor raised it, ``EngineError`` naming the
    device for anything else; ``DeploymentError`` where not all have answered within ``timeout_s``.
    """
    import ray

    names = {reference: name for name, reference in calls.items()}
    pending = list(names)
    answers: dict[str, Any] = {}
    deadline = time.monotonic() + timeout_s
    while pending:
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
        errors = []
        for reference in done:
            try:
                answers[names[reference]] = ray.get(reference)
            except ray.exceptions.RayError as error:
                errors.append(translate(error, names[reference], what))
        if errors:
            raise root_cause(errors)
        if pending and time.monotonic() > deadline:
            late = ", ".join(sorted(names[reference] for reference in pending))
            raise DeploymentError(f"{what} took more than {timeout_s:.0f} s", where=f"device {late}")
        if meanwhile is not None:
            meanwhile()
    return answers


def translate(error: BaseException, device: str, what: str) -> HexgenError:
    """What an actor's call raised, as an error of ours."""
    import ray

    cause = getattr(error, "cause", None)
    if isinstance(cause, HexgenError):
        return cause
    if isinstance(error, HexgenError):
        return error
    where = f"device {device}"
    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.WorkerCrashedError):
        if "ModuleNotFoundError" in str(error):
            return _not_installed(_died_of(error), where)
        return EngineError(f"its worker process died ({_died_of(error)})", where=where)
    if isinstance(error, ray.exceptions.ActorUnavailableError | ray.exceptions.NodeDiedError):
        return EngineError("its node cannot be reached", where=where)
    if cause is not None:
        text = " ".join(str(cause).split())
        if isinstance(cause, ModuleNotFoundError):
            return _not_installed(text, where)
        return EngineError(f"{what} failed: {type(cause).__name__}: {text}", where=where)
    return EngineError(f"{what} failed: {_last_line(str(error))}", where=where)


def root_cause(errors: list[HexgenError]) -> HexgenError:
    """Of errors seen together, the one that explains the rest: bad files first, a broken connection last."""

    def rank(error: HexgenError) -> int:
        if isinstance(error, CheckpointError):
            return 0
        if not isinstance(error, EngineError | DeploymentError):
            return 1
        return 2 if "process died" in error.message or "cannot be reached" in error.message else 3

    return min(errors, key=rank)


def _not_installed(text: str, where: str) -> DeploymentError:
    return DeploymentError(text, where=where, remedy="install hexgen-engine, the same version, on every node")


def _died_of(error: BaseException) -> str:
    text = str(error)
    if "ModuleNotFoundError" in text:
        return _last_line(text[text.index("ModuleNotFoundError") :].splitlines()[0])
    for sign, reason in (
        ("SIGKILL", "killed"),
        ("OOM", "killed, or crashed; perhaps the node ran out of memory"),
        ("out of memory", "killed, or crashed; perhaps the node ran out of memory"),
        ("SIGSEGV", "segmentation fault"),
        ("node has died", "its node died"),
        ("node died", "its node died"),
    ):
        if sign in text:
            return reason
    return "Ray's log on its node says why; a local instance keeps its logs with HEXGEN_DEBUG=1"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
