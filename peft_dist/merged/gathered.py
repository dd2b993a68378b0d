"""A model with its adapters' changes, written as a checkpoint of its base's architecture, tensor by tensor.

Nothing of the model is changed. Where its base is partitioned, each layer is gathered alone, on all ranks, and one rank
writes; the others go along. What one rank finds wrong, all raise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from peft_dist.errors import MergeError
from peft_dist.merged import folder as folders
from peft_dist.merged.changes import Merged, tensors_of
from peft_dist.merged.file_size import size_in_bytes
from peft_dist.merged.plan import Item, Plan, plan_merged
from peft_dist.merged.shards import Shards
from peft_dist.ranks import Ranks, is_writer
from peft_dist.sharding import gathered, is_partitioned


def save_merged(
    base: Any,
    names: Sequence[str],
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    is_main_process: bool | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Writes `base` with the named adapters in its weights. See `PeftModel.save_merged`."""
    target = os.fspath(directory)
    max_bytes = size_in_bytes(max_shard_size)
    plan = plan_merged(base, names, dtype_named(dtype))
    tensors = tensors_of(plan.places, plan.changes, plan.places)
    is_collective = dist.is_initialized() and any(is_partitioned(t) for t in tensors)
    ranks = Ranks(_refusal, alone=not is_collective)
    shards = plan.shards(max_bytes)
    with ExitStack() as stack:
        files = None
        with ranks.failing_together():
            if is_writer(is_main_process):
                folder = stack.enter_context(folders.filled(target))
                folders.check_room(folder, plan.entries)
                widest = plan.widest if plan.is_quantised else None
                folders.write_description(folder, base, plan.outline.config, shards, widest, origin)
                folders.write_generation_config(folder, base)
                folders.copy_tokenizer(folder, [getattr(base, "name_or_path", None)], tokenizer)
                files = stack.enter_context(Shards(folder, shards, create=True))
        merged = Merged(plan.changes, plan.dtypes)
        for step in plan.steps:
            keys = [key for item in step for key in item.keys]
            with gathered(tensors_of(keys, plan.changes, plan.places)), ranks.failing_together():
                if files is not None:
                    for item in step:
                        write_item(item, merged, plan, files)
                merged.forget()
        with ranks.failing_together():
            stack.close()


def write_item(item: Item, merged: Merged, plan: Plan, files: Shards) -> None:
    """Makes an item's tensors and writes them."""
    values = {key: merged.value(key, plan.places.get(key)) for key in item.keys}
    if item.group.converter is None:
        (value,) = values.values()
        files.write(item.entries[0].key, value.pieces())
        return
    whole = {key: value.whole() for key, value in values.items()}
    values.clear()
    for key, tensor in item.group.converted(whole, plan.outline.model).items():
        files.write(key, [tensor])


def _refusal(who: str, why: str) -> MergeError:
    return MergeError(f"another rank could not write the merged model: {who}, {why}")


def dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """`dtype`, also by its name (`bfloat16`, `bf16`, `torch.float32`); None for "auto".

    Raises:
        MergeError: it is none that a model's weights are kept in.
    """
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64", "half": "float16"}
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        dtype = getattr(torch, short.get(name, name), None) or dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise MergeError(
            f"dtype: {dtype!r}; a merged model is float32, bfloat16, float16, float64, or as its base (auto)."
        )
    return dtype  # type: ignore[return-value]
