"""Where an endpoint's application answers: below its name, and below `/` while it is alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..api_error import ApiError

OtherEndpoints = Callable[[], Awaitable[Sequence[str]]]
"""Names of the other endpoints on this Serve: while there are any, `/v1` alone names none."""


async def no_others() -> Sequence[str]:
    """An endpoint that is alone."""
    return ()


class Mount:
    """Takes `/ENDPOINT` off the path, wherever Serve has mounted the application."""

    def __init__(self, endpoint: str, app: ASGIApp, others: OtherEndpoints) -> None:
        self._endpoint, self._app, self._others = endpoint, app, others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            path, named = self._own_path(scope["path"])
            if not named and path.startswith("/v1") and (others := await self._others()):
                error = self._ambiguous(others)
                await JSONResponse(error.body, status_code=error.status)(scope, receive, send)
                return
            scope = {**scope, "path": path, "raw_path": path.encode(), "root_path": ""}
        await self._app(scope, receive, send)

    def _own_path(self, path: str) -> tuple[str, bool]:
        prefix = "/" + self._endpoint
        if path == prefix or path.startswith(prefix + "/"):
            return path[len(prefix) :] or "/", True
        return path, False

    def _ambiguous(self, others: Sequence[str]) -> ApiError:
        roots = ", ".join(f"/{name}/v1" for name in sorted({self._endpoint, *others}))
        return ApiError(
            f"Several endpoints answer here, so /v1 alone names none. Use one of {roots}.", status=404
        )
