"""Folders that are filled aside: nobody finds a half of one under its name."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def aside(target: Path | None, prefix: str) -> Iterator[Path]:
    """An empty folder to fill; gone at the end, where it was not moved. To move it is the caller's.

    Args:
        target: where it will stand; the folder is beside it, so that a rename will do. What was made of the path there
            is taken away on an error. None: it will be copied, and is among the temporary ones.
        prefix: of its name.

    Raises:
        OSError: it cannot be made.
    """
    made: list[Path] = []
    folder = None
    try:
        if target is not None:
            parent = target.absolute().parent
            made = [path for path in (parent, *parent.parents) if not path.exists()]
            parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=None if target is None else parent))
        # mkdtemp lets only its owner in; what is saved is for whoever may read the directory around it.
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)
        yield folder
    except BaseException:
        _remove(folder)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    _remove(folder)


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
