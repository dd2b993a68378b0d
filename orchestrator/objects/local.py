"""Files and folders: hard links for exclusive creates, a folder's lock for replacements, rename for both.

What is being written carries a name that no reader takes and that says whose it is
(`.NAME.HOST-PID-STARTED-RANDOM.tmp`), so that what a killed process left is known as such and cleaned.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import StorageError
from ..processes import ProcessId, is_alive, this_process
from .failures import explained

_ASIDE = re.compile(r"^\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{8}\.tmp$")
_ABANDONED_S = 24 * 3600
"""Age after which another host's unfinished write counts as left behind, in seconds."""
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class LocalObjects:
    """The operations of `objects.py` on paths of this machine (or of a file system that it has mounted)."""

    def create(self, path: str, data: bytes) -> bool:
        target = Path(path)
        with _explaining(path), _parent_of(target):
            if target.exists():
                return False
            with _written_aside(target, data) as aside:
                return _link(aside, target)

    def replace(self, path: str, etag: str | None, data: bytes) -> str | None:
        if etag is None:
            return _etag(data) if self.create(path, data) else None
        target = Path(path)
        with _explaining(path):
            if not target.exists():
                return None
            with _locked(target.parent):
                if not target.exists() or _etag(target.read_bytes()) != etag:
                    return None
                with _written_aside(target, data) as aside:
                    os.replace(aside, target)
                    _sync(target.parent)
        return _etag(data)

    def write(self, path: str, data: bytes) -> None:
        target = Path(path)
        with _explaining(path), _parent_of(target), _written_aside(target, data) as aside:
            os.replace(aside, target)
            _sync(target.parent)

    def read(self, path: str) -> tuple[bytes, str]:
        with _explaining(path):
            data = Path(path).read_bytes()
        return data, _etag(data)

    def exists(self, path: str) -> bool:
        with _explaining(path):
            return Path(path).exists()

    def list_(self, path: str) -> list[str]:
        with _explaining(path):
            try:
                return sorted(name for name in os.listdir(path) if not name.startswith("."))
            except FileNotFoundError:
                return []

    def find(self, path: str) -> list[str]:
        found = []
        for folder, folders, files in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inner = os.path.relpath(folder, path)
            found += [os.path.normpath(f"{inner}/{name}") for name in files if not name.startswith(".")]
        return sorted(found)

    def delete(self, path: str) -> None:
        with _explaining(path):
            Path(path).unlink(missing_ok=True)

    def put_tree(self, source: Path, path: str, manifest: str | None) -> None:
        del manifest  # a folder appears whole, by one rename
        target = Path(path)
        with _explaining(path), _parent_of(target):
            _copy_whole(source, target)

    def get_tree(self, path: str, target: Path) -> None:
        with _explaining(path):
            if not Path(path).is_dir():
                raise FileNotFoundError(path)
        with _explaining(str(target)):
            _copy_folder(Path(path), target)

    def receive_tree(self, target: Path, fill: Callable[[Path], None]) -> None:
        """`target` appears whole once `fill` has written a folder beside it."""
        with _explaining(str(target)), _parent_of(target):
            aside = _aside_name(target)
            try:
                with _making(str(target)):
                    aside.mkdir()
                fill(aside)
                os.rename(aside, target)
                _sync(target.parent)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise

    def delete_tree(self, path: str) -> None:
        target = Path(path)
        with _explaining(path):
            if not target.exists():
                return
            aside = _aside_name(target)
            os.rename(target, aside)  # one step: nobody sees half a folder
            shutil.rmtree(aside)

    def remove_empty(self, path: str, below: str) -> None:
        folder = Path(path)
        while folder != Path(below) and folder.is_relative_to(below):
            try:
                folder.rmdir()
            except OSError:  # not empty, or not ours to remove
                return
            folder = folder.parent

    def check_writable(self, path: str) -> None:
        folder = Path(path).absolute()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with _explaining(path), _making(path), _written_aside(folder / "probe", b"\0" * 65536):
            pass

    def clean(self, path: str) -> None:
        with _explaining(path), contextlib.suppress(FileNotFoundError):
            for entry in list(os.scandir(path)):
                if (parts := _ASIDE.match(entry.name)) and _is_abandoned(parts, entry):
                    _remove(Path(entry.path))


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _explaining(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explained(error, where) from error


@contextlib.contextmanager
def _making(where: str) -> Iterator[None]:
    """Within it "no such file" means that the file system lets nothing be made, such as /proc."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            "nothing can be written here.", where=where, hint="Name another folder."
        ) from error


@contextlib.contextmanager
def _parent_of(target: Path) -> Iterator[None]:
    """Makes the folders above `target`; takes back those it made if what follows fails."""
    missing = []
    folder = target.parent
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    try:
        with _making(str(target.parent)):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()
        raise


def _aside_name(target: Path) -> Path:
    owner = this_process()
    mark = f"{_host_mark(owner)}-{owner.pid}-{owner.started}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.name}.{mark}.tmp")


def _host_mark(process: ProcessId) -> str:
    return hashlib.sha256(f"{process.host} {process.boot}".encode()).hexdigest()[:8]


@contextlib.contextmanager
def _written_aside(target: Path, data: bytes) -> Iterator[Path]:
    """A complete, synced file beside `target`; gone afterwards unless it was renamed."""
    aside = _aside_name(target)
    try:
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield aside
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _link(aside: Path, target: Path) -> bool:
    """Gives `aside` the name `target` unless that is taken; True where it was free."""
    try:
        os.link(aside, target)
    except FileExistsError:
        # a network file system may repeat a request of which the answer got lost, and meet its own link
        return os.path.samefile(aside, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with _locked(target.parent):  # a file system without hard links
            if target.exists():
                return False
            os.replace(aside, target)
    _sync(target.parent)
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among those who replace files in `folder`; the lock is on the folder and leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EINVAL):
                raise
            # NFS turns flock into a byte-range lock, which needs a descriptor open for writing
            os.close(descriptor)
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _copy_whole(source: Path, target: Path) -> None:
    """Copies a folder; `target` appears complete or not at all. It may exist only as an empty folder."""
    aside = _aside_name(target)
    try:
        _copy_folder(source, aside)
        os.rename(aside, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _copy_folder(source: Path, target: Path) -> None:
    # not shutil.copytree, which hides the error number (a full disk) in a list of sentences
    target.mkdir(exist_ok=True)
    for entry in sorted(source.iterdir()):
        if _ASIDE.match(entry.name):
            continue
        if entry.is_dir():
            _copy_folder(entry, target / entry.name)
        else:
            with open(entry, "rb") as reader, open(target / entry.name, "xb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
                writer.flush()
                os.fsync(writer.fileno())


def _is_abandoned(parts: re.Match[str], entry: os.DirEntry[str]) -> bool:
    here = this_process()
    if parts["host"] == _host_mark(here):
        return not is_alive(ProcessId(here.host, here.boot, int(parts["pid"]), int(parts["started"])))
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_S


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
