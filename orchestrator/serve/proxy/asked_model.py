"""What a request asks for, told to Serve's proxy before it chooses a replica: the body's `model`, as a header.

It stands around the proxy as `broken_answers` does. It is a hint and nothing more: a body that is long, late or not
JSON goes on without it, and what answers is decided by the replica, which reads the whole body.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"serve_multiplexed_model_id"
"""Serve's own header for it, from which a router learns it."""

_OURS = re.compile(r"(/[^/]+)?/v1/.+")
_MODEL = re.compile(rb'(?<!\\)"model"\s*:\s*"((?:[^"\\]|\\.){1,512})"')
_OVERLAP = 1024
_MOST_BYTES = 2**20
_PATIENCE_S = 1.0
"""How long a request waits here for the part of its body that names the model."""


class AskedModel:
    """Adds the model's name to the headers of requests below `/v1`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST" or not _OURS.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        beginning = _Beginning(receive)
        try:
            model = await beginning.model()
            if model is not None:
                scope = {**scope, "headers": [*scope["headers"], (HEADER, model.encode())]}
            await self._app(scope, beginning.receive, send)
        finally:
            beginning.close()


class _Beginning:
    """A request's messages, of which the first ones are looked at before the others get them."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._seen: deque[Message] = deque()
        self._next: asyncio.Task[Message] | None = None
        """What is under way: it was not there in time, and is the next message."""

    async def model(self) -> str | None:
        """What stands at `model`; None where that is not found in time."""
        text, num_bytes = b"", 0
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while num_bytes < _MOST_BYTES:
            self._next = self._next or asyncio.ensure_future(self._receive_one())
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait([self._next], timeout=max(0.0, left))
            if not self._next.done():
                return None
            message = await self._taken()
            self._seen.append(message)
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            num_bytes += len(part)
            text = text[-_OVERLAP:] + part
            if (found := _MODEL.search(text)) is not None:
                return _unquoted(found[1])
            if not message.get("more_body", False):
                return None
        return None

    async def receive(self) -> Message:
        """All messages, in their order."""
        if self._seen:
            return self._seen.popleft()
        if self._next is not None:
            return await self._taken()
        return await self._receive()

    def close(self) -> None:
        """Ends what nobody waits for any more."""
        if self._next is not None:
            self._next.cancel()

    async def _receive_one(self) -> Message:
        return await self._receive()

    async def _taken(self) -> Message:
        assert self._next is not None
        message = await asyncio.shield(self._next)
        self._next = None
        return message


def _unquoted(text: bytes) -> str | None:
    try:
        said = json.loads(b'"' + text + b'"')
    except ValueError:
        return None
    return said if isinstance(said, str) and said.isprintable() else None
