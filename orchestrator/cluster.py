"""Cluster files: where jobs run, and where their runs, adapters and endpoints live.

Which cluster: the flag, else `RAYPEFT_CLUSTER`, else the job's `cluster` key, else `local`. A name means
`clusters/NAME.yaml` beside the job or the working directory; `local` needs no file.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ClusterError, SpecError, closest
from .home import home
from .spec.document import decode, parse_document
from .spec.job import JobSpec
from .spec.places import Problem, Tree, raise_all

__all__ = [
    "Cluster",
    "ClusterFacts",
    "NodeFacts",
    "ServeAddress",
    "check_storage",
    "cluster_at",
    "home",
    "load_cluster",
]

Kind = Literal["local", "address", "launcher", "kuberay"]
INSIDE = "auto"
"""The address that means the Ray which this process runs in: what a submitted job's own cluster file says."""


@dataclass(frozen=True)
class NodeFacts:
    """One node of a cluster."""

    cpus: float
    gpus: float = 0
    memory: int = 0
    """Bytes; 0 where not known."""
    labels: dict[str, str] = field(default_factory=dict)
    gpu_type: str | None = None


@dataclass(frozen=True)
class ClusterFacts:
    """What a cluster has now, and the most that it can grow to."""

    nodes: tuple[NodeFacts, ...]
    max_cpus: float
    max_gpus: float
    """With the autoscaler's maximum counted; what the nodes have where there is no autoscaler."""
    max_nodes: int = 1
    ray_version: str | None = None
    python_version: str | None = None
    source: str = ""
    """Where this was read: `this machine`, an address, a file."""

    @property
    def several_nodes(self) -> bool:
        """Whether a worker may run on another node than the driver."""
        return max(self.max_nodes, len(self.nodes)) > 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServeAddress(_Part):
    """Where the cluster's endpoints listen."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000


class ClusterFile(_Part):
    """The keys of a cluster file."""

    kind: Kind
    address: str | None = Field(default=None, description="http://HOST:8265, where Ray's Jobs API answers")
    launcher: str | None = Field(
        default=None, description="the Ray cluster launcher's own file, beside this one"
    )
    manifest: str | None = Field(default=None, description="a KubeRay RayJob manifest, beside this one")
    storage: str | None = Field(
        default=None, description="runs and checkpoints: a URL or a folder that every node sees"
    )
    registry: str | None = Field(default=None, description="adapters: likewise")
    install: bool = Field(
        default=False, description="install what the cluster's environment lacks, with each job"
    )
    serve: ServeAddress = ServeAddress()


@dataclass(frozen=True)
class Cluster:
    """A cluster file, its defaults filled in and its paths made whole."""

    name: str
    kind: Kind
    storage: str
    registry: str
    address: str | None = None
    launcher: str | None = None
    manifest: str | None = None
    install: bool = False
    serve: ServeAddress = field(default_factory=ServeAddress)
    path: str | None = None
    """The file; None for the built-in `local` and for a bare address."""
    shared: bool = False
    """Whether the file (or the URL) says that every node sees `storage` and `registry`."""

    def at(self, address: str) -> Cluster:
        """This cluster's storage, registry and endpoints, with its dashboard at `address` (a forwarded port).
        The local cluster's are this machine's own: another address is another cluster then.

        Raises:
            SpecError: the address is not http://HOST:PORT.
        """
        other = cluster_at(address)
        if self.kind == "local":
            return other
        return replace(self, kind="address", address=other.address)

    @property
    def is_inside(self) -> bool:
        """Whether this process is itself a job of the cluster."""
        return self.kind == "address" and self.address == INSIDE

    @property
    def is_remote(self) -> bool:
        """Whether it is reached through Ray's Jobs API alone."""
        return self.kind != "local" and not self.is_inside


def load_cluster(
    name: str | None = None, spec_key: str | None = None, *, beside: Path | None = None
) -> Cluster:
    """The cluster that a command works on.

    Args:
        name: the flag: a name, a cluster file, or http://HOST:PORT.
        spec_key: the job's `cluster` key.
        beside: the job's folder, where `clusters/NAME.yaml` is looked for first.

    Raises:
        SpecError: no such cluster, or a file that breaks a rule; with file, line and key.
    """
    choices = (
        (name, "--cluster"),
        (os.environ.get("RAYPEFT_CLUSTER"), "RAYPEFT_CLUSTER"),
        (spec_key, "cluster"),
    )
    chosen, said_by = next(((value, source) for value, source in choices if value), ("local", "cluster"))
    if re.match(r"https?://", chosen):
        return cluster_at(chosen)
    path = _find(chosen, beside)
    if path is not None:
        return _read(path)
    if chosen == "local":
        return _defaults("local", ClusterFile(kind="local"), None)
    raise SpecError(f"there is no cluster '{chosen}'.", where=said_by, hint=_what_there_is(chosen, beside))


def check_address(address: str) -> None:
    """Raises SpecError where the address is not http://HOST:PORT."""
    if problem := _address_problem(address):
        raise SpecError(problem.problem, where="--address", hint=problem.hint)


def cluster_at(address: str) -> Cluster:
    """The cluster behind a bare address, everything else at its default.

    Raises:
        SpecError: the address is not http://HOST:PORT.
    """
    check_address(address)
    return _defaults(address, ClusterFile(kind="address", address=address.rstrip("/")), None)


def check_storage(spec: JobSpec, cluster: Cluster, facts: ClusterFacts) -> None:
    """What a run writes must be found again: by each node of the cluster, and after the job.

    Raises:
        ClusterError: several nodes, and nothing names storage that all of them see.
        SpecError: a relative `storage.path`, which would be the folder of one job on one node.
    """
    place = spec.storage.path
    if cluster.kind != "local" and place and "://" not in place and not place.startswith(("/", "~")):
        raise SpecError(
            f"'{place}' is a relative folder, which on a cluster is gone with the job.",
            where="storage.path",
            hint="Write a URL (s3://bucket/folder) or an absolute folder that every node mounts.",
        )
    if not facts.several_nodes or cluster.shared:
        return
    base = spec.model.base_model
    is_here = "://" not in base and Path(base).expanduser().exists()
    local_base = f", nor is the base '{base}'" if is_here else ""
    raise ClusterError(
        f"the cluster has several nodes (up to {max(facts.max_nodes, len(facts.nodes))}), and nothing names "
        "storage that all of them see: checkpoints and adapters written on one node are not found on "
        f"another{local_base}.",
        where=cluster.path or cluster.name,
        hint="Name shared storage in a cluster file: storage: s3://BUCKET/runs and registry: "
        "s3://BUCKET/adapters, or folders that every node mounts; put a local base there too.",
    )


def _find(chosen: str, beside: Path | None) -> Path | None:
    if chosen.endswith((".yaml", ".yml")) or "/" in chosen:
        for folder in _folders(beside):
            if (folder / chosen).is_file():
                return folder / chosen
        return Path(chosen) if Path(chosen).is_file() else None
    for folder in _folders(beside):
        for candidate in (folder / "clusters" / f"{chosen}.yaml", folder / f"{chosen}.yaml"):
            if candidate.parent.name == "clusters" and candidate.is_file():
                return candidate
    return None


def _folders(beside: Path | None) -> list[Path]:
    """Where cluster files are looked for: the working directory, the job's folder, the folder above it."""
    cwd = Path.cwd()
    return [cwd] if beside is None else [beside.absolute(), beside.absolute().parent, cwd]


def _what_there_is(chosen: str, beside: Path | None) -> str:
    if chosen.endswith((".yaml", ".yml")) or "/" in chosen:
        return "Check the path; a cluster is a file, a name, or http://HOST:8265."
    names = {"local"}
    for folder in _folders(beside):
        names |= {path.stem for path in (folder / "clusters").glob("*.yaml") if _is_cluster_file(path)}
    near = closest(chosen, names)
    start = f"Closest: '{near[0]}'. " if near else ""
    return f"{start}Known: {', '.join(sorted(names))}. Or name a file, or http://HOST:8265."


def _is_cluster_file(path: Path) -> bool:
    """Ray's own files lie beside ours; only ours have a `kind` of ours."""
    try:
        return re.search(r"^kind: *(local|address|launcher|kuberay)\b", path.read_text(), re.M) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _read(path: Path) -> Cluster:
    try:
        text = decode(path.read_bytes(), str(path))
    except OSError as error:
        raise SpecError(
            f"the cluster file cannot be read ({error.strerror}).",
            where=str(path),
            hint="Check its permissions.",
        ) from error
    tree = parse_document(text, str(path))
    try:
        file = ClusterFile(**tree.values)
    except ValidationError as error:
        raise_all(tree.errors(_explain(detail) for detail in error.errors()))
        raise
    raise_all(tree.errors(_broken_rules(file, tree, path.parent)))
    return _defaults(path.stem, file, path)


def _explain(detail: Any) -> Problem:
    """One of pydantic's findings in our words."""
    path, value = tuple(detail["loc"]), detail.get("input")
    keys = ServeAddress.model_fields if path[:1] == ("serve",) else ClusterFile.model_fields
    if detail["type"] == "extra_forbidden":
        near = closest(str(path[-1]), keys)
        hint = f"Closest: '{near[0]}'." if near else f"Known: {', '.join(keys)}."
        return Problem(path, f"'{path[-1]}' is not a key of a cluster file.", hint)
    if path == ("kind",):
        kinds = ", ".join(Kind.__args__)  # type: ignore[attr-defined]
        if detail["type"] == "missing":
            return Problem(path, "a cluster file needs a kind.", f"One of: {kinds}.")
        near = closest(str(value), Kind.__args__)  # type: ignore[attr-defined]
        start = f"Closest: '{near[0]}'. " if near else ""
        return Problem(path, f"'{value}' is not a kind of cluster.", f"{start}One of: {kinds}.")
    if path == ("serve", "port"):
        return Problem(path, f"{value!r} is not a port.", "Write a number from 1 to 65535.")
    wanted = {"install": "true or false", "serve": "a mapping: {host: ..., port: ...}"}.get(
        str(path[-1]), "text"
    )
    return Problem(path, f"{value!r} is not {wanted}.", "Change the value.")


def _broken_rules(file: ClusterFile, tree: Tree, folder: Path) -> list[Problem]:
    problems = []
    needed = {"address": "address", "launcher": "launcher", "kuberay": "manifest"}.get(file.kind)
    if needed and getattr(file, needed) is None:
        example = {"address": "http://HOST:8265", "launcher": "my-ray.yaml", "manifest": "rayjob.yaml"}[
            needed
        ]
        problems.append(
            Problem((needed,), f"kind {file.kind} needs '{needed}'.", f"Write {needed}: {example}")
        )
    for key, kinds in {
        "address": ("address", "launcher", "kuberay"),
        "launcher": ("launcher",),
        "manifest": ("kuberay",),
        "install": ("address", "launcher", "kuberay"),
    }.items():
        if tree.get((key,)) not in (None, False) and key in tree.values and file.kind not in kinds:
            problems.append(
                Problem((key,), f"kind {file.kind} has no '{key}'.", "Remove it, or change the kind.")
            )
    if file.address not in (None, INSIDE) and (problem := _address_problem(file.address)):
        problems.append(problem)
    for key in ("launcher", "manifest"):
        value = getattr(file, key)
        if value is not None and not (folder / value).is_file():
            problems.append(
                Problem((key,), f"there is no file '{folder / value}'.", "Name a file beside this one.")
            )
    for key in ("storage", "registry"):
        value = getattr(file, key)
        if value and file.kind != "local" and "://" not in value and not value.startswith(("/", "~")):
            problems.append(
                Problem(
                    (key,),
                    f"'{value}' is a relative folder, and the nodes have no folder in common to start from.",
                    "Write a URL (s3://bucket/folder) or an absolute folder that every node mounts.",
                )
            )
    return problems


def _address_problem(address: str) -> Problem | None:
    if re.fullmatch(r"https?://(\[[0-9a-fA-F:]+\]|[\w.-]+)(:\d{1,5})?(/[\w./-]*)?", address):
        return None
    hint = "Write the dashboard's address, http://HOST:8265."
    if address.startswith("ray://"):
        hint = "ray:// is the Ray client's; jobs go to the dashboard's address, http://HOST:8265."
    return Problem(("address",), f"'{address}' is not an address.", hint)


def _defaults(name: str, file: ClusterFile, path: Path | None) -> Cluster:
    folder = path.parent.absolute() if path else Path.cwd()

    def beside(value: str | None) -> str | None:
        return str(folder / value) if value else None

    return Cluster(
        name=name,
        kind=file.kind,
        storage=_whole(file.storage, folder) or str(home() / "runs"),
        registry=_whole(file.registry, folder) or str(home() / "registry"),
        address=file.address.rstrip("/") if file.address else None,
        launcher=beside(file.launcher),
        manifest=beside(file.manifest),
        install=file.install,
        serve=file.serve,
        path=str(path) if path else None,
        shared=file.storage is not None and file.registry is not None,
    )


def _whole(place: str | None, folder: Path) -> str | None:
    """A URL as it is, a folder absolute."""
    if not place or "://" in place:
        return place.rstrip("/") if place else None
    return str(folder / Path(place).expanduser())
