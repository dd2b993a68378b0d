"""Has each request timed, whatever becomes of it, and its answer say which replica gave it."""

from __future__ import annotations

from collections.abc import Collection

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics, Timing

REPLICA = "x-raypeft-replica"
"""The response header that names the replica which answered, as its series and its log file do."""
_KEY = "raypeft.timing"
_UNMEASURED = ("/metrics", "/healthz")


def timing_of(request: Request) -> Timing:
    """The timing of a request that came through `Measured`."""
    timing = request.scope[_KEY]
    assert isinstance(timing, Timing)
    return timing


class Measured:
    """ASGI around an application.

    Args:
        paths: the routes that are measured by their names; all others count as one.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._named = [(REPLICA.encode(), metrics.replica.encode())] if metrics.replica else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] in _UNMEASURED:
            await self._app(scope, receive, send)
            return
        timing = Timing(scope["path"] if scope["path"] in self._paths else "other")
        status, whole = 499, False

        async def noted(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start" and self._named:
                message = {**message, "headers": [*message.get("headers", ()), *self._named]}
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                whole = True

        try:
            await self._app({**scope, _KEY: timing}, receive, noted)
        finally:
            self._metrics.end(timing, status if whole else 499)
