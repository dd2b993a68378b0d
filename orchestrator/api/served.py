"""Endpoints: what they serve, and how a version comes to its alias and goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .. import service, wiring
from ..cluster import load_cluster
from ..errors import ServeError, SpecError
from ..registry import Registry
from ..serve.rollouts import promotion, traffic
from ..service import Deployment, OnEvent
from ..spec.job import DeploySpec
from ..spec.overrides import apply_overrides
from ..spec.places import Path as SpecPath
from ..spec.places import Problem, Tree, dotted
from ..spec.rules import check_deploy
from ..spec.unknown import unknown_key
from ..spec.words import explain
from .found import environment_of, ignore, registry_of
from .own_ray import is_up, leave

if TYPE_CHECKING:
    from ..serve.endpoint_rows import EndpointInfo


def deploy(
    ref: str,
    *,
    endpoint: str | None = None,
    alias: str = "production",
    num_replicas: int | None = None,
    force: bool = False,
    settings: Sequence[str] = (),
    cluster: str | None = None,
    on_event: OnEvent = ignore,
) -> Deployment:
    """Serves a version at the endpoint of its base, which is started where there is none.

    Args:
        settings: keys of a job's `deploy`, such as `rollout.canary_percent=10` or `scale.min_replicas=0`.

    On a cluster that is reached through Ray's Jobs API this is a short job there, with the same events, result
    and errors.

    Raises:
        RegistryError: there is no such version.
        ModelError: its base is not where the cluster can read it.
        ServeError: its gate refused it, no endpoint answers for its task, or the endpoint does not come up.
    """
    where = load_cluster(cluster)
    wiring.check_registry(where)
    environment = environment_of(where)
    version = environment.registry.get(ref)
    service.served_task(version)  # before anything is started
    spec = deploy_spec(settings, endpoint=endpoint, alias=alias, num_replicas=num_replicas)
    base = version.lineage.base
    was_up = is_up(where)
    try:
        return environment.open_endpoints().deploy(
            version, base.source, base.revision or "main", spec, force=force, on_event=on_event
        )
    except BaseException:
        if not was_up:
            leave(where)
        raise


def deploy_spec(settings: Sequence[str], **asked: Any) -> DeploySpec:
    """What was asked for on the command line, checked as in a job."""
    for each in settings:
        if not each.partition("=")[1]:
            raise SpecError(
                f"'{each}' is not KEY=VALUE.",
                where="--set",
                hint="Write --set KEY=VALUE, such as --set rollout.canary_percent=10.",
            )
    keys = [f"deploy.{each.strip().removeprefix('deploy.')}" for each in settings]
    tree, errors = apply_overrides(Tree("--set"), keys)
    if errors:
        raise errors[0]
    said = {key: value for key, value in asked.items() if value is not None}
    values = {**said, **tree.values.get("deploy", {})}
    if "gate" in values:
        raise SpecError(
            "a gate is asked when a version is registered, not when it is deployed.",
            where="deploy.gate",
            hint="Write it in the job; --force deploys what it refused.",
        )
    try:
        spec = DeploySpec(**values)
    except ValidationError as error:
        problem = explain(DeploySpec, values, error.errors(), _unknown_of_deploy)[0]
        where = f"deploy.{dotted(problem.path)}"
        raise SpecError(problem.problem, where=where, hint=problem.hint) from error
    for problem in check_deploy(spec):
        raise SpecError(problem.problem, where=dotted(problem.path), hint=problem.hint)
    return spec


def _unknown_of_deploy(path: SpecPath) -> Problem:
    """What to say of a key below `deploy` that does not exist, at its place below it."""
    found = unknown_key(("deploy", *path))
    return Problem(path, found.problem, found.hint)


def endpoints(*, cluster: str | None = None) -> list[EndpointInfo]:
    """All endpoints with what they serve. Starts no Ray: without one they are shown as down."""
    return wiring.endpoint_rows(load_cluster(cluster))


def promote(ref: str, *, alias: str | None = None, cluster: str | None = None) -> tuple[str, str]:
    """Gives a served version its alias now; returns the endpoint and what took it (`NAME@V`).

    Args:
        alias: that of its rollout, else `production`.

    Raises:
        RegistryError: there is no such version.
        ServeError: no endpoint serves it.
    """
    registry = registry_of(cluster)
    name, number = registry.resolve(ref)
    return promotion.promote(registry, f"{name}@{number}", alias), f"{name}@{number}"


def rollback(name: str, *, alias: str = "production", cluster: str | None = None) -> tuple[str, str | None]:
    """Takes back what is being rolled out to an alias, else gives the alias to the version before it; returns the
    endpoint and what the alias names now.

    Raises:
        ServeError: nothing is rolled out, and no version before is known.
    """
    registry = registry_of(cluster)
    endpoint, number = promotion.rollback(registry, name.partition("@")[0], alias)
    return endpoint, None if number is None else f"{name.partition('@')[0]}@{number}"


def rollouts(name: str | None = None, *, cluster: str | None = None) -> list[traffic.RolloutRow]:
    """What is being rolled out, of one adapter or of all, with the numbers that decide it."""
    return traffic.rollout_rows(registry_of(cluster), name)


def audit(name: str | None = None, *, cluster: str | None = None) -> list[dict[str, Any]]:
    """Every step of every rollout, of one adapter or of all, oldest first."""
    return traffic.audit_lines(registry_of(cluster), name)


def top(*, cluster: str | None = None) -> Iterator[list[traffic.TrafficRow]]:
    """What each version answers, looked at again for each `next`; from the second on with rates."""
    registry, before = registry_of(cluster), None
    while True:
        rows, before = traffic.traffic_rows(registry, before)
        yield rows


def undeploy(name: str, *, endpoint: str | None = None, cluster: str | None = None) -> None:
    """Takes an endpoint out of service, or one adapter (`NAME@V`) wherever it is served.

    Args:
        endpoint: take `NAME@V` from this endpoint alone.
    """
    where = load_cluster(cluster)
    wiring.check_registry(where)
    there = wiring.endpoints(where, Registry(where.registry), start=False)
    if endpoint is not None:
        there.undeploy(endpoint, name)
        return
    if "@" not in name:
        there.undeploy(name)
        return
    served = [
        row.name for row in endpoints(cluster=cluster) if any(a.split(" ")[0] == name for a in row.adapters)
    ]
    if not served:
        raise ServeError(f"no endpoint serves '{name}'.", hint="List them: raypeft endpoints")
    for each in served:
        there.undeploy(each, name)
