"""Folders of model files, wherever they are: a directory, an fsspec URL, a hub id. Only safetensors hold
weights.

What is fetched from a URL is kept under `$XDG_CACHE_HOME/raypeft/folders` (`~/.cache` by default), what is
fetched from the hub in the hub's own cache; once per machine: processes that want the same folder wait for the
one that fetches it.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
from huggingface_hub import constants

from peft_dist.errors import PeftDistError


class FolderError(PeftDistError, OSError):
    """A folder that is not there or cannot be read; `str()` says which and why."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an fsspec URL such as s3://bucket/folder."""
    return "://" in os.fspath(path)


def is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Whether `path` can be NAME or ORGANISATION/NAME on the hub, and is no directory here."""
    text = os.fspath(path)
    parts = text.split("/")
    return (
        not is_url(text)
        and not Path(text).exists()
        and len(parts) <= 2
        and all(part and part not in (".", "..", "~") for part in parts)
    )


# What else `huggingface_hub.snapshot_download` is told.
HUB_OPTIONS = frozenset(
    [
        "cache_dir",
        "endpoint",
        "etag_timeout",
        "force_download",
        "headers",
        "library_name",
        "library_version",
        "local_dir",
        "local_files_only",
        "user_agent",
    ]
)


def local_folder(
    path: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: Any = None,
    **hub: Any,
) -> Path:
    """A local directory with those files of `path` that match a pattern; fetched first where it is elsewhere.

    Args:
        hub: some of `HUB_OPTIONS`, such as `cache_dir`; nothing where it is on no hub.

    Raises:
        FolderError: it is nowhere, or cannot be reached or read.
    """
    if is_url(path):
        return _fetched(os.fspath(path).rstrip("/"), patterns)
    if (here := Path(path).expanduser()).is_dir():
        return here
    if is_hub_id(path):
        return _from_hub(os.fspath(path), patterns, revision=revision, token=token, **hub)
    raise FolderError(f"{os.fspath(path)!r} is not a directory. {WHERE}")


WHERE = "Name a directory, an fsspec URL (s3://...) or a hub id (ORGANISATION/NAME)."


def check_safetensors(file: Path) -> None:
    """Reads the header alone, and compares the file's size with it.

    Raises:
        FolderError: it is not a safetensors file, or is cut short.
    """
    size = file.stat().st_size
    with open(file, "rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        try:
            header = json.loads(opened.read(length)) if 8 + length <= size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise FolderError(f"{file}: not a safetensors file, or cut short ({size} bytes). Copy it again.")
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise FolderError(
            f"{file}: has {size} bytes, its header says {whole}. It was cut short: copy it again."
        )


def _fetched(url: str, patterns: Sequence[str]) -> Path:
    try:
        filesystem, root = fsspec.url_to_fs(url)
        listed = [entry for entry in filesystem.ls(root, detail=True) if entry["type"] == "file"]
    except FileNotFoundError as error:
        raise FolderError(f"{url!r} does not exist. {WHERE}") from error
    except (OSError, ValueError, ImportError) as error:
        raise FolderError(f"{url!r} cannot be read: {error}") from error
    wanted = {
        entry["name"].rsplit("/", 1)[-1]: entry
        for entry in listed
        if any(fnmatch.fnmatch(entry["name"].rsplit("/", 1)[-1], pattern) for pattern in patterns)
    }
    facts = [(name, entry["size"], str(_version(entry))) for name, entry in sorted(wanted.items())]
    key = hashlib.sha256(repr((url, facts)).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raypeft" / "folders"
    cache.mkdir(parents=True, exist_ok=True)
    with _only_one(cache / f".{key}.lock"):
        if (cache / key).is_dir():
            return cache / key
        aside = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=cache))
        try:
            for name, entry in wanted.items():
                filesystem.get_file(entry["name"], str(aside / name))
            aside.rename(cache / key)
        except OSError as error:
            raise FolderError(f"{url!r} could not be fetched: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return cache / key


def _version(entry: dict[str, Any]) -> Any:
    """What changes when a file's content does, as far as its storage tells."""
    known = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
    return next((entry[key] for key in known if entry.get(key) is not None), "")


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """One process at a time. The system lets go of the lock when its holder ends, however it ends."""
    while True:
        with open(lock, "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not _is_same_file(lock, held.fileno()):
                continue  # its last holder removed it while we waited
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def upload_to_hub(
    folder: Path,
    repo_id: str,
    commit_message: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_description: str | None = None,
) -> Any:
    """Uploads a folder to a repository of the hub, which is made where it is absent, as is the branch."""
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id=repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


@contextlib.contextmanager
def _hub_lock(repository: str) -> Iterator[None]:
    """One process of the machine at a time fetches a repository; the next finds its files in the hub's cache."""
    with contextlib.ExitStack() as held:
        # Nothing can be fetched into a cache that cannot be written; what it has is read without a lock.
        with contextlib.suppress(OSError):
            locks = Path(constants.HF_HUB_CACHE) / ".locks"
            locks.mkdir(parents=True, exist_ok=True)
            held.enter_context(_only_one(locks / f"raypeft--{repository.replace('/', '--')}.lock"))
        yield


def _from_hub(repository: str, patterns: Sequence[str], **how: Any) -> Path:
    try:
        with _hub_lock(repository):
            return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns), **how))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise FolderError(
            f"{repository!r} is neither a directory here nor can it be fetched from the hub: {first_line} "
            f"{WHERE}"
        ) from error
