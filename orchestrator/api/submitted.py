"""Jobs sent to a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .. import wiring
from ..cluster import Cluster
from ..errors import ClusterError, RunError
from ..service import OnEvent, RunResult
from ..spec.load import LoadedJob
from ..spec.secrets import read_secrets
from .found import JobSource, cluster_of, ignore, load

if TYPE_CHECKING:
    from ..submit.jobs import JobState, SubmittedJob


def submit(
    job: JobSource,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    cluster: str | None = None,
    install: bool = False,
) -> SubmittedJob:
    """Sends a job to a Ray cluster and returns once the cluster has taken it.

    Args:
        address: http://HOST:8265; else the cluster's own.
        install: install there what its environment lacks.

    Raises:
        ClusterError: no answer, another Ray or Python, something is missing there.
        RunError: the run is going on there already.
    """
    loaded = load(job, overrides)
    where = _remote(address, cluster, loaded)
    return wiring.jobs_api().submit(loaded.spec, where, secrets=read_secrets(loaded), install=install)


def submission(
    job: JobSource,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    cluster: str | None = None,
    install: bool = False,
) -> str:
    """What `submit` would send: for KubeRay a complete RayJob as YAML, else the request as JSON."""
    loaded = load(job, overrides)
    where = _remote(address, cluster, loaded)
    if where.kind == "kuberay":
        return wiring.rayjob(loaded.spec, where)
    return wiring.jobs_api().describe(loaded.spec, where, install=install)


def submitted_jobs(*, address: str) -> list[JobState]:
    """The jobs that a cluster knows, the newest first."""
    return wiring.jobs_api().list_jobs(address)


def job_status(id: str, *, address: str) -> JobState:
    """One job as its cluster knows it."""
    return wiring.jobs_api().status(id, address)


def job_logs(id: str, *, address: str, follow: bool = False) -> Iterator[str]:
    """What a job printed, in pieces; with `follow` until it has ended."""
    return wiring.jobs_api().logs(id, address, follow=follow)


def follow(id: str, *, address: str, on_event: OnEvent = ignore) -> RunResult:
    """Stays with a submitted job to its end; what it came to, as `run` would have returned it.

    Raises:
        RaypeftError: what ended the job there.
        RunError: it ended without a result.
    """
    pieces = wiring.jobs_api().logs(id, address, follow=True)
    result, error, last = wiring.read_output(pieces, on_event)
    if error is not None:
        raise error
    if result is None:
        state = wiring.jobs_api().status(id, address)
        raise RunError(
            f"job '{id}' ended without a result ({state.status}): {last or state.message}",
            hint=f"Its log: raypeft logs {id} --address {address}",
        )
    return RunResult.from_dict(result)


def _remote(address: str | None, cluster: str | None, job: LoadedJob) -> Cluster:
    where = cluster_of(cluster, job)
    if address:
        return where.at(address)
    if where.kind == "local":
        raise ClusterError(
            "submit sends a job to a Ray cluster, and none is named.",
            hint="Say --address http://HOST:8265, or name a cluster file; on this machine use: raypeft run.",
        )
    return where
