"""An endpoint as a Serve config names it, such as a RayService: `orchestrator.serve.declared:endpoint`.

Which adapters it serves stands in the registry, as for an endpoint that `raypeft deploy` started.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from ray import serve

from .replica import Replica


class EndpointArguments(BaseModel):
    """The application's `args`."""

    endpoint: str
    """Its name in the registry, which `raypeft deploy` has written."""
    registry: str
    """The registry's URL."""


def endpoint(arguments: EndpointArguments) -> Any:
    """The application that Serve builds; replicas and their resources stand in the config."""
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="endpoint",
        health_check_period_s=5,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=120,
        max_constructor_retry_count=2,
    )
    return deployment.bind(arguments.endpoint, arguments.registry)
