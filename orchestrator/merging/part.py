"""What a worker of a merge does; runs as a task of Ray on the machine that the files are on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_dist.merged.offline import OfflineMerge
from peft_dist.merged.request import Request

from ..train.task_file import read_task_file
from ..train.worker.allocator import map_large_blocks
from .room import own_bytes

REPORT_BYTES = 64 << 20
"""A worker says how far it is each time it has written so much."""


def prepare(request: Request, folder: str) -> dict[str, Any]:
    """Checks base and adapter, and writes all but the weights; what the work comes to.

    Raises:
        PeftDistError: they cannot be merged; nothing was written.
    """
    idle_bytes = own_bytes()
    map_large_blocks()
    merge = OfflineMerge(_told(request))
    try:
        merge.check_adapter()
        merge.prepare(Path(folder))
        return {
            "sizes": merge.sizes,
            "largest_bytes": merge.largest,
            "idle_bytes": max(idle_bytes, own_bytes()),
            "digest": merge.digest,
            "files": [shard.name for shard in merge.shards],
            "num_parameters": merge.num_parameters,
        }
    finally:
        merge.close()


def write(request: Request, folder: str, steps: Sequence[int], digest: str) -> Iterator[int]:
    """Writes the tensors of the given steps; gives the bytes that are written since it last did."""
    map_large_blocks()
    merge = OfflineMerge(_told(request))
    try:
        if merge.digest != digest:
            raise RuntimeError("the base or the adapter changed while they were merged")
        written = 0
        for num_bytes in merge.write(Path(folder), steps):
            written += num_bytes
            if written >= REPORT_BYTES:
                yield written
                written = 0
        yield written
    finally:
        merge.close()


def _told(request: Request) -> Request:
    """With the labels that the adapter's folder names."""
    found = read_task_file(Path(request.adapter))
    return replace(request, labels=tuple(found.facts.labels)) if found is not None else request
