"""The HTTP side of one endpoint, as an ASGI application over an engine and a catalogue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from orchestrator.errors import RaypeftError, closest

from ..api_error import ApiError, engine_stopped, no_such_model
from ..engines.engine import Engine, EngineDead, ScoresNotFinite
from ..engines.heads import GENERATION, ROUTES, Heads
from ..engines.prompts import Prompts
from .admission import Admission
from .catalogue import Catalogue
from .completions import ANSWERED_BY, Completions
from .event_stream import ClientGone
from .head_routes import HeadRoutes, other_task
from .measured import Measured
from .metrics import CONTENT_TYPE, Metrics
from .mount import Mount, OtherEndpoints, no_others

__all__ = ["ANSWERED_BY", "build_app"]

_log = logging.getLogger("ray.serve")


def build_app(
    endpoint: str,
    engine: Engine | None,
    prompts: Prompts,
    catalogue: Catalogue,
    others: OtherEndpoints = no_others,
    registry: str | None = None,
    *,
    admission: Admission | None = None,
    metrics: Metrics | None = None,
    heads: Heads | None = None,
    kept_as: str = "",
) -> ASGIApp:
    """The application; answers below `/ENDPOINT` and, while there is no other endpoint, below `/`.

    It loads the endpoint's adapters when it starts and closes the engine when it ends. `registry` is what
    /healthz says that it follows. Without `admission` it takes all that its queues hold, from anybody. An endpoint of a
    base with a task's head has `heads` in place of an engine. `kept_as` says how the base is kept and run: answers of
    the same fingerprint are of the same.
    """
    works = engine if engine is not None else heads
    if works is None:
        raise ValueError("an endpoint needs an engine or heads")
    admission = admission or Admission()
    metrics = metrics or Metrics(figures=works.figures)
    facts = _Facts(works, catalogue, registry, admission, metrics)
    routes = [
        Route("/v1/models", facts.models, methods=["GET"]),
        Route("/v1/models/{model:path}", facts.model, methods=["GET"]),
        *_task_routes(engine, heads, prompts, catalogue, admission, metrics, kept_as),
        Route("/healthz", facts.health, methods=["GET"]),
        Route("/metrics", facts.metrics, methods=["GET"]),
    ]
    paths = [route.path for route in routes if "{" not in route.path]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await admission.start()
        await catalogue.start()
        sharing = asyncio.create_task(metrics.share())
        try:
            yield
        finally:
            sharing.cancel()
            await asyncio.gather(sharing, return_exceptions=True)
            await catalogue.stop()
            await admission.stop()
            works.close()

    async def no_route(request: Request, error: Exception) -> Response:
        return _no_route(request, error, paths)

    app = Starlette(
        lifespan=lifespan,
        routes=routes,
        exception_handlers={
            ApiError: _api_error,
            RaypeftError: _raypeft_error,
            EngineDead: _engine_dead,
            ScoresNotFinite: _not_finite,
            ClientGone: _client_gone,
            404: no_route,
            405: no_route,
            Exception: _unexpected,
        },
    )
    # A redirect would name a path without the endpoint's name, which Serve may have for another one.
    app.router.redirect_slashes = False
    return Mount(endpoint, Measured(app, metrics, frozenset(paths)), others)


def _task_routes(
    engine: Engine | None,
    heads: Heads | None,
    prompts: Prompts,
    catalogue: Catalogue,
    admission: Admission,
    metrics: Metrics,
    kept_as: str,
) -> list[Route]:
    """What the base's task answers, and for every other task's route where to ask instead."""
    answering: dict[str, Callable[[Request], Awaitable[Response]]] = {}
    if engine is not None:
        completions = Completions(engine, prompts, catalogue, admission, metrics, kept_as)
        answering[GENERATION] = completions.complete
        answering["/v1/chat/completions"] = completions.chat
        own = GENERATION
    if heads is not None:
        routes = HeadRoutes(heads, catalogue, admission, metrics)
        own = ROUTES[heads.task]
        answering[own] = {
            "FEATURE_EXTRACTION": routes.embeddings,
            "SEQ_CLS": routes.classify,
            "TOKEN_CLS": routes.token_classify,
            "QUESTION_ANS": routes.question_answering,
        }[heads.task]
    other = other_task(catalogue.base_name, own)
    paths = [GENERATION, "/v1/chat/completions", *ROUTES.values()]
    return [Route(path, answering.get(path, other), methods=["POST"]) for path in paths]


class _Facts:
    """What the endpoint says of itself."""

    def __init__(
        self,
        works: Engine | Heads,
        catalogue: Catalogue,
        registry: str | None,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self._works, self._catalogue, self._registry = works, catalogue, registry
        self._admission, self._metrics = admission, metrics

    async def health(self, request: Request) -> Response:
        self._works.check()
        said = {"status": "ok", "base": self._catalogue.base_name, "registry": self._registry}
        return JSONResponse({**said, "task": getattr(self._works, "task", "CAUSAL_LM")})

    async def metrics(self, request: Request) -> Response:
        await self._admission.tenant(request.headers.get("authorization"))
        return Response(await self._metrics.whole_text(), headers={"content-type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await self._cards(request)})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        cards = await self._cards(request)
        found = next((card for card in cards if card["id"] == name), None)
        if found is None:
            raise no_such_model(name, "does not exist", [card["id"] for card in cards])
        return JSONResponse(found)

    async def _cards(self, request: Request) -> list[dict[str, Any]]:
        tenant = await self._admission.tenant(request.headers.get("authorization"))
        return [card for card in await self._catalogue.cards() if tenant.may_use(card["id"])]


def _error_response(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _raypeft_error(request: Request, error: Exception) -> Response:
    _log.error("%s", error)
    return _error_response(ApiError(str(error), status=503, retry_after_s=2))


async def _engine_dead(request: Request, error: Exception) -> Response:
    return _error_response(engine_stopped())


async def _not_finite(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(str(error), status=500))


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; access logs and counters do


async def _unexpected(request: Request, error: Exception) -> Response:
    _log.error("request failed", exc_info=error)
    return _error_response(ApiError(f"The server failed: {type(error).__name__}.", status=500))


def _no_route(request: Request, error: Exception, paths: list[str]) -> Response:
    path = request.url.path
    if getattr(error, "status_code", 404) == 405:
        refused = _error_response(ApiError(f"{path} does not take {request.method}.", status=405))
        refused.headers.update(getattr(error, "headers", None) or {})  # which methods it takes
        return refused
    near = closest(path, paths)
    hint = f" Closest: {near[0]}." if near else f" Here are: {', '.join(paths)}."
    return _error_response(ApiError(f"There is no {path}.{hint}", status=404, code="unknown_url"))
