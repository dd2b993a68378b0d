"""Server-sent events to a client that may be slow, or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A response of events; the generator is closed as soon as the client hangs up or takes nothing for
    `stall_s` seconds. What waits for a slow client is what the transport buffers, and the generator waits with it.
    `held` is left at the end, also where nothing was ever sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        held: AsyncExitStack,
        stall_s: float = 60.0,
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._held, self._stall_s = events, held, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def write(message: Message) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(message)

        async def run() -> None:
            async with aclosing(self._events):
                await write({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for data in self._events:
                    await write({"type": "http.response.body", "body": data, "more_body": True})
                await write({"type": "http.response.body", "body": b"", "more_body": False})

        with suppress(ClientGone, TimeoutError, OSError):  # there is nobody to tell
            async with self._held:
                await while_connected(run(), receive)


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
        ClientGone: it has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
