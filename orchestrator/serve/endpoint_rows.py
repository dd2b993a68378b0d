"""Endpoints as `raypeft endpoints` shows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..registry import Registry
from .desired import Desired, Served
from .endpoint_calls import followed_registry
from .naming import base_id
from .rollouts.promotion import all_desired
from .serve_cluster import Application, Door

_DOWN = "not on this cluster now: deploy an adapter to start it, or undeploy it"


@dataclass(frozen=True)
class EndpointInfo:
    """An endpoint as `raypeft endpoints` shows it."""

    name: str
    url: str
    """Where its OpenAI API is: http://HOST:PORT/NAME/v1."""
    routes: tuple[str, ...]
    """All URLs that reach it: also http://HOST:PORT/v1 while it is the only one."""
    base: str
    adapters: tuple[str, ...]
    """`name@version` of each; with ` (forced)` where the gate had refused it, ` (canary)` while it is watched."""
    state: str
    """live | idle | starting | waiting | failed | down"""
    message: str = ""
    replicas: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def rows_over_http(registry: Registry, root: str) -> list[EndpointInfo]:
    """The endpoints of a registry as a process sees them that is no driver of their cluster.

    Args:
        root: where the cluster's Serve listens, http://HOST:PORT.
    """
    rows = []
    for name, desired in all_desired(registry).items():
        is_up = followed_registry(f"{root}/{name}") == registry.url
        routes = (f"{root}/{name}/v1",) if is_up else ()
        rows.append(
            _row(name, desired, routes, "live" if is_up else "down", "" if is_up else _DOWN, int(is_up))
        )
    return rows


def endpoint_info(
    name: str, desired: Desired | None, app: Application | None, door: Door | None, *, alone: bool
) -> EndpointInfo:
    """One endpoint's row.

    Args:
        app: what runs of it on this cluster.
        door: where Serve listens.
        alone: it is the cluster's only one.
    """
    root = door.url if door and app else ""
    routes: tuple[str, ...] = (f"{root}/{name}/v1",) if root else ()
    if root and app and alone and app.route_prefix == "/":
        routes += (f"{root}/v1",)
    state, message = _state(app)
    return _row(name, desired, routes, state, message, app.num_running if app else 0)


def _row(
    name: str, desired: Desired | None, routes: tuple[str, ...], state: str, message: str, replicas: int
) -> EndpointInfo:
    adapters = desired.adapters if desired else ()
    return EndpointInfo(
        name=name,
        url=routes[0] if routes else "",
        routes=routes,
        base=base_id(desired.base) if desired else "",
        adapters=tuple(entry.ref + _remark(entry, desired) for entry in adapters),
        state=state,
        message=message,
        replicas=replicas,
    )


def _remark(entry: Served, desired: Desired | None) -> str:
    rolling = desired is not None and any(each.ref == entry.ref for each in desired.rollouts)
    said = ["forced"] * entry.forced + ["canary"] * rolling
    return f" ({', '.join(said)})" if said else ""


def _state(app: Application | None) -> tuple[str, str]:
    if app is None:
        return "down", _DOWN
    if app.num_running:
        return "live", ""
    if app.is_idle:
        return "idle", "nobody asks: the first request starts a replica"
    if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        return "failed", cause_of(app.message)
    if app.num_unplaced:
        return "waiting", "for room on the cluster"
    return "starting", ""


def cause_of(message: str) -> str:
    """The last line that says something of Serve's report, which ends in a traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "Serve gives no reason"
