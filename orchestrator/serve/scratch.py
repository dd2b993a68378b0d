"""A process's own folder for what may be lost with it; what killed processes left is cleaned by the next one."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from ..processes import ProcessId, is_alive, this_process

_OWNER = ".owner.json"


def folder_of_this_process(prefix: str) -> Path:
    """A new folder, deleted when the process ends; those of dead processes with the same prefix are deleted now."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}-*"):
        if _is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"{prefix}-"))
    (made / _OWNER).write_text(json.dumps(asdict(this_process())))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _is_left(folder: Path) -> bool:
    try:
        return is_alive(ProcessId(**json.loads((folder / _OWNER).read_text()))) is False
    except (OSError, ValueError, TypeError):
        return False
