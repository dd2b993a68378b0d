"""The endpoints of a cluster that is reached through Ray's Jobs API alone: each change is a short job there."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ..cluster import Cluster
from ..errors import ClusterError
from ..objects import is_local, local_path
from ..registry import AdapterVersion
from ..service import Deployment, OnEvent
from ..spec.job import DeploySpec
from .command import run_command


class JobEndpoints:
    """The endpoints of one such cluster; see `service.Endpoints`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def deploy(
        self,
        version: AdapterVersion,
        base_model: str,
        revision: str,
        deploy: DeploySpec,
        *,
        force: bool = False,
        on_event: OnEvent = lambda event: None,
    ) -> Deployment:
        """Has the cluster deploy the version on the base of its lineage, which is looked for there.

        Raises:
            RaypeftError: what the cluster says, as if it had been said here; see `run_command`.
        """
        _check_folder(self._cluster)
        arguments = ["deploy", version.ref, f"--alias={deploy.alias}"]
        if deploy.endpoint is not None:
            arguments.append(f"--endpoint={deploy.endpoint}")
        if "num_replicas" in deploy.model_fields_set:
            arguments.append(f"--replicas={deploy.num_replicas}")
        if force:
            arguments.append("--force")
        arguments += [f"--set={setting}" for setting in _settings(deploy)]
        return Deployment(**run_command(self._cluster, arguments, on_event))

    def undeploy(self, name: str, adapter: str | None = None) -> None:
        """Has the cluster take an endpoint, or one adapter of it, out of service."""
        _check_folder(self._cluster)
        arguments = ["undeploy", name] if adapter is None else ["undeploy", adapter, f"--endpoint={name}"]
        run_command(self._cluster, arguments, lambda event: None)


def _settings(deploy: DeploySpec) -> Iterator[str]:
    """What `deploy` says that has no option of its own, as `raypeft deploy --set` takes it."""
    said = deploy.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    for key in ("gpus_per_replica", "cpus_per_replica"):
        if key in said:
            yield f"{key}={json.dumps(said[key])}"
    for section in ("rollout", "scale", "engine"):
        for key, value in said.get(section, {}).items():
            yield f"{section}.{key}={json.dumps(value)}"


def check_registry(cluster: Cluster) -> None:
    """The registry must be one that the cluster and this machine both see.

    Raises:
        ClusterError: the cluster's file names none; `~/.raypeft/registry` is another folder on each machine.
    """
    if not cluster.shared:
        raise ClusterError(
            f"nothing names a registry that both this machine and the cluster '{cluster.name}' see, so what is "
            "registered here cannot be served there.",
            where=cluster.path,
            hint="Name storage: s3://BUCKET/runs and registry: s3://BUCKET/adapters in a cluster file, or folders "
            "that the nodes and this machine mount, and say --cluster FILE.",
        )


def _check_folder(cluster: Cluster) -> None:
    if is_local(cluster.registry) and not local_path(cluster.registry).is_dir():
        raise ClusterError(
            f"the registry '{cluster.registry}' is no folder of this machine.",
            where=cluster.path,
            hint="Mount it here at the same path, or keep adapters on s3://, which every machine sees.",
        )
