"""The use case: an adapter's version or folder, its base, and a folder that appears when it is whole."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_dist.aside import aside
from peft_dist.catalog import METHODS, config_class
from peft_dist.errors import MergeError
from peft_dist.merged.file_size import size_in_bytes

from .. import objects
from ..errors import ModelError, SpecError, StorageError, closest
from ..identity import BaseIdentity, base_identity
from ..runner import Event

CONFIG = "config.json"
FORMAT = 1
DTYPES = ("float32", "bfloat16", "float16", "float64", "fp32", "bf16", "fp16", "auto")


@dataclass(frozen=True)
class MergeResult:
    """What was written."""

    out: str
    adapter: str
    base: str
    """Where the base was read from."""
    base_hash: str
    files: tuple[str, ...]
    num_bytes: int
    num_parameters: int
    num_workers: int
    wall_s: float

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Adapter:
    """The adapter that is merged.

    Args:
        name: `NAME@V`, or where it is. folder: on this machine.
        content_hash: of a version. base: that the version was trained on, or None.
        base_model: what its config calls its base. peft_type: its method.
    """

    name: str
    folder: Path
    content_hash: str | None
    base: BaseIdentity | None
    base_model: str | None
    peft_type: str


WriteFiles = Callable[[dict[str, Any], str, int | None, Callable[[Event], None]], dict[str, Any]]


def check_out(out: str | os.PathLike[str]) -> str:
    """`out` as one place; refuses one where something is.

    Raises:
        StorageError: something is there already.
    """
    target = objects.normal_url(os.fspath(out))
    taken = os.path.lexists(target) if objects.is_local(target) else objects.exists(target)
    if taken:
        raise StorageError(
            "something is there already.", where=target, hint="Nothing was written: name a new folder."
        )
    return target


def merge(
    adapter: Adapter,
    out: str,
    write_files: WriteFiles,
    *,
    base: str | None = None,
    dtype: str | None = None,
    workers: int | None = None,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    on_event: Callable[[Event], None],
) -> MergeResult:
    """Merges `adapter` into its base's files.

    Raises:
        ModelError: the base is not there, is another than the adapter was trained on, or they cannot be merged.
        StorageError: `out` is taken or cannot be written.
    """
    began = time.monotonic()
    if workers is not None and workers < 1:
        raise SpecError(f"{workers} workers merge nothing.", where="--workers", hint="Say 1 or more.")
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
        near = closest(dtype, DTYPES)
        raise SpecError(
            f"'{dtype}' is none of {', '.join(DTYPES)}.",
            where="--dtype",
            hint=f"Did you mean '{near[0]}'?" if near else "Leave it out to keep what the base has.",
        )
    try:
        size_in_bytes(max_shard_size)
    except MergeError as error:
        raise SpecError(str(error), where="--max-shard-size") from error
    _check_method(adapter)
    target = check_out(out)
    identity = _base_of(adapter, base, on_event)
    origin = {
        "format": FORMAT,
        "adapter": adapter.name,
        "adapter_hash": adapter.content_hash,
        "base": asdict(identity),
        "dtype": dtype or "auto",
        "created": time.time(),
    }
    request = {
        "base": identity.source,
        "revision": identity.revision,
        "adapter": str(adapter.folder),
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "trust_remote_code": trust_remote_code,
        "origin": origin,
    }
    with contextlib.ExitStack() as stack:
        with objects.explaining(target):
            beside = Path(target) if objects.is_local(target) else None
            folder = stack.enter_context(aside(beside, f".{Path(target).name}.merging-"))
        made = write_files(request, str(folder), workers, on_event)
        check_out(target)
        _put(folder, target)
    return MergeResult(
        out=target,
        adapter=adapter.name,
        base=identity.source,
        base_hash=identity.content_hash,
        files=tuple(made["files"]),
        num_bytes=made["num_bytes"],
        num_parameters=made["num_parameters"],
        num_workers=made["num_workers"],
        wall_s=time.monotonic() - began,
    )


def _check_method(adapter: Adapter) -> None:
    """Refuses what no weight can hold before a cluster is started for it."""
    if adapter.peft_type in METHODS and not config_class(adapter.peft_type).merges:
        raise ModelError(
            f"{adapter.peft_type} cannot be merged: what it does is no change of weights.",
            where=adapter.name,
            hint="Serve it as an adapter: raypeft deploy NAME@V.",
        )


def _base_of(adapter: Adapter, given: str | None, on_event: Callable[[Event], None]) -> BaseIdentity:
    known = adapter.base
    if given is None and known is None and adapter.base_model is None:
        raise ModelError(
            "adapter_config.json names no base_model_name_or_path.",
            where=adapter.name,
            hint="Say it: --base MODEL",
        )
    if given is not None or known is None:
        found = base_identity(str(given or adapter.base_model))
    else:
        found = base_identity(known.source, known.revision or "main")
    if known is not None and not found.is_same(known):
        if given is None:
            raise ModelError(
                f"the base at {known.source} is no longer the one that {adapter.name} was trained on.",
                hint="Put that one back, or name another on purpose: --base MODEL",
            )
        on_event({
            "event": "warning",
            "message": f"{given} is not the base that {adapter.name} was trained on ({known.name}).",
        })  # fmt: skip
    return found


def _put(folder: Path, target: str) -> None:
    with objects.explaining(target):
        if objects.is_local(target):
            os.rename(folder, target)
        else:
            objects.put_tree(folder, target, manifest=CONFIG)
