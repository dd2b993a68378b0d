"""This machine's own Ray: started, left to those that still use it, ended."""

from __future__ import annotations

import contextlib

from .. import local_ray, wiring
from ..cluster import Cluster
from ..errors import RaypeftError


def up(*, num_cpus: int | None = None) -> local_ray.LocalRay:
    """Starts this machine's own Ray in the background, on loopback; returns the one that is up."""
    return local_ray.ensure_up(num_cpus)


def down() -> bool:
    """Stops it with its endpoints, and no other; returns whether there was one."""
    return local_ray.down()


def is_up(cluster: Cluster) -> bool:
    """Whether the cluster's Ray is there already, or is not ours to end."""
    return cluster.kind != "local" or local_ray.current() is not None


def stays_up(cluster: Cluster, was_up: bool) -> bool:
    """Whether this command is not to end the cluster's Ray: it was up before, and not left to it by another."""
    return was_up and not (cluster.kind == "local" and local_ray.is_left())


def leave(cluster: Cluster) -> bool:
    """Ends the Ray that this command started; returns True where it stays, because an endpoint lives on it or another
    command uses it."""
    if local_ray.current() is None:
        return False
    with contextlib.suppress(RaypeftError):  # it must end also where the registry cannot be read
        if any(row.state != "down" for row in wiring.endpoint_rows(cluster)):
            return True
    wiring.disconnect()
    return not local_ray.leave()
