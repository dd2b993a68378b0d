"""Endpoints as they look from outside: the registry says what they shall serve, HTTP whether they answer."""

from __future__ import annotations

import requests

from ..registry import Registry
from .desired import Desired
from .endpoints import EndpointInfo
from .naming import base_id

_TIMEOUT_S = 5.0


def rows_over_http(registry: Registry, root: str) -> list[EndpointInfo]:
    """One row an endpoint of the registry: `live` where it answers below `root`, else `down`.

    Args:
        root: http://HOST:PORT of the cluster's Serve.
    """
    states = ((name, registry.endpoint_state(name)) for name in registry.endpoint_names())
    return [_row(name, Desired.from_dict(state), root) for name, state in states if state]


def _row(name: str, desired: Desired, root: str) -> EndpointInfo:
    url = f"{root}/{name}/v1"
    is_live = _answers(url)
    return EndpointInfo(
        name=name,
        url=url if is_live else "",
        routes=(url,) if is_live else (),
        base=base_id(desired.base),
        adapters=tuple(entry.ref + " (forced)" * entry.forced for entry in desired.adapters),
        state="live" if is_live else "down",
        message="" if is_live else f"nothing answers at {url}",
    )


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/models", timeout=_TIMEOUT_S).status_code == 200
    except requests.RequestException:
        return False
