"""The driver of a merge: one task plans it and writes the headers, several write the tensors, each its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from peft_dist.errors import PeftDistError

from ..errors import ClusterError, ModelError, PlacementError, RaypeftError
from ..machine import free_bytes
from ..runner import Event
from . import part
from .room import crew, shares


def write_files(
    request: dict[str, Any], folder: str, workers: int | None, on_event: Callable[[Event], None]
) -> dict[str, Any]:
    """Fills `folder` with the merged checkpoint; this process is a driver of Ray.

    Args:
        request: the fields of `peft_dist.merged.offline.Request`.
        workers: at most so many tasks; None: by what there is.

    Returns:
        `files`, `num_workers`, `num_bytes`, `num_parameters`.

    Raises:
        ModelError: base or adapter cannot be merged. PlacementError: there is no memory for it.
    """
    # The files are here, so the tasks are.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 1, "scheduling_strategy": here}
    asked = part.Request(**request)
    try:
        found = ray.get(ray.remote(part.prepare).options(**options, max_retries=1).remote(asked, folder))
        chosen = crew(
            workers,
            num_steps=len(found["sizes"]),
            num_cpus=int(ray.cluster_resources().get("CPU", 1)),
            idle_bytes=found["idle_bytes"],
            largest_bytes=found["largest_bytes"],
            free_bytes=free_bytes(),
        )
        if chosen.reason:
            on_event({"event": "warning", "message": chosen.reason})
        total = sum(found["sizes"])
        on_event({"event": "merging", "bytes": 0, "total_bytes": total, "num_workers": chosen.num_workers})
        task = ray.remote(part.write).options(**options, num_returns="streaming", max_retries=2)
        streams = [
            task.remote(asked, folder, share, found["digest"])
            for share in shares(found["sizes"], chosen.num_workers)
        ]
        _follow(streams, total, chosen.num_workers, on_event)
    except RayError as error:
        raise _explained(error) from error
    return {
        "files": found["files"],
        "num_workers": chosen.num_workers,
        "num_bytes": total,
        "num_parameters": found["num_parameters"],
    }


def _follow(streams: list[Any], total: int, num_workers: int, on_event: Callable[[Event], None]) -> None:
    done, open_ones = 0, list(streams)
    try:
        while open_ones:
            (ready, *_), _ = ray.wait(open_ones, num_returns=1)
            try:
                done += ray.get(next(ready))
            except StopIteration:
                open_ones.remove(ready)
                continue
            on_event({"event": "merging", "bytes": done, "total_bytes": total, "num_workers": num_workers})
    finally:
        for stream in open_ones:
            ray.cancel(stream, force=False)


def _explained(error: RayError) -> RaypeftError:
    cause = getattr(error, "cause", None)
    if isinstance(error, RayTaskError) and isinstance(cause, PeftDistError):
        return ModelError(str(cause))
    if isinstance(error, RayTaskError) and isinstance(cause, RaypeftError):
        return cause
    if isinstance(error, OutOfMemoryError):
        return PlacementError(
            "a worker was ended because memory ran out.", hint="Merge with fewer: --workers 1."
        )
    said = next(iter(str(cause or error).strip().splitlines()[-1:]), type(error).__name__)
    return ClusterError(f"a worker of the merge failed: {said}", hint="Try again; nothing was written.")
