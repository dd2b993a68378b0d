"""A job's `tracking` section as what the process is told, and where people then look."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..cluster import Cluster, ClusterFacts
from ..errors import SpecError
from ..home import home
from ..objects import is_local
from ..spec.job import JobSpec
from .session import Target, Tracking

OFF = "RAYPEFT_TRACKING"
"""The environment variable that turns tracking off, whatever a job says: RAYPEFT_TRACKING=off."""

_SQLITE = "sqlite:///"
_MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


def open_tracking(
    spec: JobSpec, cluster: Cluster, secrets: Mapping[str, str] | None = None, *, storage: str | None = None
) -> Tracking:
    """What a job's `tracking` asks for; its process starts at once, and nobody waits for it.

    Args:
        secrets: the job's; those of trackers (MLFLOW_*, WANDB_*) reach them.
        storage: where the run lives, for files beside it; the cluster's storage where not given.
    """
    env = {name: value for name, value in (secrets or {}).items() if name.startswith(("MLFLOW_", "WANDB_"))}
    return Tracking(targets(spec, cluster, storage=storage), env=env)


def targets(spec: JobSpec, cluster: Cluster, *, storage: str | None = None) -> list[Target]:
    """One mapping for each tracker that the job asks for; none where RAYPEFT_TRACKING=off."""
    if os.environ.get(OFF, "").lower() in ("off", "0", "false", "no"):
        return []
    tracking, folder = spec.tracking, _folder(cluster, storage)
    found: list[Target] = []
    if tracking.mlflow is not None:
        uri = _absolute(tracking.mlflow.uri) or (folder and f"{_SQLITE}{folder / 'mlflow.db'}")
        if uri:
            file = Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None
            artifacts = (file.parent / "mlflow-artifacts").as_uri() if file else None
            experiment = tracking.mlflow.experiment or spec.name
            found.append({"kind": "mlflow", "uri": uri, "experiment": experiment, "artifacts": artifacts})
    if tracking.tensorboard is not None:
        found.append(
            {"kind": "tensorboard", "folder": _place(tracking.tensorboard.dir, folder, "tensorboard")}
        )
    if (wandb := tracking.wandb) is not None:
        found.append({
            "kind": "wandb", "project": wandb.project or spec.name, "entity": wandb.entity, "mode": wandb.mode,
            "folder": _place(wandb.dir, folder, "wandb"),
        })  # fmt: skip
    return found


def check_tracking(spec: JobSpec, cluster: Cluster, facts: ClusterFacts | None) -> None:
    """Whether what the job asks of trackers can be done where it runs.

    Raises:
        SpecError: a relative database file on several nodes, or a package that is not installed.
    """
    uri = spec.tracking.mlflow.uri if spec.tracking.mlflow else None
    several = facts is not None and facts.several_nodes
    if uri and uri.startswith("sqlite:") and not Path(uri.removeprefix(_SQLITE)).is_absolute():
        if not uri.startswith(_SQLITE):
            raise SpecError(
                f"'{uri}' is no database's URI.",
                where="tracking.mlflow.uri",
                hint="Write sqlite:////absolute/file.db, with four slashes, or a server's URL.",
            )
        if several or cluster.kind != "local":
            raise SpecError(
                f"'{uri}' is a relative file, and the cluster has several nodes: each would mean one of its own.",
                where="tracking.mlflow.uri",
                hint="Write sqlite:////absolute/file.db on a folder that every node mounts, or a server's URL.",
            )
    if cluster.is_remote:
        return  # what is installed there, the driver there sees
    for kind, module in _MODULES.items():
        if getattr(spec.tracking, kind) is not None and importlib.util.find_spec(module) is None:
            extra = "raypeft[wandb]" if kind == "wandb" else "raypeft"
            raise SpecError(
                f"the package {module} is not installed.",
                where=f"tracking.{kind}",
                hint=f'Install it (pip install "{extra}"), or remove the key.',
            )


def untold(spec: JobSpec, cluster: Cluster, *, storage: str | None = None) -> str | None:
    """Why the default tracker is told nothing here, where that is so."""
    mlflow = spec.tracking.mlflow
    if mlflow is not None and mlflow.uri is None and _folder(cluster, storage) is None:
        return (
            "tracking.mlflow: a database file cannot live in object storage, so nothing is tracked. Write "
            "tracking: {mlflow: {uri: URL_OF_A_SERVER}}, or tracking: {mlflow: false}."
        )
    return None


def where_to_look(tracking: Tracking, name: str) -> Iterator[str]:
    """One line for each tracker: what to run or open to see a run of this name."""
    for target in tracking.targets:
        yield _LOOK[target["kind"]](target, name)


def _look_mlflow(target: Target, name: str) -> str:
    uri = _shown(target["uri"])
    see = f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else uri
    return f"MLflow: run '{name}' of experiment '{target['experiment']}': {see}"


def _look_tensorboard(target: Target, name: str) -> str:
    return f"TensorBoard: run '{name}': tensorboard --logdir {target['folder']}"


def _look_wandb(target: Target, name: str) -> str:
    if target["mode"] == "offline":
        return f"W&B: run '{name}' waits for: wandb sync {target['folder']}/wandb/offline-run-*"
    entity = f"{target['entity']}/" if target["entity"] else ""
    return f"W&B: run '{name}' of project {entity}{target['project']}: https://wandb.ai"


_LOOK: dict[str, Any] = {
    "mlflow": _look_mlflow,
    "tensorboard": _look_tensorboard,
    "wandb": _look_wandb,
}


def _folder(cluster: Cluster, storage: str | None) -> Path | None:
    """Beside the runs, on this machine's own disk or a folder that all nodes see; None on object storage."""
    if cluster.kind == "local" and storage is None:
        return home()
    place = storage or cluster.storage
    return Path(place.removeprefix("file://")).expanduser().absolute() if is_local(place) else None


def _place(given: str | None, folder: Path | None, name: str) -> str:
    """Where files of a tracker are; in this user's own folder where the runs are in object storage."""
    return str(Path(given).expanduser().absolute() if given else (folder or home()) / name)


def _absolute(uri: str | None) -> str | None:
    """A relative database file as an absolute one: the process is nobody's working directory."""
    if uri is None or not uri.startswith(_SQLITE):
        return uri
    path = Path(uri.removeprefix(_SQLITE)).expanduser()
    return f"{_SQLITE}{path.absolute()}"


def _shown(uri: str) -> str:
    """Without a user's name and password."""
    return re.sub(r"//[^/@]*@", "//", uri)
