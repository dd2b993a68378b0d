"""A merge without the base in memory: its files are read, an adapter's changes added layer by layer, and files written.

The base and the adapter are built on meta. For one layer at a time the weight is put in its place, the adapter's
tensors are filled, and what `changes` then gives is what a model in memory would have. All else is copied from file to
file. Any number of processes share the work: each plans the same files, and writes its own part of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peft_dist import checkpoint
from peft_dist.adapted import AdapterModule
from peft_dist.checkpoint.embeddings import all_embeddings
from peft_dist.checkpoint.filling import load_one, match_one
from peft_dist.checkpoint.names import Holder, holders
from peft_dist.errors import BaseModelError, CheckpointError, MergeError
from peft_dist.loading.base import AUTO_CLASSES, _renamed
from peft_dist.loading.keys import Keys, conversions, match
from peft_dist.loading.pending import Pending
from peft_dist.loading.skeleton import build
from peft_dist.loading.stored import Files
from peft_dist.loading.weight_files import fetched, weight_files
from peft_dist.merge import refuse_unmergeable
from peft_dist.merged import folder as folders
from peft_dist.merged.changes import Merged, Value, cast
from peft_dist.merged.file_size import size_in_bytes
from peft_dist.merged.gathered import dtype_of, write_item
from peft_dist.merged.plan import Item, Plan, plan_merged
from peft_dist.merged.shards import PIECE_BYTES, Shard, Shards
from peft_dist.merged.stored_adapter import StoredTensors, open_adapter
from peft_dist.model import TASK_CLASSES, PeftModel, has_hooks

NAME = "default"


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
        self._dtype = dtype_of(request.dtype)
        config, self._tensors = open_adapter(request.adapter)
        refuse_unmergeable({NAME: config}, [NAME])
        if has_hooks(config.peft_type):
            raise MergeError(
                f"{config.peft_type} is given by hooks of its own, which change a base in memory. Load both, and call "
                "merge_and_unload."
            )
        self._config: Any = config
        self._folder = fetched(request.base, request.revision)
        self._files = Files(weight_files(request.base, self._folder))
        base, self._keys = _empty_base(request, self._folder, config, self._tensors, self._files)
        self._pending = _pending(self._keys, self._files)
        _take_stored_dtypes(base, self._pending)
        # A layer may come to stand in the model several times, and a tensor under several names.
        self._own = [(name, tensor) for name, tensor in base.named_parameters(remove_duplicate=False)]
        self.model = _with_adapter(base, config, self._tensors)
        self._base = self.model.get_base_model()
        self._holders = {id(h.module): h for h in holders(self.model, NAME)}
        self._take_saved_embeddings()
        self.plan: Plan = plan_merged(self._base, [NAME], self._dtype, self._is_apart, self._made_by_config())
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
            below = self._tensors.below(holder.layer) if holder.layer else _flat(self._tensors, holder)
            _, result = match_one(holder, below, self._config)
            used |= set(below) - set(result.unexpected_keys)
            missing += result.missing_keys
        unknown = [key for key in self._tensors if key not in used and key not in all_embeddings(self.model)]
        unknown = [key for key in unknown if not checkpoint.filling._is_again(key, used)]
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
        metadata = {"format": "pt"}
        with Shards(folder, self.shards, metadata, create=True):
            pass
        config = self.plan.outline.config
        folders.write_code(folder, self._base, config)
        folders.write_config(folder, config, type(self._base).__name__, self.shards)
        folders.copy_generation_config(folder, self._folder)
        folders.copy_tokenizer(folder, [self.request.adapter, str(self._folder)])
        if self.request.origin is not None:
            folders.write_origin(folder, self.request.origin)

    def write(self, folder: Path, steps: Sequence[int]) -> Iterator[int]:
        """Writes the tensors of the given steps; gives the bytes that each took, as it goes."""
        merged = Merged(self.plan.changes, self.plan.dtypes)
        with Shards(folder, self.shards, {"format": "pt"}, create=False) as files:
            self._fill_common()
            for number in steps:
                step = self.plan.steps[number]
                with self._filled(step):
                    for item in step:
                        if any(self._is_added(key) for key in item.keys):
                            write_item(item, merged, self.plan, files)
                        else:
                            self._copy(item, files)
                        yield sum(entry.num_bytes for entry in item.entries)
                    merged.forget()

    def close(self) -> None:
        """Closes the files."""
        self._files.close()
        self._tensors.close()

    def _is_added(self, key: str) -> bool:
        """Whether something is added to a tensor of the base; else it is copied, from the base or the adapter."""
        change = self.plan.changes[key]
        return change is not None and not change.replaces

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

    @contextlib.contextmanager
    def _filled(self, step: Sequence[Item]) -> Iterator[None]:
        """Within it the layers that `step` changes have their values, and so has the adapter there."""
        keys = [key for item in step for key in item.keys]
        if not any(self._is_added(key) for key in keys):
            yield
            return
        wrappers: dict[int, Any] = {}
        for change in filter(None, (self.plan.changes[key] for key in keys)):
            for each in (change.wrapper, *(change.source(name) for name in change.names)):
                wrappers[id(each)] = each
        needed = dict.fromkeys(key for key in keys if self.plan.changes[key] is None)
        for wrapper in wrappers.values():
            needed |= dict.fromkeys(self._keys_of(wrapper))
        put: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for key in needed:
                self._put(key, put)
            for wrapper in wrappers.values():
                holder = self._holders[id(wrapper)]
                load_one(holder, self._tensors.below(holder.layer), self._config, "cpu")
            yield
        finally:
            for module, leaf, empty in put:
                module._parameters[leaf] = empty
            for wrapper in wrappers.values():
                wrapper.empty(NAME)

    def _keys_of(self, wrapper: Any) -> list[str]:
        """The names of a layer's own tensors that its adapter may read."""
        found = []
        for key, place in self.plan.places.items():
            own = any(each is wrapper for each, _ in place.wrappers)
            if (
                own
                and place.module is wrapper.base.layer
                and place.leaf in (wrapper.base.key, wrapper.base.bias_key)
            ):
                found.append(key)
        return found

    def _put(self, key: str, put: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        place = self.plan.places[key]
        empty = place.module._parameters.get(place.leaf)
        if empty is None or not empty.is_meta:
            return
        put.append((place.module, place.leaf, empty))
        place.module._parameters[place.leaf] = nn.Parameter(self._pending[key].whole(), requires_grad=False)

    def _fill_common(self) -> None:
        """Fills what all layers of the adapter share."""
        for holder in self._holders.values():
            if not isinstance(holder.module, AdapterModule):
                load_one(holder, _flat(self._tensors, holder), self._config, "cpu")

    # --- before it is done

    def _is_apart(self, tie: Sequence[str]) -> bool:
        """Whether the files hold unlike values for what the architecture ties."""
        there = [self._pending[key] for key in tie if key in self._pending]
        return any(not _equal(there[0], other) for other in there[1:])

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


def _empty_base(
    request: Request, folder: Path, adapter: Any, tensors: StoredTensors, files: Files
) -> tuple[Any, Keys]:
    """The base on meta, with the head of the adapter's task; and what its files hold of it."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=request.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(f"base model: {request.base!r} cannot be opened: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise MergeError(
            f"{request.base!r} is stored quantised, so its weights could only be changed by quantising them anew. Name "
            "the base in full by --base, or load it and call save_merged, which writes it dequantised."
        )
    _set_labels(config, adapter, tensors, request.labels)
    auto_class = _class_of(config, adapter)
    try:
        model = build(
            auto_class,
            config,
            files.floating_dtype() or torch.float32,
            trust_remote_code=request.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise BaseModelError(f"base model: {request.base!r} cannot be built: {error}") from error
    model.config.name_or_path = str(folder)
    mapping = conversions(model, _renamed(auto_class, config), None)
    keys = match(model, files.tensors, mapping, model.dtype, frozenset())
    replaced = [name for name, *_ in keys.mismatched if _is_head(name, adapter, tensors)]
    wrong = [each for each in keys.mismatched if each[0] not in replaced]
    if wrong:
        name, there, here = wrong[0]
        raise BaseModelError(
            f"base model: {name} is {list(there)} in the files of {request.base!r} and {list(here)} by config.json. "
            "Take both from one model."
        )
    model.tie_weights()
    return model, keys


def _class_of(config: Any, adapter: Any) -> Any:
    """What makes the model of a config: the auto class of the adapter's task, else the base's own architecture."""
    if adapter.task_type in AUTO_CLASSES:
        found = getattr(transformers, AUTO_CLASSES[adapter.task_type])
        if type(config) in found._model_mapping or getattr(config, "auto_map", None):
            return found
    told = (adapter.auto_mapping or {}).get("base_model_class") if adapter.auto_mapping else None
    for name in (told, *(getattr(config, "architectures", None) or ())):
        for auto in AUTO_CLASSES.values():
            known = getattr(transformers, auto)
            classes = known._model_mapping.get(type(config), None)
            if name in {
                each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,)) if each
            }:
                return known
        if name and hasattr(transformers, name):
            return _ByName(getattr(transformers, name))
    return transformers.AutoModelForCausalLM


class _ByName:
    """A class of transformers in the place of an auto class."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._model_mapping: dict[type, Any] = {}

    def from_config(self, config: Any, *, trust_remote_code: bool = False, dtype: Any = None) -> Any:
        """The model of a config."""
        return self._kind._from_config(config, dtype=dtype)


_HEADS = ("score", "classifier", "qa_outputs")


def _is_head(name: str, adapter: Any, tensors: StoredTensors) -> bool:
    return f"base_model.model.{name}" in tensors


def _set_labels(config: Any, adapter: Any, tensors: StoredTensors, labels: Sequence[str]) -> None:
    """Gives a config as many classes as the adapter's head tells apart, and their names where they are known."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        return
    if adapter.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return
    heads = [f"base_model.model.{head}{part}.weight" for head in _HEADS for part in ("", ".out_proj")]
    sizes = [tensors.shape(key)[0] for key in heads if key in tensors]
    if sizes and config.num_labels != sizes[0]:
        config.num_labels = sizes[0]


def _pending(keys: Keys, files: Files) -> dict[str, Pending]:
    """Each of the model's tensors that the files hold, unread, in the dtype that it is stored in."""
    found: dict[str, Pending] = {}
    for group in keys.groups:
        group.sources = [(name, key, pattern, files.tensors[key]) for name, key, pattern, _ in group.sources]
        made = group.converted(keys.outline)
        found |= {name: made[name] for name in group.targets}
    return found


def _take_stored_dtypes(base: Any, pending: Mapping[str, Pending]) -> None:
    """Lets the base's empty tensors be of the dtypes that they are stored in."""
    done: set[int] = set()
    for name, value in pending.items():
        tensor = base.get_parameter_or_buffer(name)
        if isinstance(tensor, nn.Parameter) and id(tensor) not in done and tensor.dtype != value.dtype:
            tensor.data = torch.empty(tensor.shape, dtype=value.dtype, device="meta")
        done.add(id(tensor))


def _with_adapter(base: Any, config: Any, tensors: StoredTensors) -> PeftModel:
    config.inference_mode = True
    model = TASK_CLASSES.get(config.task_type, PeftModel)(base, None)
    model._told_by(tensors, config)
    model._add(NAME, config, True, low_cpu_mem_usage=True, start=False)
    model.set_adapter(NAME, inference_mode=True)
    return model


def _flat(tensors: StoredTensors, holder: Holder) -> dict[str, Tensor]:
    """The tensors of what no layer holds: those that all layers share."""
    keys = {f"{holder.layer}.{key}" if holder.layer else key for key in holder.saved}
    return {key: tensors[key] for key in tensors if key in keys}


def _equal(first: Pending, second: Pending) -> bool:
    step = PIECE_BYTES // first.dtype.itemsize
    return first.shape == second.shape and all(
        torch.equal(
            first.part(at, min(at + step, first.numel())), second.part(at, min(at + step, first.numel()))
        )
        for at in range(0, first.numel(), step)
    )


def _pieces(value: Any, dtype: torch.dtype, where: str) -> Iterator[Tensor]:
    """A tensor's elements in order, flat, read some at a time."""
    if isinstance(value, Tensor):
        yield from Value(value, None, dtype, where).pieces()
        return
    step = max(1, PIECE_BYTES // max(value.dtype.itemsize, dtype.itemsize))
    for begin in range(0, value.numel(), step):
        yield cast(value.part(begin, min(begin + step, value.numel())), dtype, where)
