"""What every call looks up first: the job, the cluster, its registry and its runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import service, wiring
from ..cluster import Cluster, load_cluster
from ..registry import Registry
from ..runner import Event
from ..spec.load import LoadedJob, load_job, load_job_mapping
from ..store import RunStore

JobSource = str | os.PathLike[str] | Mapping[str, Any] | LoadedJob


def ignore(event: Event) -> None:
    """Takes an event and does nothing."""


def load(job: JobSource, overrides: Sequence[str] = ()) -> LoadedJob:
    """A job from a file, a mapping (in a notebook), or loaded already.

    Raises:
        SpecError: it breaks a rule; with file, line and key.
    """
    if isinstance(job, LoadedJob):
        return job
    if isinstance(job, Mapping):
        return load_job_mapping(job, overrides=overrides)
    return load_job(job, overrides)


def cluster_of(cluster: str | None, job: LoadedJob) -> Cluster:
    beside = Path(job.path).parent if Path(job.path).exists() else None
    return load_cluster(cluster, job.spec.cluster, beside=beside)


def environment_of(cluster: Cluster, job: LoadedJob | None = None) -> service.Environment:
    return wiring.environment(cluster, storage=job.spec.storage.path if job else None)


def stored_run(id: str, cluster: str | None) -> tuple[RunStore, str]:
    """Where a run is stored, and its id there."""
    folder, slash, name = id.rstrip("/").rpartition("/")
    return (RunStore(folder or "/"), name) if slash else (environment_of(load_cluster(cluster)).runs, id)


def registry_of(cluster: str | None) -> Registry:
    return Registry(load_cluster(cluster).registry)
