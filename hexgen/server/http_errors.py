"""Our errors as OpenAI's clients expect them: a status and an error object."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from hexgen.errors import (
    HexgenError,
    ModelNotFoundError,
    QueueFullError,
    RequestError,
    RequestTooLargeError,
    UnavailableError,
)

# The first class that matches decides: status, OpenAI's type, OpenAI's code.
_KINDS: tuple[tuple[type[HexgenError], int, str, str | None], ...] = (
    (ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (RequestTooLargeError, 413, "invalid_request_error", "request_too_large"),
    (RequestError, 400, "invalid_request_error", None),
    (QueueFullError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (UnavailableError, 503, "service_unavailable", "service_unavailable"),
    (HexgenError, 500, "server_error", "server_error"),
)


def error_object(error: HexgenError) -> tuple[int, dict[str, Any]]:
    """The status and the body for an error of ours."""
    status, kind, code = next((s, k, c) for cls, s, k, c in _KINDS if isinstance(error, cls))
    param = error.where if isinstance(error, RequestError) else None
    return status, {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def error_response(error: HexgenError) -> JSONResponse:
    status, body = error_object(error)
    headers = {}
    if isinstance(error, QueueFullError):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, RequestTooLargeError):
        headers["connection"] = "close"
    return JSONResponse(body, status, headers=headers)


def plain_error(status: int, message: str, kind: str, code: str | None) -> JSONResponse:
    """An error that is about HTTP itself."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)
