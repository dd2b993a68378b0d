"""One replica of an endpoint: HTTP side and engine in one Ray actor, so that tokens take no second hop."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.types import ASGIApp

from peft_dist.lazy import lazy

from ..errors import ServeError
from ..registry import Registry
from . import scratch
from .desired import Desired, Served
from .engines.garbage import collect_rarely
from .engines.heads import ROUTES
from .engines.prompts import Prompts, SourcePrompts
from .naming import endpoint_of
from .proxy.residency_router import HAS_ROOM, MODELS, REGISTRY
from .reach import admission
from .rollouts.arbiter import Arbiter
from .rollouts.observed import Observed
from .rollouts.observed_heads import ObservedHeads
from .rollouts.promotion import change, desired_of
from .rollouts.reporter import Reporter
from .rollouts.reports import Reports
from .routes.app import build_app
from .routes.catalogue import Catalogue
from .routes.metric_files import MetricFiles
from .routes.metrics import Metrics

ROUTER = "orchestrator.serve.proxy.residency_router.ResidencyRouter"
_HELD_EVERY_S = 1.0
"""How often a replica is asked what it holds: as often as it looks at the registry."""

# Whoever deploys imports this file too, and needs neither torch nor transformers for it.
base_model = lazy("orchestrator.serve.engines.base_model")
engine_choice = lazy("orchestrator.serve.engines.engine_choice")


class Replica:
    """What Serve runs. The desired state in the registry says which adapters; nothing is reconfigured.

    Args:
        endpoint: the endpoint's name, also the first part of its URLs.
        registry_url: where its desired state and the adapters are.
    """

    def __init__(self, endpoint: str, registry_url: str) -> None:
        self._registry = Registry(registry_url)
        self._endpoint = endpoint
        read_desired = partial(desired_of, self._registry, endpoint, was_there=True)
        desired = read_desired()
        if desired is None:
            raise ServeError(f"endpoint '{endpoint}' is not in the registry {registry_url}.")
        self._admission = admission(registry_url)
        self._slots = desired.engine.max_adapters
        self._kept_as = f"{desired.engine.quantization} {desired.engine.deterministic}"
        base = base_model.load(desired.model, desired.threads, desired.engine, desired.task)
        writes_from_source = desired.task == "SEQ_2_SEQ_LM"
        self._prompts = SourcePrompts(base.tokenizer) if writes_from_source else Prompts(base.tokenizer)
        self._has_heads = desired.task in ROUTES
        self._engine: Any = (
            ObservedHeads(engine_choice.heads_for(base, desired.task, desired.engine))
            if self._has_heads
            else Observed(engine_choice.engine_for(base, self._prompts, desired.engine, desired.task))
        )
        name = self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._reports = Reports(registry_url, endpoint)
        reporter = Reporter(name, self._engine, self._reports, Arbiter(self._registry, endpoint, name))
        self._catalogue = Catalogue(
            desired.base,
            self._engine,
            self._registry,
            read_desired,
            self._finish_promotion,
            cache=scratch.folder_of_this_process("raypeft-adapters"),
            slots=self._slots,
            companion=reporter,
        )
        reporter.known = self._catalogue
        self._engine.pin = self._catalogue.residency.pinned
        self._others: tuple[float, Sequence[str]] = (float("-inf"), ())
        collect_rarely()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Serve mounts."""
        return build_app(
            self._endpoint,
            None if self._has_heads else self._engine,
            self._prompts,
            self._catalogue,
            others=self._other_endpoints,
            registry=self._registry.url,
            admission=self._admission,
            heads=self._engine if self._has_heads else None,
            metrics=self._metrics(),
            kept_as=self._kept_as,
        )

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        self._engine.check()

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve, which passes it on to those who choose a replica for a request."""
        return {MODELS: self._catalogue.held(), HAS_ROOM: self._catalogue.residency.has_room()}

    def _metrics(self) -> Metrics:
        context = serve.get_replica_context()
        return Metrics(
            context.replica_tag,
            lambda: replace(self._engine.figures(), slots=self._slots or 0),
            served=lambda: [self._catalogue.base_name, *self._catalogue.states()],
            files=MetricFiles(self._registry.url, self._endpoint, context.replica_tag),
            num_replicas=lambda: serve.get_replica_context().world_size,
        )

    def _finish_promotion(self, entry: Served) -> None:
        def settle(now: Desired) -> Desired:
            return now.with_adapter(replace(entry, alias_when_live=None)) if now.served(entry.ref) else now

        change(self._registry, self._endpoint, settle)
        facts = {"adapter": entry.ref, "alias": entry.alias_when_live, "reasons": ["it had waited for room"]}
        self._reports.note("deployed", **facts, by=self._name)

    async def _other_endpoints(self) -> Sequence[str]:
        read_at, names = self._others
        if time.monotonic() - read_at > 1.0:
            names = await asyncio.to_thread(_endpoints_but, self._endpoint)
            self._others = (time.monotonic(), names)
        return names


def _endpoints_but(own: str) -> list[str]:
    names = (endpoint_of(application) for application in serve.status().applications)
    return [name for name in names if name is not None and name != own]


def replica_deployment(registry_url: str, **options: Any) -> Any:
    """The Serve deployment of `Replica`, to be bound to its arguments.

    Args:
        registry_url: the second of them, also told to whoever asks Serve for the deployment's configuration.
        options: of `serve.deployment`; what is the same for every endpoint stands here.
    """
    return serve.deployment(
        serve.ingress()(Replica),
        name="endpoint",
        max_ongoing_requests=1024,
        health_check_period_s=2,  # a replica that failed three of them is replaced
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=120,
        max_constructor_retry_count=2,
        # a replica of new code or other settings answers before the one that it replaces leaves
        max_surge_percent=100,
        logging_config={"enable_access_log": False},
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,
            request_router_kwargs={REGISTRY: registry_url},
            request_routing_stats_period_s=_HELD_EVERY_S,
        ),
        **options,
    )
