"""A merge without the base in memory: its files are read, an adapter's changes added layer by layer, and files written.

The base and the adapter are built on meta. For one layer at a time the weight is put in its place, the adapter's
tensors are filled, and what `changes` then gives is what a model in memory would have. All else is copied from file to
file. Any number of processes share the work: each plans the same files, and writes its own part of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.checkpoint.embeddings import all_embeddings
from peft_dist.checkpoint.filling import is_again, match_one
from peft_dist.checkpoint.layout import DEFAULT_ADAPTER
from peft_dist.checkpoint.names import holders
from peft_dist.errors import CheckpointError, MergeError
from peft_dist.loading.pending import Pending
from peft_dist.loading.stored import equal
from peft_dist.merge import refuse_unmergeable
from peft_dist.merged import folder as folders
from peft_dist.merged.changes import Merged, Value, cast
from peft_dist.merged.file_size import size_in_bytes
from peft_dist.merged.filled_layers import FilledLayers
from peft_dist.merged.gathered import dtype_named, write_item
from peft_dist.merged.plan import Item, Plan, plan_merged
from peft_dist.merged.request import Request
from peft_dist.merged.shards import PIECE_BYTES, Shard, Shards
from peft_dist.merged.stored_adapter import StoredTensors, open_adapter
from peft_dist.merged.unread_base import UnreadBase
from peft_dist.model import TASK_CLASSES, PeftModel, has_hooks


class OfflineMerge:
    """A merge that is planned: no weight was read yet.

    Attributes:
        plan, shards: what is written. sizes: of each step, in bytes. largest: the bytes of the largest tensor that is
            read or written.

    Raises:
        MergeError: the adapter cannot be merged, or the result has no place in a checkpoint of the architecture.
        BaseModelError, CheckpointError, ConfigError: the base or the adapter is missing, damaged or does not fit.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._dtype = dtype_named(request.dtype)
        config, self._tensors = open_adapter(request.adapter)
        refuse_unmergeable({DEFAULT_ADAPTER: config}, [DEFAULT_ADAPTER])
        if has_hooks(config.peft_type):
            raise MergeError(
                f"{config.peft_type} is given by hooks of its own, which change a base in memory. Load both, and call "
                "merge_and_unload."
            )
        self._config: Any = config
        self._unread = UnreadBase(request, config, self._tensors)
        self._pending = self._unread.pending
        # A layer may come to stand in the model several times, and a tensor under several names.
        self._own = list(self._unread.model.named_parameters(remove_duplicate=False))
        self.model = _with_adapter(self._unread.model, config, self._tensors)
        self._base = self.model.get_base_model()
        self._holders = {id(h.module): h for h in holders(self.model, DEFAULT_ADAPTER)}
        self._take_saved_embeddings()
        self.plan: Plan = plan_merged(
            self._base,
            [DEFAULT_ADAPTER],
            self._dtype,
            self._is_apart,
            self._made_by_config(),
            self._unread.from_codes,
        )
        self._check_complete()
        self.shards: list[Shard] = self.plan.shards(size_in_bytes(request.max_shard_size))

    # --- what there is to do

    @property
    def sizes(self) -> list[int]:
        """Bytes that each step writes."""
        return [sum(e.num_bytes for item in step for e in item.entries) for step in self.plan.steps]

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor of the model."""
        read = [p.numel() * p.dtype.itemsize for p in self._pending.values()]
        return max([*read, *(entry.num_bytes for entry in self.plan.entries)])

    @property
    def num_parameters(self) -> int:
        """Floating numbers that are written."""
        floating = [entry for entry in self.plan.entries if entry.dtype.is_floating_point]
        return sum(entry.num_bytes // entry.dtype.itemsize for entry in floating)

    @property
    def digest(self) -> str:
        """What two processes that plan the same files have in common."""
        said = [(entry.key, str(entry.dtype), entry.shape) for entry in self.plan.entries]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def check_adapter(self) -> None:
        """Compares the whole adapter with the layers that it sits on, reading it layer by layer.

        Raises:
            CheckpointError: it lacks tensors, has others, of other sizes, or with numbers that are not finite.
        """
        used: set[str] = set()
        missing: list[str] = []
        for holder in self._holders.values():
            shared = not holder.layer
            below = self._tensors.of("", holder.saved) if shared else self._tensors.below(holder.layer)
            _, result = match_one(holder, below, self._config)
            used |= set(below) - set(result.unexpected_keys)
            missing += result.missing_keys
        unknown = [key for key in self._tensors if key not in used and key not in all_embeddings(self.model)]
        unknown = [key for key in unknown if not is_again(key, used)]
        for what, keys in (("lacks", missing), ("has, unknown to the base,", unknown)):
            if keys:
                raise CheckpointError(
                    f"the adapter {what} {len(keys)} tensors, the first {keys[0]!r}. It belongs to another base or to "
                    "other targets."
                )

    # --- doing it

    def prepare(self, folder: Path) -> None:
        """Writes into `folder` all but the weights: the files with their headers, config, tokenizer, origin."""
        folders.check_room(folder, self.plan.entries)
        with Shards(folder, self.shards, create=True):
            pass
        widest = self.plan.widest if self._unread.from_codes else None
        config = self.plan.outline.config
        folders.write_description(folder, self._base, config, self.shards, widest, self.request.origin)
        folders.copy_generation_config(folder, self._unread.folder)
        folders.copy_tokenizer(folder, [self.request.adapter, str(self._unread.folder)])

    def write(self, folder: Path, steps: Sequence[int]) -> Iterator[int]:
        """Writes the tensors of the given steps; gives the bytes that each took, as it goes."""
        merged = Merged(self.plan.changes, self.plan.dtypes)
        with Shards(folder, self.shards, create=False) as files:
            layers = FilledLayers(self.plan, self._pending, self._tensors, self._config, self._holders)
            layers.fill_common()
            for number in steps:
                step = self.plan.steps[number]
                with layers.during(step):
                    for item in step:
                        if any(map(self.plan.adds, item.keys)):
                            write_item(item, merged, self.plan, files)
                        else:
                            self._copy(item, files)
                        yield sum(entry.num_bytes for entry in item.entries)
                    merged.forget()

    def close(self) -> None:
        """Closes the files."""
        self._unread.close()
        self._tensors.close()

    def _copy(self, item: Item, files: Shards) -> None:
        sources = {key: self._source(key) for key in item.keys}
        made = item.group.converted(sources, self.plan.outline.model)
        for entry in item.entries:
            files.write(entry.key, _pieces(made[entry.key], entry.dtype, entry.key))

    def _source(self, key: str) -> Pending:
        """A tensor that nothing is added to: the base's, or the adapter's in its place; unread."""
        change = self.plan.changes[key]
        if change is None:
            return self._pending[key]
        holder = self._holders[id(change.source(change.names[0]))]
        saved = next(saved for saved, name in holder.saved.items() if name == change.part)
        return self._tensors.pending(f"{holder.layer}.{saved}")

    # --- before it is done

    def _is_apart(self, tie: Sequence[str]) -> bool:
        """Whether the files hold unlike values for what the architecture ties."""
        there = [self._pending[key] for key in tie if key in self._pending]
        return any(not equal(there[0], other) for other in there[1:])

    def _made_by_config(self) -> set[str]:
        """Buffers that no file holds: the model makes them itself."""
        return {name for name, _ in self._base.named_buffers() if name not in self._pending}

    def _take_saved_embeddings(self) -> None:
        """Takes embeddings that were saved with the adapter in the place of the base's."""
        for key in all_embeddings(self.model):
            if key in self._tensors:
                name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
                stored = self._tensors.pending(key)
                here = self._pending.get(name)
                if here is not None and here.shape != stored.shape:
                    raise MergeError(
                        f"{key!r} is {tuple(stored.shape)} in the adapter and {tuple(here.shape)} in the base: its "
                        "vocabulary was resized. Resize the base, save it, and name it by --base."
                    )
                self._pending[name] = stored

    def _check_complete(self) -> None:
        """Finds each tensor by the Parameter that it is in the model; refuses what nobody has."""
        names = {name: id(tensor) for name, tensor in self._own}
        held = {id(tensor): self._pending[name] for name, tensor in self._own if name in self._pending}
        for key, place in self.plan.places.items():
            is_own = names.get(key) == id(place.tensor) and key in self._pending
            if not is_own and isinstance(place.tensor, nn.Parameter):
                self._pending.pop(key, None)
                if id(place.tensor) in held:
                    self._pending[key] = held[id(place.tensor)]
        missing = [
            key
            for step in self.plan.steps
            for item in step
            for key in item.keys
            if key not in self._pending
            and not ((change := self.plan.changes[key]) is not None and change.replaces)
        ]
        if missing:
            raise MergeError(
                f"neither the base nor the adapter has {missing[0]!r} and {len(missing) - 1} more tensors of "
                f"{type(self._base).__name__}. Name the base that the adapter was trained on, or train them whole by "
                "modules_to_save."
            )


def _with_adapter(base: Any, config: Any, tensors: StoredTensors) -> PeftModel:
    config.inference_mode = True
    model = TASK_CLASSES.get(config.task_type, PeftModel)(base, None)
    model._told_by(tensors, config)
    model._add(DEFAULT_ADAPTER, config, True, low_cpu_mem_usage=True, start=False)
    model.set_adapter(DEFAULT_ADAPTER, inference_mode=True)
    return model


def _pieces(value: Any, dtype: torch.dtype, where: str) -> Iterator[Tensor]:
    """A tensor's elements in order, flat, read some at a time."""
    if isinstance(value, Tensor):
        yield from Value(value, None, dtype, where).pieces()
        return
    step = max(1, PIECE_BYTES // max(value.dtype.itemsize, dtype.itemsize))
    for begin in range(0, value.numel(), step):
        yield cast(value.part(begin, min(begin + step, value.numel())), dtype, where)
