"""Request bodies: bounded before they are kept, JSON or one clear error."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from hexgen.errors import RequestError, RequestTooLargeError, UnavailableError

MAX_BODY_BYTES = 16 * 1024 * 1024
_MAX_TOTAL_BYTES = 512 * 1024 * 1024
# A client reads its answer after it has sent its body; up to this much more is thrown away so that it gets one.
_MAX_DISCARD_BYTES = 256 * 1024 * 1024
_DISCARD_S = 20.0
_READ_S = 120.0


class BodyReader:
    """Reads request bodies, each of at most ``limit`` bytes, and of at most ``total`` at any one time."""

    def __init__(self, limit: int = MAX_BODY_BYTES, total: int = _MAX_TOTAL_BYTES) -> None:
        self._limit = limit
        self._total = total
        self._held = 0

    async def read_json(self, request: Request) -> dict[str, Any]:
        """The JSON object in the body.

        ``RequestTooLargeError`` beyond the limit, ``UnavailableError`` where others send too much at this moment,
        ``RequestError`` where it is no JSON object.
        """
        body = await self._read(request)
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of a million digits
            raise RequestError(f"the body is not JSON: {str(error)[:200]}") from error
        if not isinstance(fields, dict):
            raise RequestError("the body must be a JSON object")
        return fields

    async def _read(self, request: Request) -> bytes:
        declared = request.headers.get("content-length", "")
        too_large = declared.isdigit() and (len(declared) > 18 or int(declared) > self._limit)
        if too_large and request.headers.get("expect", "").lower() == "100-continue":
            raise self._too_large()  # the client has not begun to send, and will not
        body = None
        if not too_large:
            try:
                async with asyncio.timeout(_READ_S):
                    body = await self._collect(request)
            except TimeoutError as error:
                raise RequestError(f"the body did not arrive within {_READ_S:.0f} s") from error
            except ClientDisconnect as error:
                raise RequestError("the client left before its body had arrived") from error
        if body is None:
            await _discard(request)
            raise self._too_large()
        return body

    async def _collect(self, request: Request) -> bytes | None:
        """The body, or None as soon as it is beyond the limit."""
        chunks: list[bytes] = []
        size = 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
                self._held += len(chunk)
                if size > self._limit:
                    return None
                if self._held > self._total:
                    raise UnavailableError("too much is being sent at this moment", remedy="try again later")
                chunks.append(chunk)
        finally:
            self._held -= size
        return b"".join(chunks)

    def _too_large(self) -> RequestTooLargeError:
        return RequestTooLargeError(
            f"the body is larger than {self._limit} bytes", remedy="send less in one request"
        )


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
