"""The API key: one bearer token, compared in constant time."""

from __future__ import annotations

import hmac


def authorized(header: str | bytes | None, api_key: str | None) -> bool:
    """Whether an ``Authorization`` header carries ``Bearer <api_key>``; anything goes where no key is set."""
    if api_key is None:
        return True
    if header is None:
        return False
    given = header if isinstance(header, bytes) else header.encode("utf-8", "surrogateescape")
    scheme, _, token = given.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), api_key.encode())
