"""What a client is told whose replica went away: around Serve's own proxy, which then says nothing, or something that
no OpenAI client reads.

Serve loads it where the environment of its proxies says `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=` and `CALLBACK`:
the local Ray's does, and the image's of `clusters/Dockerfile`.
"""

from __future__ import annotations

import json
import logging
import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..api_error import ApiError
from ..routes.event_stream import DONE, event
from .asked_model import AskedModel
from .waking import Waking

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "orchestrator.serve.proxy.broken_answers:middlewares"

_OURS = re.compile(r"(/[^/]+)?/v1/.+")
_UNREADABLE = (500, 503, 429, 408)
"""Statuses with which Serve itself answers in plain text."""

_log = logging.getLogger("ray.serve")


def middlewares() -> list[Middleware]:
    """For Serve's proxies."""
    return [Middleware(AskedModel), Middleware(Waking), Middleware(WholeAnswers)]


class WholeAnswers:
    """Ends every answer below `/v1` in OpenAI's form: one that never began with 503 and Retry-After, a stream that
    broke off with an event. Answers that are whole pass untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not _OURS.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            await self._app(scope, answer.listening(receive), answer.take)
        except Exception as error:
            _log.error("an answer broke off: %r", error)
        await answer.end()


class _Answer:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._refused: int | None = None
        self._began = self._is_stream = self._is_whole = self._has_gone = False

    def listening(self, receive: Receive) -> Receive:
        """`receive`, noting that the client hung up: nobody is to be told anything then."""

        async def heard() -> Message:
            message = await receive()
            self._has_gone = self._has_gone or message["type"] == "http.disconnect"
            return message

        return heard

    async def take(self, message: Message) -> None:
        """Passes a message on, but for what Serve says in its own words."""
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            if message["status"] in _UNREADABLE and not kind.startswith(
                (b"application/json", b"text/event-stream")
            ):
                self._refused = message["status"]
                return
            self._began, self._is_stream = True, kind.startswith(b"text/event-stream")
        if self._refused is not None:
            return
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_whole = True
        await self._send(message)

    async def end(self) -> None:
        """Says what is missing."""
        if self._is_whole or self._has_gone:
            return
        status = 429 if self._refused == 429 else 503
        error = ApiError(
            "The replica that answered went away; another one is there, or on its way. Try again."
            if status == 503
            else "Too many requests wait here. Try again a little later.",
            status=status,
            code="replica_gone" if status == 503 else "queue_full",
            retry_after_s=1,
        )
        if not self._began:
            body = json.dumps(error.body).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        elif self._is_stream:
            # What came last may have been half an event: an empty line ends it.
            body = b"\n\n" + event(error.body) + DONE
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
