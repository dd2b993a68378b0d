"""The body of a request, not larger than any that makes sense."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from ..api_error import ApiError
from .event_stream import ClientGone

MAX_BODY_BYTES = 16 * 2**20


async def read_body(request: Request) -> bytes:
    """All of it.

    Raises:
        ApiError: 413.
        ClientGone: the client hung up before the end.
    """
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise ApiError(f"The body is larger than {MAX_BODY_BYTES} bytes.", status=413)
    except ClientDisconnect as error:
        raise ClientGone from error
    return bytes(body)
