"""The one tree of errors a person can meet: each says what is wrong, where, and what to do about it."""

from __future__ import annotations


class HexgenError(Exception):
    """Root of every error that hexgen raises on purpose.

    ``message`` says what is wrong, ``where`` names the file and place (or the request, the stage, the node),
    ``remedy`` says what to do. ``str()`` joins them on one line, as the command line prints them.
    """

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.remedy})" if self.remedy else text

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only fields do not survive pickling by default, and Ray carries errors between processes.
        return (_rebuild, (type(self), self.message, self.where, self.remedy))


def _rebuild(kind: type[HexgenError], message: str, where: str | None, remedy: str | None) -> HexgenError:
    error = kind.__new__(kind)
    HexgenError.__init__(error, message, where=where, remedy=remedy)
    return error


class SpecError(HexgenError):
    """A file or option that a person wrote is wrong: cluster, plan, workload, model config. Exit status 2."""


class InfeasibleError(HexgenError):
    """The input is valid, but nothing fits: too little memory, no path between nodes. Exit status 2."""


class CheckpointError(SpecError):
    """A checkpoint lacks a tensor, holds one of the wrong shape, or a file is truncated."""


class DeploymentError(HexgenError):
    """The plan could not be started: a Ray node is missing, a worker did not come up. Exit status 1."""


class EngineError(HexgenError):
    """The running engine failed: a stage died, an edge broke. Exit status 1."""


class RequestError(HexgenError):
    """One request is invalid (HTTP 400, gRPC INVALID_ARGUMENT); nobody else notices."""


class ModelNotFoundError(RequestError):
    """The request names a model that is not served (HTTP 404, gRPC NOT_FOUND)."""


class RequestTooLargeError(RequestError):
    """The body is larger than the server takes (HTTP 413, gRPC RESOURCE_EXHAUSTED)."""


class QueueFullError(HexgenError):
    """Admission queues are full (HTTP 429 with Retry-After, gRPC RESOURCE_EXHAUSTED).

    ``remedy`` is what a person reads; ``retry_after_s`` is what a client waits.
    """

    retry_after_s: float = 1.0


class UnavailableError(HexgenError):
    """No route can take the request now: stages are down, or the engine stops (HTTP 503, gRPC UNAVAILABLE)."""
