"""What a job takes along: its resolved spec, its cluster file, and the local files that the spec names.

A path below the working directory keeps its name; any other is moved to `files/` and its key changed. The
folder becomes the job's working directory on every node, so local data and a local base travel too, up to the
size that Ray's Jobs API takes.
"""

from __future__ import annotations

import glob
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Any

from ..cluster import INSIDE, Cluster
from ..errors import DataError
from ..spec.canonical import resolved_yaml
from ..spec.job import JobSpec
from ..spec.load import spec_from_values
from ..spec.space import places_of

UPLOAD_LIMIT_BYTES = 100 * 1024**2
"""Ray's dashboard takes no larger request (`DASHBOARD_CLIENT_MAX_SIZE`)."""
SPEC_FILE, CLUSTER_FILE, START_FILE = "job.yaml", "cluster.yaml", "start.sh"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SKIPPED = {"__pycache__", ".git", ".cache"}

START = """\
# Runs its arguments with the Python that Ray runs, which need not be on PATH: the parent of this shell is
# Ray's supervisor of the job, whose parent, the raylet, was told how to start Python.
raylet=$(sed 's/.*) //' /proc/$PPID/stat 2>/dev/null | cut -d' ' -f2)
told=$(tr '\\0' '\\n' 2>/dev/null < "/proc/$raylet/cmdline" | grep '^--python_worker_command=')
told=${told#*=}
python=${told%% *}
if [ -n "$RAYPEFT_INSTALLED" ]; then python=python; fi  # what was installed for this job is on PATH
exec "${python:-python3}" "$@"
"""


@dataclass(frozen=True)
class LocalFile:
    """A key of the spec that names something on this machine."""

    key: str
    written: str
    """As the spec has it."""
    sent_as: str
    """Its path in the job's working directory."""
    files: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        """All its files, not compressed."""
        return sum(path.stat().st_size for path in self.files)


@dataclass(frozen=True)
class Payload:
    """A spec made ready to travel."""

    spec: JobSpec
    """With the keys changed that name local files or secrets."""
    local: tuple[LocalFile, ...]
    texts: dict[str, str] = field(repr=False)
    """Name -> content of the files that are written for the job."""

    def zip(self) -> bytes:
        """The job's working directory; the same bytes for the same content.

        Raises:
            DataError: it is larger than Ray takes.
        """
        with TemporaryFile() as target:
            with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for name, text in sorted(self.texts.items()):
                    archive.writestr(_entry(name), text)
                for local in self.local:
                    for name, path in _members(local):
                        with archive.open(_entry(name), "w") as entry, open(path, "rb") as source:
                            while block := source.read(1 << 20):
                                entry.write(block)
                                if target.tell() > UPLOAD_LIMIT_BYTES:
                                    raise self._too_large()
            if target.tell() > UPLOAD_LIMIT_BYTES:
                raise self._too_large()
            target.seek(0)
            return target.read()

    def _too_large(self) -> DataError:
        largest = max(self.local, key=lambda local: local.size_bytes)
        total = sum(local.size_bytes for local in self.local)
        return DataError(
            f"'{largest.written}' ({_mb(largest.size_bytes)}) cannot travel with the job: its local files "
            f"are {_mb(total)}, and Ray's Jobs API takes {_mb(UPLOAD_LIMIT_BYTES)} (compressed).",
            where=largest.key,
            hint="Copy it to storage that the cluster reads and name that: s3://..., or a folder that every "
            "node mounts, or a hub id.",
        )


def pack(spec: JobSpec, cluster: Cluster) -> Payload:
    """The job's files, found but not yet read.

    Raises:
        DataError: a file or a folder that the spec names is not here.
    """
    values = spec.model_dump(mode="json", by_alias=True)
    local = tuple(_local_files(values))
    values["secrets"] = dict.fromkeys(values["secrets"], "env")
    travelling = spec_from_values(values, "the job as it is sent")
    texts = {
        SPEC_FILE: resolved_yaml(travelling),
        CLUSTER_FILE: cluster_inside(cluster),
        START_FILE: START,
    }
    return Payload(travelling, local, texts)


def cluster_inside(cluster: Cluster) -> str:
    """The cluster file that the job itself works with: the same places, and the Ray that it runs in."""
    lines = ["kind: address", f"address: {INSIDE}"]
    if cluster.shared:
        lines += [f'storage: "{cluster.storage}"', f'registry: "{cluster.registry}"']
    lines.append(f'serve: {{host: "{cluster.serve.host}", port: {cluster.serve.port}}}')
    return "\n".join(lines) + "\n"


def _local_files(values: dict[str, Any]) -> Iterator[LocalFile]:
    """Finds the keys that name something on this machine, and changes those whose path cannot stay."""
    owners: list[tuple[Any, Any, str]] = [(values["model"], "base_model", "model.base_model")]
    owners += [(each, "path", f"data.datasets.{i}.path") for i, each in enumerate(values["data"]["datasets"])]
    owners += [(each, "path", f"eval.datasets.{i}.path") for i, each in enumerate(values["eval"]["datasets"])]
    owners.append((values["adapter"], "init_from", "adapter.init_from"))
    drawn = places_of((values.get("sweep") or {}).get("space", {}), "adapter", "init_from")
    owners += [(owner, name, "sweep.space: adapter.init_from") for owner, name in drawn]
    for number, (owner, name, key) in enumerate(owners):
        written = owner[name] if isinstance(owner, list) else owner.get(name)
        if not written or not _is_here(written):
            continue
        sent_as = _sent_as(written, number)
        yield LocalFile(key, written, sent_as, tuple(_files(written, key)))
        owner[name] = sent_as


def _is_here(written: str) -> bool:
    """Whether a path of the spec is something on this machine: not a URL, not a hub id, not NAME@V."""
    if "://" in written:
        return False
    return bool(glob.glob(os.path.expanduser(written))) or Path(written).expanduser().exists()


def _sent_as(written: str, number: int) -> str:
    path = PurePosixPath(written)
    if path.is_absolute() or ".." in path.parts or written.startswith("~"):
        return f"files/{number}/{path.name}"
    return str(path)


def _files(written: str, key: str) -> Iterator[Path]:
    matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(written)))] or [
        Path(written).expanduser()
    ]
    for match in matches:
        found = sorted(match.rglob("*")) if match.is_dir() else [match]
        for path in found:
            if path.is_file() and not _SKIPPED.intersection(path.parts):
                if not os.access(path, os.R_OK):
                    raise DataError(f"'{path}' cannot be read.", where=key, hint="Check its permissions.")
                yield path


def _members(local: LocalFile) -> Iterator[tuple[str, Path]]:
    """Each file and its name in the job's working directory."""
    written = Path(local.written).expanduser()
    for path in local.files:
        if written.is_dir():
            yield f"{local.sent_as}/{path.relative_to(written).as_posix()}", path
        elif written.is_file():
            yield local.sent_as, path
        else:  # a pattern
            folder = _fixed_part(str(written))
            yield f"{_fixed_part(local.sent_as)}/{path.relative_to(folder).as_posix()}".lstrip("/"), path


def _fixed_part(pattern: str) -> str:
    """The folders of a pattern before its first wildcard."""
    parts: list[str] = []
    for part in pattern.split("/")[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return "/".join(parts) or "."


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(str(PurePosixPath(name)), _EPOCH)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    return entry


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:,.0f} kB"
