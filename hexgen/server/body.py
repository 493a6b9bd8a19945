"""Request bodies: bounded before they are kept, JSON or one clear error."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from hexgen.errors import RequestError, RequestTooLargeError

MAX_BODY_BYTES = 16 * 1024 * 1024
# A client reads its answer after it has sent its body; up to this much more is thrown away so that it gets one.
_MAX_DISCARD_BYTES = 256 * 1024 * 1024
_DISCARD_S = 20.0
_READ_S = 120.0


async def read_json(request: Request, limit: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The JSON object in the request's body; ``RequestTooLargeError`` beyond ``limit`` bytes."""
    body = await _read(request, limit)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of a million digits
        raise RequestError(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object")
    return fields


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    chunks: list[bytes] = []
    size = 0
    too_large = declared.isdigit() and (len(declared) > 18 or int(declared) > limit)
    if too_large and request.headers.get("expect", "").lower() == "100-continue":
        raise _too_large(limit)  # the client has not begun to send, and will not
    try:
        async with asyncio.timeout(_READ_S):
            if not too_large:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limit:
                        too_large = True
                        break
                    chunks.append(chunk)
    except TimeoutError as error:
        raise RequestError(f"the body did not arrive within {_READ_S:.0f} s") from error
    except ClientDisconnect as error:
        raise RequestError("the client left before its body had arrived") from error
    if too_large:
        chunks.clear()
        await _discard(request)
        raise _too_large(limit)
    return b"".join(chunks)


async def _discard(request: Request) -> None:
    """Let the client finish sending, within reason, so that it comes to read the refusal."""
    left = _MAX_DISCARD_BYTES
    try:
        async with asyncio.timeout(_DISCARD_S):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _too_large(limit: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body is larger than {limit} bytes", remedy="send less in one request")
