"""The OpenAI-compatible HTTP side of one endpoint, as an ASGI application over an engine and a catalogue."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import ModelError, RaypeftError, closest
from .catalogue import Catalogue, Target
from .engine import Engine, EngineDead, FinishReason, Generation, Piece
from .openai_api import ApiError, ChatRequest, CompletionRequest, Reply, Usage, parse
from .prompts import Prompts
from .sticky import Sticky

_log = logging.getLogger("ray.serve")

ANSWERED_BY = "x-raypeft-adapter"
"""The response header that names the version which answered."""

_MAX_BODY_BYTES = 16 * 2**20

OtherEndpoints = Callable[[], Awaitable[Sequence[str]]]
"""Names of the other endpoints on this Serve: while there are any, `/v1` alone names none."""


async def no_others() -> Sequence[str]:
    """An endpoint that is alone."""
    return ()


def build_app(
    endpoint: str,
    engine: Engine,
    prompts: Prompts,
    catalogue: Catalogue,
    others: OtherEndpoints = no_others,
    registry: str | None = None,
) -> ASGIApp:
    """The application; answers below `/ENDPOINT` and, while there is no other endpoint, below `/`.

    It loads the endpoint's adapters when it starts and closes the engine when it ends. `registry` is what
    /healthz says that it follows.
    """
    api = _Api(engine, prompts, catalogue, registry)
    routes = [
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{model:path}", api.model, methods=["GET"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/healthz", api.health, methods=["GET"]),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await catalogue.start()
        try:
            yield
        finally:
            await catalogue.stop()
            engine.close()

    app = Starlette(
        lifespan=lifespan,
        routes=routes,
        exception_handlers={
            ApiError: _api_error,
            RaypeftError: _raypeft_error,
            EngineDead: _engine_dead,
            404: _no_route,
            405: _no_route,
            Exception: _unexpected,
        },
    )
    return _Prefix(endpoint, app, others)


class _Prefix:
    """Takes `/ENDPOINT` off the path, wherever Serve has mounted the application."""

    def __init__(self, endpoint: str, app: ASGIApp, others: OtherEndpoints) -> None:
        self._endpoint, self._app, self._others = endpoint, app, others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, named = self._own_path(scope["path"])
            if not named and path.startswith("/v1") and (others := await self._others()):
                await self._ambiguous(others)(scope, receive, send)
                return
            scope = {**scope, "path": path, "raw_path": path.encode(), "root_path": ""}
        await self._app(scope, receive, send)

    def _own_path(self, path: str) -> tuple[str, bool]:
        prefix = "/" + self._endpoint
        if path == prefix or path.startswith(prefix + "/"):
            return path[len(prefix) :] or "/", True
        return path, False

    def _ambiguous(self, others: Sequence[str]) -> Response:
        roots = ", ".join(f"/{name}/v1" for name in sorted({self._endpoint, *others}))
        return _error_response(
            ApiError(
                f"Several endpoints answer here, so /v1 alone names none. Use one of {roots}.", status=404
            )
        )


class _Api:
    def __init__(self, engine: Engine, prompts: Prompts, catalogue: Catalogue, registry: str | None) -> None:
        self._engine, self._prompts, self._catalogue = engine, prompts, catalogue
        self._registry = registry

    async def health(self, request: Request) -> Response:
        self._engine.check()
        return JSONResponse({"status": "ok", "base": self._catalogue.base_name, "registry": self._registry})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await self._catalogue.cards()})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        cards = await self._catalogue.cards()
        found = next((card for card in cards if card["id"] == name), None)
        if found is None:
            there = [card["id"] for card in cards]
            raise ApiError(
                f"The model '{name}' does not exist. Here are: {', '.join(there)}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return JSONResponse(found)

    async def completions(self, request: Request) -> Response:
        body = await _body(request)
        wanted: CompletionRequest = parse(CompletionRequest, body)
        prompts = [self._completion_ids(prompt) for prompt in wanted.prompts]
        sticky = Sticky(request.headers, body)
        return await self._answer(wanted, prompts, wanted.token_limit, sticky, chat=False)

    async def chat(self, request: Request) -> Response:
        body = await _body(request)
        wanted: ChatRequest = parse(ChatRequest, body)
        try:
            ids = self._prompts.chat_ids([message.plain() for message in wanted.messages])
        except ModelError as error:
            raise ApiError(str(error), param="messages") from error
        sticky = Sticky(request.headers, body)
        return await self._answer(wanted, [ids], wanted.token_limit, sticky, chat=True)

    def _completion_ids(self, prompt: str | list[int]) -> list[int]:
        ids = self._prompts.text_ids(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError("The prompt has no tokens.", param="prompt")
        if min(ids) < 0 or max(ids) >= self._engine.vocab_size:
            raise ApiError(f"Token ids go from 0 to {self._engine.vocab_size - 1}.", param="prompt")
        return ids

    async def _answer(
        self,
        wanted: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        token_limit: int | None,
        sticky: Sticky,
        *,
        chat: bool,
    ) -> Response:
        async with AsyncExitStack() as stack:
            target = await stack.enter_async_context(self._catalogue.acquire(wanted.model, sticky))
            generations = self._generations(wanted, prompts, token_limit, target)
            usage = Usage(prompt_tokens=sum(len(ids) for ids in prompts))
            reply = Reply(chat=chat, model=target.name)
            headers = {ANSWERED_BY: target.name}
            if not wanted.stream:
                choices = [await self._whole(generation, usage) for generation in generations]
                return JSONResponse(reply.whole(choices, usage), headers=headers)
            self._engine.check()
            events = _events(self._engine, generations, reply, usage, wanted.include_usage, stack.pop_all())
            headers["cache-control"] = "no-cache"
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    def _generations(
        self,
        wanted: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        token_limit: int | None,
        target: Target,
    ) -> list[Generation]:
        """One per prompt and choice, in the order of the choices' indices."""
        generations: list[Generation] = []
        for ids in prompts:
            room = self._engine.max_context - self._engine.virtual_tokens(target.adapter) - len(ids)
            limit = token_limit if token_limit is not None else room
            if room < 1 or limit > room:
                asked = f" and you asked for {limit} more" if token_limit is not None else ""
                raise ApiError(
                    f"This model's maximum context length is {self._engine.max_context} tokens. "
                    f"Your prompt has {len(ids)}{asked}. Shorten the prompt or lower max_tokens.",
                    param="messages" if isinstance(wanted, ChatRequest) else "prompt",
                    code="context_length_exceeded",
                )
            one = Generation(
                prompt_ids=tuple(ids),
                adapter=target.adapter,
                max_tokens=limit,
                temperature=1.0 if wanted.temperature is None else wanted.temperature,
                top_p=1.0 if wanted.top_p is None else wanted.top_p,
                seed=wanted.seed,
                stop=wanted.stops,
                shadow=target.shadow,
            )
            for _ in range(wanted.n or 1):
                # Each choice has a seed of its own, else all would be the same.
                seed = None if wanted.seed is None else (wanted.seed + len(generations)) % 2**63
                generations.append(replace(one, seed=seed))
        return generations

    async def _whole(self, generation: Generation, usage: Usage) -> tuple[str, FinishReason]:
        text: list[str] = []
        async with aclosing(self._engine.generate(generation)) as pieces:
            async for piece in pieces:
                text.append(piece.text)
                usage.completion_tokens += piece.num_tokens
                if piece.finish_reason is not None:
                    return "".join(text), piece.finish_reason
        raise EngineDead("the engine gave no end")


async def _events(
    engine: Engine,
    generations: list[Generation],
    reply: Reply,
    usage: Usage,
    include_usage: bool,
    held: AsyncExitStack,
) -> AsyncIterator[str]:
    """The server-sent events of one answer; left early (the client hangs up), it cancels the engine."""
    async with held:
        try:
            for index, generation in enumerate(generations):
                if (opening := reply.opening(index)) is not None:
                    yield _event(opening)
                async with aclosing(engine.generate(generation)) as pieces:
                    async for chunk in _chunks(index, pieces, reply, usage):
                        yield chunk
            if include_usage:
                yield _event(reply.counts(usage))
        except Exception as error:
            _log.exception("a stream broke off")
            yield _event(ApiError(f"The answer broke off: {error}", status=500).body)
        yield "data: [DONE]\n\n"


async def _chunks(
    index: int, pieces: AsyncGenerator[Piece, None], reply: Reply, usage: Usage
) -> AsyncIterator[str]:
    async for piece in pieces:
        usage.completion_tokens += piece.num_tokens
        if piece.text:
            yield _event(reply.piece(index, piece.text, None))
        if piece.finish_reason is not None:
            yield _event(reply.piece(index, "", piece.finish_reason))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY_BYTES:
            raise ApiError(f"The body is larger than {_MAX_BODY_BYTES} bytes.", status=413)
    return bytes(body)


def _error_response(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _raypeft_error(request: Request, error: Exception) -> Response:
    _log.error("%s", error)
    return _error_response(ApiError(str(error), status=503))


async def _engine_dead(request: Request, error: Exception) -> Response:
    return _error_response(
        ApiError("The engine has stopped; a new one is on its way. Try again.", status=503)
    )


async def _unexpected(request: Request, error: Exception) -> Response:
    _log.exception("request failed", exc_info=error)
    return _error_response(ApiError(f"The server failed: {type(error).__name__}.", status=500))


_PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/healthz")


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    path = request.url.path
    if status == 405:
        return _error_response(ApiError(f"{path} does not take {request.method}.", status=405))
    near = closest(path, _PATHS)
    hint = f" Closest: {near[0]}." if near else f" Here are: {', '.join(_PATHS)}."
    return _error_response(ApiError(f"There is no {path}.{hint}", status=404, code="unknown_url"))
