"""Ray Serve as this project sees it: where it listens, our applications on it, how they start and end.
Applications of others on the same Serve are never touched."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import ServeError
from .naming import application, endpoint_of
from .proxy.residency_router import REGISTRY
from .replica import replica_deployment

logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it says each thing that it is told to do

_PORTS_TRIED = 50
_REQUESTS_A_REPLICA = 16
"""More at once ask for another replica, within the bounds."""
_UPSCALE_S = 3.0


@dataclass(frozen=True)
class Door:
    """Where Serve listens."""

    host: str
    port: int
    note: str | None = None
    """What to tell the user: another port than asked for."""

    @property
    def url(self) -> str:
        """http://HOST:PORT, as a client of this machine or the cluster reaches it."""
        host = _head_node()["NodeManagerAddress"] if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Application:
    """One of our applications on Serve."""

    endpoint: str
    status: str
    """Serve's word: DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, DELETING, NOT_STARTED."""
    message: str
    route_prefix: str | None
    num_replicas: int
    num_running: int
    num_unplaced: int
    """Replicas that wait for room on the cluster."""
    actor_options: dict[str, Any]
    bounds: tuple[int, int] | None = None
    """The fewest and the most replicas, where their number follows what is asked."""
    idle_s: float = 0.0
    """How long replicas that are not needed stay, there."""
    trigger: str = ""
    """Serve's word for what its deployment's status came from."""
    registry: str = ""
    """The URL of the registry that its replicas follow."""

    @property
    def is_recovering(self) -> bool:
        """Whether a replica went away, and Serve starts another one. While replicas are replaced by those of other
        code, Serve calls that a failed deployment, and goes on all the same."""
        return self.status == "UNHEALTHY" or (
            self.status == "DEPLOY_FAILED" and self.trigger == "HEALTH_CHECK_FAILED"
        )

    @property
    def has_failed(self) -> bool:
        """Whether Serve has given it up: its replicas do not start."""
        return self.status == "DEPLOY_FAILED" and not self.is_recovering

    @property
    def may_sleep(self) -> bool:
        """Whether its last replica leaves, too, when nobody asks."""
        return self.bounds is not None and self.bounds[0] == 0

    @property
    def is_idle(self) -> bool:
        """Whether it has no replica because nobody asks: the first request starts one."""
        return self.may_sleep and self.status == "RUNNING" and not self.num_running


@dataclass(frozen=True)
class Placement:
    """What each replica reserves, and how many there are."""

    num_replicas: int
    num_cpus: float
    num_gpus: float
    hide_gpus: bool = False
    """Ray leaves the GPUs in sight of who reserves none."""
    bounds: tuple[int, int] | None = None
    """The fewest and the most replicas, where their number is to follow what is asked."""
    idle_s: float = 0.0
    """How long replicas that are not needed stay, there."""

    @property
    def actor_options(self) -> dict[str, Any]:
        """For Serve's `ray_actor_options`."""
        # Floats, as Serve gives them back: it compares texts, and restarts replicas over 0 and 0.0.
        options: dict[str, Any] = {"num_cpus": float(self.num_cpus), "num_gpus": float(self.num_gpus)}
        if self.hide_gpus:
            inherited = dict(ray.get_runtime_context().runtime_env)
            variables = {**inherited.get("env_vars", {}), "CUDA_VISIBLE_DEVICES": ""}
            options["runtime_env"] = {**inherited, "env_vars": variables}
        return options


def open_serve(host: str, port: int) -> Door:
    """Starts Serve on the head node where none runs; a port that is taken is replaced by the next free one.

    Raises:
        ServeError: no port is free, or Serve runs without HTTP.
    """
    running = find_door()
    if running is not None:
        if running.port != port or running.host != host:
            note = f"Serve already listens on {running.host}:{running.port}, not {host}:{port}"
            return Door(running.host, running.port, note)
        return running
    free = _on_head(_first_free_port, host, port)
    if free is None:
        raise ServeError(
            f"no port of {host} from {port} to {port + _PORTS_TRIED - 1} is free on the cluster's head.",
            hint="Free one, or set serve.port in the cluster file.",
        )
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": free})
    return Door(host, free, None if free == port else f"port {port} is taken: Serve listens on {free}")


def _client() -> Any:
    """Serve's controller; None where none runs, or this process has joined no Ray (asked then, Serve starts one)."""
    return _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None


def find_door() -> Door | None:
    """Where Serve listens; None where none runs on this cluster.

    Raises:
        ServeError: Serve runs without HTTP.
    """
    client = _client()
    if client is None:
        return None
    options = client.http_config
    if options.host is None:
        raise ServeError(
            "Serve runs on this cluster without its HTTP side.",
            hint="End it (`serve shutdown`) and deploy again.",
        )
    return Door(options.host, options.port)


def _details() -> dict[str, dict[str, Any]]:
    """What Serve says of each application, ours or another's, by its name; empty where no Serve runs."""
    client = _client()
    return {} if client is None else client.get_serve_details()["applications"]


def applications() -> dict[str, Application]:
    """Our applications by endpoint; empty where no Serve runs."""
    found = {}
    for name, details in _details().items():
        if (endpoint := endpoint_of(name)) is not None:
            found[endpoint] = _application(endpoint, details)
    return found


def route_taken(prefix: str) -> str | None:
    """The application, ours or another's, that is mounted at a prefix."""
    return next((name for name, details in _details().items() if details.get("route_prefix") == prefix), None)


def mounted() -> dict[str, Application | None]:
    """Route prefix -> our application there, None for another's; empty where no Serve runs."""
    found: dict[str, Application | None] = {}
    for name, details in _details().items():
        if (prefix := details.get("route_prefix")) is not None:
            endpoint = endpoint_of(name)
            found[prefix] = None if endpoint is None else _application(endpoint, details)
    return found


def start_application(endpoint: str, registry_url: str, placement: Placement, version: str) -> None:
    """Starts an endpoint's application, at `/` where that is free, else at `/ENDPOINT`; returns before its
    replicas are up.

    Args:
        version: of code and settings; replicas of another one are replaced when the application is changed.
    """
    root_is_free = route_taken("/") is None
    try:
        _run(endpoint, registry_url, "/" if root_is_free else f"/{endpoint}", placement, version)
    except RayError:
        if not root_is_free or route_taken("/") in (None, application(endpoint)):
            raise
        # Another application has taken `/` meanwhile.
        _run(endpoint, registry_url, f"/{endpoint}", placement, version)


def change_application(
    app: Application,
    registry_url: str,
    version: str,
    *,
    route_prefix: str | None = None,
    placement: Placement | None = None,
) -> None:
    """Mounts a running application elsewhere, or changes the number of its replicas; those that run go on. Where
    `version` is another than theirs, new ones take their places one after the other, and no request is lost.

    Args:
        placement: how many replicas; what each reserves stays what it is.
    """
    if placement is None:
        placement = Placement(app.num_replicas, 0, 0, bounds=app.bounds, idle_s=app.idle_s)
    prefix = route_prefix or app.route_prefix or f"/{app.endpoint}"
    _run(app.endpoint, registry_url, prefix, placement, version, actor_options=app.actor_options)


def _run(
    endpoint: str,
    registry_url: str,
    route_prefix: str,
    placement: Placement,
    version: str,
    actor_options: dict[str, Any] | None = None,
) -> None:
    options: dict[str, Any] = {"ray_actor_options": actor_options or placement.actor_options}
    if placement.bounds is None:
        options["num_replicas"] = placement.num_replicas
    else:
        options["autoscaling_config"] = _autoscaling(placement.bounds, placement.idle_s)
    deployment = replica_deployment(registry_url, **options)
    # Serve restarts replicas whose version changes, and by itself gives a new one each time; one of our own lets an
    # application be moved in place. Ray keeps this option to itself; tests see that it holds.
    deployment = deployment.options(version=version, _internal=True)
    bound = deployment.bind(endpoint, registry_url)
    serve.api._run(bound, name=application(endpoint), route_prefix=route_prefix, _blocking=False)


def _autoscaling(bounds: tuple[int, int], idle_s: float) -> dict[str, Any]:
    low, most = bounds
    # Demand is a mean over this time: longer than what replicas stay for, it would keep them.
    looked_back_s = min(30.0, max(2.0, idle_s / 2))
    return {
        "min_replicas": low,
        "max_replicas": most,
        # the deployment itself asks something of it, and nobody waits for a first request to see it fail
        "initial_replicas": max(1, low),
        "target_ongoing_requests": _REQUESTS_A_REPLICA,
        "upscale_delay_s": _UPSCALE_S,
        "downscale_delay_s": idle_s,
        "look_back_period_s": looked_back_s,
        # what is averaged has to come more than once in that time
        "metrics_interval_s": min(10.0, looked_back_s / 2),
    }


def delete_application(endpoint: str) -> None:
    """Ends an endpoint's application and waits until it is gone."""
    serve.delete(application(endpoint))


def can_ever_place(num_cpus: float, num_gpus: float) -> bool:
    """Whether a node that is up has so much in all."""
    return any(
        node["Resources"].get("CPU", 0) >= num_cpus and node["Resources"].get("GPU", 0) >= num_gpus
        for node in ray.nodes()
        if node["Alive"]
    )


def has_free(actor_options: dict[str, Any]) -> bool:
    """Whether the cluster has what one replica reserves free now."""
    free = ray.available_resources()
    asked = {"CPU": actor_options.get("num_cpus", 0), "GPU": actor_options.get("num_gpus", 0)}
    return all(free.get(kind, 0) >= amount for kind, amount in asked.items())


def _application(endpoint: str, details: dict[str, Any]) -> Application:
    deployment = next(iter(details.get("deployments", {}).values()), None)
    replicas = deployment["replicas"] if deployment else []
    config = deployment["deployment_config"] if deployment else {}
    scaling = config.get("autoscaling_config")
    trigger = (deployment or {}).get("status_trigger", "")
    routing = config.get("request_router_config") or {}
    return Application(
        endpoint=endpoint,
        status=str(getattr(details["status"], "value", details["status"])),
        # a replica's own error stands with the deployment; the application only says that one failed
        message=(deployment or {}).get("message") or details.get("message", ""),
        route_prefix=details.get("route_prefix"),
        num_replicas=deployment["target_num_replicas"] if deployment else 0,
        num_running=sum(replica["state"] == "RUNNING" for replica in replicas),
        num_unplaced=sum(
            replica["state"] == "STARTING" and not replica.get("node_id") for replica in replicas
        ),
        actor_options=config.get("ray_actor_options") or {},
        bounds=(scaling["min_replicas"], scaling["max_replicas"]) if scaling else None,
        idle_s=scaling["downscale_delay_s"] if scaling else 0.0,
        trigger=str(getattr(trigger, "value", trigger)),
        registry=routing.get("request_router_kwargs", {}).get(REGISTRY, ""),
    )


def _head_node() -> dict[str, Any]:
    return next(
        node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]
    )


def _on_head(function: Any, *arguments: Any) -> Any:
    """Calls a function on the cluster's head node."""
    head = _head_node()["NodeID"]
    if ray.get_runtime_context().get_node_id() == head:
        return function(*arguments)
    strategy: Any = NodeAffinitySchedulingStrategy(head, soft=False)
    placed = ray.remote(num_cpus=0, scheduling_strategy=strategy)(function)
    return ray.get(placed.remote(*arguments))


def _first_free_port(host: str, port: int) -> int | None:
    for candidate in range(port, min(port + _PORTS_TRIED, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
                probe.listen()
            except OSError:
                continue
            return candidate
    return None
