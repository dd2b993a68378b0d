"""Which code and settings a replica runs: replicas of another version are replaced by a deployment."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from .desired import Desired

_PACKAGES = Path(__file__).resolve().parents[2]


def version_of(desired: Desired) -> str:
    """Of what this process would start now: a hash over the code of both packages, and over what a replica reads once,
    when it starts."""
    settings = {"engine": asdict(desired.engine), "threads": desired.threads}
    text = json.dumps([_code(), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _code() -> str:
    digest = hashlib.sha256()
    for package in ("orchestrator", "peft_dist"):
        for path in sorted((_PACKAGES / package).rglob("*.py")):
            digest.update(f"{path.relative_to(_PACKAGES)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
