"""An endpoint as a Serve config (a RayService's) names it: `orchestrator.serve.declared:endpoint`.

Which adapters it serves stands in the registry, as for an endpoint that `raypeft deploy` started.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from .replica import replica_deployment


class EndpointArguments(BaseModel):
    """The application's `args`."""

    endpoint: str
    """Its name in the registry, which `raypeft deploy` has written."""
    registry: str
    """The registry's URL."""


def endpoint(arguments: EndpointArguments) -> Any:
    """The application that Serve builds; replicas and their resources stand in the config."""
    return replica_deployment(arguments.registry).bind(arguments.endpoint, arguments.registry)
