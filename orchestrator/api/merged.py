"""An adapter merged into its base's files."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import wiring
from ..adapter_folder import check_adapter
from ..cluster import load_cluster
from ..merging.merge import Adapter as AdapterToMerge
from ..merging.merge import MergeResult, check_out
from ..merging.merge import merge as merge_adapter
from ..service import OnEvent
from .found import ignore, registry_of
from .own_ray import is_up, leave, stays_up
from .signals import handled, interrupt


def merge(
    ref: str,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    workers: int | None = None,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    cluster: str | None = None,
    on_event: OnEvent = ignore,
) -> MergeResult:
    """Writes an adapter's base with the adapter in its weights as a complete Hugging Face model, without loading
    either: the base's files are read and written layer by layer, by tasks of the local Ray.

    Args:
        ref: NAME@V of the registry, or a directory, URL or hub id of an adapter.
        out: a directory or URL that is not there yet; it appears when it is whole.
        base: in the place of the base that the adapter was trained on.
        dtype: of the weights, such as `bfloat16`; None: as the base has them.
        workers: at most so many tasks; None: by the machine's processors. Memory may allow fewer.
        max_shard_size: of one file, such as `5GB`.
        trust_remote_code: run the Python code that comes with the base.

    Raises:
        RegistryError: there is no such version.
        ModelError: the adapter cannot be merged, or the base is not there or another one.
        StorageError: `out` is taken or cannot be written.
        PlacementError: there is no memory for one worker.
    """
    where = load_cluster(cluster)
    check_out(out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(handled((signal.SIGTERM,), interrupt))  # what was half-made is taken away
        adapter = stack.enter_context(_adapter_to_merge(ref, cluster))
        ours = load_cluster("local") if where.is_remote else where
        was_up = is_up(ours)

        def write_files(*arguments: Any) -> dict[str, Any]:
            return wiring.merge_files(where)(*arguments)

        try:
            return merge_adapter(
                adapter,
                str(out),
                write_files,
                base=base,
                dtype=dtype,
                workers=workers,
                max_shard_size=max_shard_size,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
        finally:
            if not stays_up(ours, was_up):
                leave(ours)
            wiring.disconnect()


@contextlib.contextmanager
def _adapter_to_merge(ref: str, cluster: str | None) -> Iterator[AdapterToMerge]:
    """The adapter, its files on this machine while within."""
    if "@" not in ref or Path(ref).expanduser().is_dir() or "://" in ref:
        with wiring.adapter_folder(ref) as folder:
            checked = check_adapter(folder)
            method = checked.config["peft_type"]
            yield AdapterToMerge(ref, folder.absolute(), None, None, checked.base_model, method)
        return
    version = registry_of(cluster).get(ref)
    with wiring.adapter_folder(version.url) as folder:
        method, base = check_adapter(folder).config["peft_type"], version.lineage.base
        yield AdapterToMerge(version.ref, folder.absolute(), version.content_hash, base, None, method)
