"""A merge that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """What is to be merged.

    Args:
        base: a directory, an fsspec URL or a hub id. revision: of a hub id.
        adapter: a directory.
        dtype: of the floating weights: a name, or None for each tensor's own.
        labels: of a head's classes, where they are known. origin: what `merged_from.json` says.
    """

    base: str
    adapter: str
    revision: str | None = None
    dtype: str | None = None
    max_shard_size: int | str = "5GB"
    trust_remote_code: bool = False
    labels: tuple[str, ...] = ()
    origin: Mapping[str, Any] | None = None
