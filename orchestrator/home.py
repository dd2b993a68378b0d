"""Where this user's own files live: `~/.raypeft`, or `RAYPEFT_HOME`."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of local runs, adapters and the local Ray's state; it need not exist yet."""
    return Path(os.environ.get("RAYPEFT_HOME") or "~/.raypeft").expanduser().absolute()
