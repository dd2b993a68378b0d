"""Who starts a replica where an endpoint has none: around Serve's proxy, as `broken_answers` is.

Serve starts one for whatever reaches its router, before a replica has looked for a key. So where an endpoint may scale
to zero, keys are checked here too: a request without a valid one starts no replica, and keeps none that nobody else
asks. What cannot be found out here is left to the replica, which checks every request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from ray.exceptions import RayError
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.errors import RaypeftError
from orchestrator.keys import KeyBook

from .. import serve_cluster
from ..api_error import ApiError
from ..reach import serve_host
from ..routes.key_check import KeyCheck, is_loopback
from ..serve_cluster import Application

Mounted = Mapping[str, Application | None]
"""Route prefix -> the endpoint's application there; None: somebody else's."""

_MAX_AGE_S = 1.0
"""How old what is known of Serve's applications may be when a request comes."""
_PATIENCE_S = 1.0
"""How long a request waits for Serve's controller, which may be gone for a while, before what was known is used."""

_log = logging.getLogger("ray.serve")


class Waking:
    """Around an endpoint that may scale to zero: refuses requests without a valid key where it asks for keys (401, in
    OpenAI's form), and answers `/healthz` while it has no replica (200, `{"status": "idle"}`). All else passes
    untouched.

    Args:
        mounted: what Serve has mounted where; called in a thread.
        host: the address that Serve listens on; called in a thread.
    """

    def __init__(
        self,
        app: ASGIApp,
        mounted: Callable[[], Mounted] = serve_cluster.mounted,
        host: Callable[[], str] = serve_host,
    ) -> None:
        self._app, self._read_mounted, self._read_host = app, mounted, host
        self._mounted: Mounted = {}
        self._read_at = float("-inf")
        self._reading: asyncio.Task[Mounted] | None = None
        self._checks: dict[str, KeyCheck] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        answer = await self._own_answer(scope) if scope["type"] in ("http", "websocket") else None
        await (answer or self._app)(scope, receive, send)

    async def _own_answer(self, scope: Scope) -> Response | None:
        """What is said here; None: the request goes on to a replica, or starts one."""
        try:
            await self._refresh()
            application = _at(scope["path"], self._mounted)
            if application is None or not application.may_sleep:
                return None
            if scope["path"] in ("/healthz", f"/{application.endpoint}/healthz"):
                return JSONResponse({"status": "idle"}) if application.is_idle else None
            check = await self._check(application.registry)
            await check.tenant(Headers(scope=scope).get("authorization"))
        except ApiError as error:
            return JSONResponse(error.body, status_code=error.status, headers=error.headers)
        except (RaypeftError, RayError, OSError) as error:
            _log.warning("keys are left to the replica: %s", error)
        return None

    async def _refresh(self) -> None:
        if self._reading is None:
            if self._read_at >= time.monotonic() - _MAX_AGE_S:
                return
            self._reading = asyncio.create_task(asyncio.to_thread(self._read_mounted))
            self._reading.add_done_callback(self._take)
        await asyncio.wait([self._reading], timeout=_PATIENCE_S)

    def _take(self, read: asyncio.Task[Mounted]) -> None:
        self._reading, self._read_at = None, time.monotonic()
        if read.cancelled():
            return
        if (error := read.exception()) is not None:
            _log.warning("which endpoints sleep is not known, what was known is used: %s", error)
            return
        self._mounted = read.result()

    async def _check(self, registry_url: str) -> KeyCheck:
        """The keys of a registry, read once at least.

        Raises:
            RaypeftError: they cannot be read.
        """
        check = self._checks.get(registry_url)
        if check is None:
            host = await asyncio.to_thread(self._read_host)
            check = KeyCheck(KeyBook(registry_url), required=not is_loopback(host))
            await check.start()
            self._checks[registry_url] = check
        return check


def _at(path: str, mounted: Mounted) -> Application | None:
    """The endpoint that Serve gives a path to: the longest prefix has it."""
    there = [prefix for prefix in mounted if path == prefix or path.startswith(prefix.rstrip("/") + "/")]
    return mounted[max(there, key=len)] if there else None
