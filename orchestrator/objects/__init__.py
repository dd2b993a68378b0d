"""Files by URL, with the two writes that keep processes apart: create unless there, replace unless changed.

Object stores have no rename, and fsspec's exclusive create looks first and writes then, so that two may
both succeed. Here: on this machine hard links and a lock on the folder; on S3 If-None-Match and If-Match.
On any other storage these writes are refused, and reading works. A folder is there once its manifest is,
which is written last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import fsspec

from ..errors import StorageError
from .again import persistently, turns
from .failures import NotFound, explained
from .local import LocalObjects
from .s3 import S3Objects

__all__ = [
    "NotFound", "check_writable", "clean", "create_if_absent", "delete", "delete_tree", "exists",
    "explaining", "find", "get_tree", "is_local", "join", "list_", "local_path", "nearest_existing",
    "normal_url", "persistently", "put_tree", "read", "remove_empty", "replace_if", "require_exclusive", "turns",
    "write",
]  # fmt: skip


class Objects(Protocol):
    """What each kind of storage does; paths are whole URLs, local ones absolute paths."""

    def create(self, path: str, data: bytes) -> bool: ...
    def replace(self, path: str, etag: str | None, data: bytes) -> str | None: ...
    def write(self, path: str, data: bytes) -> None: ...
    def read(self, path: str) -> tuple[bytes, str]: ...
    def exists(self, path: str) -> bool: ...
    def list_(self, path: str) -> list[str]: ...
    def find(self, path: str) -> list[str]: ...
    def delete(self, path: str) -> None: ...
    def put_tree(self, source: Path, path: str, manifest: str | None) -> None: ...
    def get_tree(self, path: str, target: Path) -> None: ...
    def delete_tree(self, path: str) -> None: ...
    def check_writable(self, path: str) -> None: ...
    def clean(self, path: str) -> None: ...


def is_local(url: str | Path) -> bool:
    """Whether `url` is a path of this machine (plain, `~/...` or `file://...`)."""
    return "://" not in str(url) or str(url).startswith("file://")


def local_path(url: str | Path) -> Path:
    """The absolute path that a local URL names.

    Raises:
        StorageError: it is not a local URL.
    """
    if not is_local(url):
        raise StorageError("this is not a folder of this machine.", where=str(url))
    return Path(os.path.abspath(Path(str(url).removeprefix("file://")).expanduser()))


def normal_url(url: str | Path) -> str:
    """One spelling of each place: an absolute path, or a URL without a slash at its end."""
    if is_local(url):
        return str(local_path(url))
    return str(url).rstrip("/").replace("s3a://", "s3://", 1)


def join(url: str | Path, *parts: str | int) -> str:
    """`url` with `parts` below it, each separated by one slash."""
    return "/".join([str(url).rstrip("/"), *(str(part).strip("/") for part in parts)])


def create_if_absent(url: str | Path, data: bytes) -> bool:
    """Writes `data` unless something is there already; of any number of writers exactly one gets True.

    Raises:
        StorageError: read-only, full, no permission, no such bucket, or a storage that cannot do it.
    """
    return _objects(url).create(normal_url(url), data)


def replace_if(url: str | Path, etag: str | None, data: bytes) -> str | None:
    """Writes `data` if what is there still is what `etag` (from `read`) stood for; None: if nothing is there.

    Returns:
        The new etag, or None where somebody else was first: read again and decide anew.

    Raises:
        StorageError: as for `create_if_absent`.
    """
    return _objects(url).replace(normal_url(url), etag, data)


def write(url: str | Path, data: bytes) -> None:
    """Writes `data` whatever is there: whole or not at all. For files that one process owns."""
    _objects(url).write(normal_url(url), data)


def read(url: str | Path) -> tuple[bytes, str]:
    """The content and its etag.

    Raises:
        NotFound: nothing is there.
        StorageError: it cannot be read.
    """
    return _objects(url).read(normal_url(url))


def exists(url: str | Path) -> bool:
    """Whether a file, or a folder with something in it, is there."""
    return _objects(url).exists(normal_url(url))


def list_(url: str | Path) -> list[str]:
    """Names directly below `url`, files and folders, sorted; those that begin with a dot are left out."""
    return _objects(url).list_(normal_url(url))


def find(url: str | Path) -> list[str]:
    """Paths of all files below `url`, relative to it, sorted; without names that begin with a dot."""
    return _objects(url).find(normal_url(url))


def delete(url: str | Path) -> None:
    """Removes one file; nothing happens where there is none."""
    _objects(url).delete(normal_url(url))


def put_tree(source: str | Path, url: str | Path, manifest: str | None = None) -> None:
    """Copies a local folder to `url`: here by one rename, elsewhere file by file with `manifest` last.

    Raises:
        StorageError: something is there already, or the storage refuses; what was written is taken away.
    """
    target = normal_url(url)
    if _has_file(join(target, manifest)) if manifest else exists(target):
        raise StorageError("something is there already.", where=target, hint="Nothing was written.")
    _objects(url).put_tree(Path(source), target, manifest)


def get_tree(url: str | Path, target: str | Path, check: Callable[[Path], None] = lambda copy: None) -> Path:
    """Copies the folder at `url` to the local folder `target`, which appears whole; returns its path.

    Args:
        check: looks at the complete copy before it gets its name, and raises to have it thrown away.

    Raises:
        NotFound: nothing is there.
        StorageError: `target` exists and is not empty, or cannot be written.
    """
    folder = local_path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(
            "something is there already.", where=str(folder), hint="Name a new or empty folder."
        )

    def fill(aside: Path) -> None:
        _objects(url).get_tree(normal_url(url), aside)
        check(aside)

    _LOCAL.receive_tree(folder, fill)
    return folder


def delete_tree(url: str | Path) -> None:
    """Removes a folder and what is in it; nothing happens where there is none."""
    _objects(url).delete_tree(normal_url(url))


def check_writable(url: str | Path) -> None:
    """Tries a write at `url` and takes it away again: a job need not train to learn that it cannot store.

    Raises:
        StorageError: read-only, full, no permission, no such bucket, or unable to keep writers apart.
    """
    _objects(url).check_writable(normal_url(url))


def require_exclusive(url: str | Path) -> None:
    """Raises StorageError where two writers at `url` could not be kept apart, before anything is looked up there."""
    if _objects(url) is _OTHER:
        _OTHER.refuse(normal_url(url))


def clean(url: str | Path) -> None:
    """Removes what killed processes left half-written directly in the folder `url`."""
    _objects(url).clean(normal_url(url))


@contextlib.contextmanager
def explaining(where: str) -> Iterator[None]:
    """Within it an OSError becomes the StorageError that says what the matter is and what to do."""
    try:
        yield
    except OSError as error:
        raise explained(error, where) from error


def nearest_existing(url: str | Path) -> str:
    """`url`, or the nearest folder above it that exists. Object stores have no folders: there it is `url`."""
    folder = Path(normal_url(url))
    while is_local(url) and not folder.exists():
        folder = folder.parent
    return str(folder) if is_local(url) else normal_url(url)


def remove_empty(url: str | Path, below: str | Path) -> None:
    """Removes the local folder `url` if it is empty, and likewise those above it, up to `below`."""
    if is_local(url):
        _LOCAL.remove_empty(normal_url(url), normal_url(below))


def _has_file(url: str) -> bool:
    """Cheaper than `exists`, which looks for a folder too."""
    try:
        read(url)
    except NotFound:
        return False
    return True


class _ReadOnly:
    """Any other file system that fsspec knows: read, never written."""

    def read(self, path: str) -> tuple[bytes, str]:
        try:
            with fsspec.open(path, "rb") as file:
                return file.read(), ""
        except Exception as error:
            raise explained(error, path) from error

    def exists(self, path: str) -> bool:
        try:
            filesystem, inner = fsspec.url_to_fs(path)
            return filesystem.exists(inner)
        except Exception as error:
            raise explained(error, path) from error

    def list_(self, path: str) -> list[str]:
        try:
            filesystem, inner = fsspec.url_to_fs(path)
            names = (entry.rstrip("/").rpartition("/")[2] for entry in filesystem.ls(inner, detail=False))
            return sorted(name for name in names if not name.startswith("."))
        except FileNotFoundError:
            return []
        except Exception as error:
            raise explained(error, path) from error

    def find(self, path: str) -> list[str]:
        try:
            filesystem, inner = fsspec.url_to_fs(path)
            root = inner.rstrip("/") + "/"
            names = sorted(name.removeprefix(root) for name in filesystem.find(inner))
        except FileNotFoundError:
            return []
        except Exception as error:
            raise explained(error, path) from error
        return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]

    def get_tree(self, path: str, target: Path) -> None:
        try:
            filesystem, inner = fsspec.url_to_fs(path)
            if not filesystem.isdir(inner):
                raise NotFound("there is no such folder.", where=path)
            root = inner.rstrip("/") + "/"
            for name in filesystem.find(inner):
                local = target / name.removeprefix(root).removeprefix("/")
                local.parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(name, str(local))
        except Exception as error:
            raise explained(error, path) from error

    def __getattr__(self, operation: str):
        if operation.startswith("_"):
            raise AttributeError(operation)
        return self.refuse

    def refuse(self, *arguments: object) -> None:
        url = next(str(argument) for argument in arguments if "://" in str(argument))
        raise StorageError(
            f"{url.partition('://')[0]}:// has no write here that fails if another process was first, "
            "so runs and registries cannot live there.",
            where=url,
            hint="Use a folder that all nodes see, or s3://BUCKET/FOLDER.",
        )


_LOCAL, _S3, _OTHER = LocalObjects(), S3Objects(), _ReadOnly()


def _objects(url: str | Path) -> Objects:
    if is_local(url):
        return _LOCAL
    if str(url).startswith(("s3://", "s3a://")):
        return _S3
    return _OTHER  # type: ignore[return-value]
