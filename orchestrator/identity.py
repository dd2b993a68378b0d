"""What a base and a job's data are, whatever they are called: hashes over their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path

import fsspec
import huggingface_hub
from huggingface_hub import constants

from .errors import DataError, closest
from .model_folder import HUB_ID, ModelFolder, looked_at, model_folder
from .objects import is_local, local_path
from .spec.job import DatasetSpec, JobSpec
from .weights_table import read_table

_WHOLE_BYTES = 32 << 20
"""Files up to this size are hashed whole, larger ones by `_SAMPLES` blocks of `_SAMPLE_BYTES`."""
_SAMPLES, _SAMPLE_BYTES = 8, 256 << 10
_PARALLEL_READS = 8
_SAYS_NOTHING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of config.json that differ between copies of one base."""


@dataclass(frozen=True)
class BaseIdentity:
    """A base model. Two are the same base when their `content_hash` is, whatever they are called."""

    name: str
    """Short: the folder's or the hub id's last part."""
    revision: str | None
    """The hub's commit; None for a directory."""
    content_hash: str
    """sha256 over config, tensor names, shapes, dtypes, sizes and (sampled) content."""
    source: str = ""
    """The absolute path, URL or hub id that it was read from."""

    def is_same(self, other: BaseIdentity) -> bool:
        """Whether both are one base."""
        return self.content_hash == other.content_hash


def base_identity(base_model: str, revision: str = "main") -> BaseIdentity:
    """Identifies a directory, an fsspec URL or a hub id; needs no torch and reads at most some MB a file.

    Raises:
        ModelError: it does not exist, is no base, or its weights are missing or truncated.
    """
    folder = model_folder(base_model, revision)
    config = {key: value for key, value in folder.config().items() if key not in _SAYS_NOTHING}
    weights = sorted(_weights_hash(folder, name, size) for name, size in folder.weight_files().items())
    content = json.dumps([config, weights], sort_keys=True)
    source = base_model if folder.revision else folder.url
    return BaseIdentity(_short_name(base_model, folder), folder.revision, _sha256(content.encode()), source)


def data_hash(spec: JobSpec) -> str:
    """sha256 over the content of a job's data: its training and its evaluation datasets, in their order.

    Files of this machine by content; files elsewhere by the checksum that their store gives; datasets of the
    hub by commit.

    Raises:
        DataError: one does not exist or cannot be read.
    """
    places = [(f"data.datasets[{i}].path", dataset) for i, dataset in enumerate(spec.data.datasets)]
    places += [(f"eval.datasets[{i}].path", dataset) for i, dataset in enumerate(spec.eval.datasets)]
    digests = [[key.partition(".")[0], _dataset_hash(dataset, key)] for key, dataset in places]
    return _sha256(json.dumps(digests).encode())


def _short_name(base_model: str, folder: ModelFolder) -> str:
    if folder.revision:
        return base_model.rpartition("/")[2]
    path = Path(folder.url)
    if path.parent.name == "snapshots":  # a folder of the hub's cache is named by its commit
        return path.parent.parent.name.rpartition("--")[2]
    return folder.url.rpartition("/")[2]


def _weights_hash(folder: ModelFolder, name: str, size: int) -> str:
    what = f"{name} of the base '{folder.given}'"
    header, _ = read_table(lambda start, end: folder.read(name, start, end), size, what)
    if size <= _WHOLE_BYTES:
        blocks: Iterator[bytes] = iter([folder.read(name)])
    else:
        step = (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            blocks = iter(
                list(
                    pool.map(lambda i: folder.read(name, i * step, i * step + _SAMPLE_BYTES), range(_SAMPLES))
                )
            )
    digest = hashlib.sha256(json.dumps([header, size], sort_keys=True).encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _dataset_hash(dataset: DatasetSpec, key: str) -> str:
    path = dataset.path
    if not is_local(path):
        return _remote_hash(path, key)
    local = local_path(path)
    if has_magic(path):
        files = [file for file in sorted(_globbed(local)) if file.is_file()]
        if not files:
            problem = f"'{path}' matches no file{looked_at(path)}."
            raise DataError(problem, where=key, hint="Check the pattern.")
        return _files_hash(files, local.parent, key)
    if local.is_dir():
        files = sorted(file for file in local.rglob("*") if file.is_file() and not _is_hidden(file, local))
        if not files:
            raise DataError(f"the folder '{path}' has no files.", where=key, hint="Put data into it.")
        return _files_hash(files, local, key)
    if local.is_file():
        return _files_hash([local], local.parent, key)
    if HUB_ID.match(path) and not local.suffix:
        return _hub_hash(path, key)
    near = (
        closest(local.name, [entry.name for entry in local.parent.iterdir()]) if local.parent.is_dir() else []
    )
    hint = f"Did you mean '{Path(path).parent / near[0]}'?" if near else "Check the path."
    raise DataError(f"'{path}' does not exist{looked_at(path)}.", where=key, hint=hint)


def _globbed(pattern: Path) -> list[Path]:
    return list(Path("/").glob(str(pattern.relative_to("/"))))


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _files_hash(files: list[Path], root: Path, key: str) -> str:
    """Over content and order alone: a file that was moved or renamed is the same data."""
    digests = []
    for file in files:
        try:
            with open(file, "rb") as content:
                digests.append(hashlib.file_digest(content, "sha256").hexdigest())
        except OSError as error:
            raise DataError(f"'{file}' cannot be read: {error.strerror}.", where=key) from error
    return _sha256(json.dumps(digests).encode())


def _remote_hash(path: str, key: str) -> str:
    try:
        filesystem, inner = fsspec.url_to_fs(path)
        found = filesystem.glob(inner) if has_magic(inner) else filesystem.find(inner)
        checksums = [str(filesystem.checksum(file)) for file in sorted(found)]
    except Exception as error:
        raise DataError(
            f"'{path}' cannot be read: {error}.", where=key, hint="Check it and its access."
        ) from error
    if not checksums:
        raise DataError(f"'{path}' does not exist.", where=key, hint="Check the address.")
    return _sha256(json.dumps(checksums).encode())


def _hub_hash(path: str, key: str) -> str:
    try:
        return str(huggingface_hub.HfApi().dataset_info(path, timeout=20).sha)
    except Exception as error:
        cached = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}" / "refs" / "main"
        if cached.is_file():
            return cached.read_text().strip()
        raise DataError(
            f"'{path}' is neither a file here nor a dataset that the hub gives.",
            where=key,
            hint="Check the path; for a dataset of the hub check the network and HF_TOKEN.",
        ) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
