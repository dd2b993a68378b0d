"""An adapter's state dictionary, into a model: all of it, or nothing on an error."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from peft_dist.adapted import AdapterModule
from peft_dist.checkpoint.embeddings import all_embeddings
from peft_dist.checkpoint.former import as_called_now
from peft_dist.checkpoint.layout import DEFAULT_ADAPTER
from peft_dist.checkpoint.names import Holder, adapter_parameters, defines, holders, join, known_adapter
from peft_dist.checkpoint.reading import read
from peft_dist.contract import PromptMethod
from peft_dist.errors import CheckpointError, MismatchError
from peft_dist.pauses import pause
from peft_dist.sharding import set_whole, whole_shape


class LoadResult(NamedTuple):
    """What did not meet: names that the model has and the file has not, and the other way round."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        """As torch says it of a state dictionary."""
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return f"_IncompatibleKeys(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"


def load_state_dict(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    adapter_name: str = DEFAULT_ADAPTER,
    ignore_mismatched_sizes: bool = False,
) -> LoadResult:
    """Fills the adapter's tensors, which must be in the model, by their names in a checkpoint; none on an
    error.

    A collective where tensors are sharded. Tensors on meta get memory first. Under a user's own DeepSpeed
    engine its fp32 masters are set too, so that its next step does not undo what was loaded.

    Returns:
        The names without a counterpart. Names in the file that the model does not know are no error.

    Raises:
        AdapterError: there is no such adapter.
        MismatchError: a shape differs, and `ignore_mismatched_sizes` is false.
        CheckpointError: no name at all is known.
    """
    known_adapter(model, adapter_name)
    held = holders(model, adapter_name)
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if defines(config, "fitted"):
        tensors = config.fitted(tensors, adapter_parameters(model, adapter_name))
    embeddings = {key: p for key, p in all_embeddings(model).items() if key in tensors}
    given, used = _given(held, tensors, embeddings)
    unknown = {key for key in tensors if key not in used and not is_again(key, used)}
    if unknown and (now := as_called_now(model, tensors, unknown)) is not None:
        tensors = now
        given, used = _given(held, tensors, embeddings)
    if held and not any(restored for _, restored in given):
        first = next(iter(adapter_parameters(model, adapter_name)), None)
        raise CheckpointError(
            f"none of the {len(tensors)} tensors belongs to adapter {adapter_name!r}, whose first is {first!r}. "
            "Was it trained on another base, or with other target_modules?"
        )
    _check_shapes(adapter_name, given, tensors, embeddings, ignore_mismatched_sizes)
    _check_finite(adapter_name, tensors, used)
    for holder in held:
        if isinstance(holder.method, PromptMethod):
            holder.module.take_saved_form(adapter_name)  # type: ignore[attr-defined, operator]
    missing = []
    for holder, restored in given:
        pause()
        missing += _fill(holder, restored, _device(holder.module))
    for key, parameter in embeddings.items():
        set_whole(parameter, tensors[key])
    return LoadResult(missing, [key for key in tensors if key not in used and not is_again(key, used)])


def _given(
    held: Sequence[Holder], tensors: Mapping[str, Tensor], others: Iterable[str]
) -> tuple[list[tuple[Holder, dict[str, Tensor]]], set[str]]:
    """(what each layer takes, by the method's names; the names that are taken, and `others`)."""
    given, used = [], set(others)
    for holder in held:
        pause()
        restored, names = _restored(holder, tensors)
        given.append((holder, restored))
        used |= names
    return given, used


def match_one(
    holder: Holder, tensors: Mapping[str, Tensor], config: Any = None
) -> tuple[dict[str, Tensor], LoadResult]:
    """(what one layer takes of a checkpoint, by the method's names; what did not meet); nothing is filled.

    Args:
        tensors: those whose names begin with the layer's. config: of the adapter.

    Raises:
        CheckpointError: a shape differs, or a number is not finite.
    """
    wanted = holder.module.wanted(holder.adapter)
    if defines(config, "fitted"):
        here = holder.module.tensors(holder.adapter)
        tensors = config.fitted(
            tensors, {join(holder.layer, key): here[name] for key, name in holder.saved.items()}
        )
    restored, used = _restored(holder, tensors)
    _check_shapes(holder.adapter, [(holder, restored)], tensors, {}, False)
    _check_finite(holder.adapter, tensors, used)
    missing = [name for name in holder.saved.values() if name not in restored and wanted[name].trainable]
    unknown = [key for key in tensors if key not in used]
    return restored, LoadResult([holder.hung(name) for name in missing], unknown)


def load_one(holder: Holder, tensors: Mapping[str, Tensor], config: Any, device: Any) -> None:
    """Fills the tensors of an adapter at one layer, on `device`, as `load_state_dict` fills those of all.

    Raises:
        CheckpointError: as `match_one`; nothing is changed.
    """
    _fill(holder, match_one(holder, tensors, config)[0], device)


def _fill(holder: Holder, restored: Mapping[str, Tensor], device: Any) -> list[str]:
    """Gives a holder's tensors memory and values; the names of those that are missing."""
    adapter_name = holder.adapter
    holder.module.materialise(adapter_name, device)
    holder.module.part(adapter_name)
    own = holder.module.tensors(adapter_name)
    for name, value in restored.items():
        set_whole(own[name], value)
    holder.module.unite(adapter_name)
    wanted = holder.module.wanted(adapter_name)
    absent = [name for name in holder.saved.values() if name not in restored]
    # What is not trained follows from the config and the base.
    derived = [name for name in absent if not wanted[name].trainable]
    if derived:
        _derive(holder, derived)
    if isinstance(holder.module, AdapterModule) and hasattr(holder.module, "base"):
        holder.module.replace_base(adapter_name, holder.module.base)
    return [holder.hung(name) for name in absent if name not in derived]


def parts_of(model: Any, config: Any, adapter_name: str) -> list[tuple[Parameter, Tensor]]:
    """The adapter's tensors that come from saved adapters which `config`, read from a checkpoint, is made of,
    each with its value there.

    Raises:
        ConfigError: such an adapter is not there, or fits no layer here.
    """
    from_there = copy.copy(config)
    from_there.assemble(model.get_base_model(), read)
    found = []
    for wrapper in model.base_model._adapters.sites[adapter_name].values():
        own = wrapper.tensors(adapter_name)
        for name, param in from_there.params(wrapper.base.site).items():
            if not param.persistent:
                value = torch.empty(param.shape, dtype=own[name].dtype)
                param.start(value)
                found.append((own[name], value))
    return found


def is_again(key: str, used: set[str]) -> bool:
    """Whether it is a bias that HF PEFT writes a second and third time: with `bias: all`, of a module that is
    trained whole."""
    return any(
        key.endswith(".bias") and key.replace(f".{part}.", ".") in used and f".{part}." in key
        for part in ("modules_to_save", "original_module")
    )


def _restored(holder: Holder, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """(the holder's tensors by the method's names, the names in the file that they came from)."""
    saved = holder.saved
    if not defines(holder.method, "restore"):
        keys = {join(holder.layer, key): name for key, name in saved.items()}
        return {name: tensors[key] for key, name in keys.items() if key in tensors}, set(keys)
    start = f"{holder.layer}." if holder.layer else ""
    known = [param.saved or param.key for param in holder.module.wanted(holder.adapter).values()]
    # HF PEFT wraps a layer that shares another's weight twice where both are targets.
    names = (holder.method.prefix, f"base_layer.{holder.method.prefix}", *known)
    mine = {
        key: value
        for key, value in tensors.items()
        if key.startswith(start) and key[len(start) :].startswith(names)
    }
    there = holder.method.restore({key[len(start) :]: v for key, v in mine.items()}, holder.site)
    # What it hands on as it was and nothing takes is as unknown as any other name.
    left = {f"{start}{key}" for key in there if key not in saved}
    return {saved[key]: value for key, value in there.items() if key in saved}, set(mine) - left


def _derive(holder: Holder, names: Sequence[str]) -> None:
    if hasattr(type(holder.module), "complete"):
        holder.module.complete(holder.adapter, names, holder.module.base)  # type: ignore[attr-defined, operator]
        return
    with torch.no_grad():
        for name in names:
            holder.module.wanted(holder.adapter)[name].start(holder.module.tensors(holder.adapter)[name])


def _check_finite(adapter_name: str, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    for key in names:
        pause()
        value = tensors.get(key)
        if value is not None and value.is_floating_point() and not _is_finite(value):
            raise CheckpointError(
                f"adapter {adapter_name!r}: {key!r} has NaN or infinite values. Its training failed; take an "
                "earlier checkpoint."
            )


def _is_finite(value: Tensor) -> bool:
    # One pass; only a sum that is not finite needs a look at each.
    return math.isfinite(value.sum(dtype=torch.float64)) or bool(value.isfinite().all())


def _check_shapes(
    adapter_name: str,
    given: list[tuple[Holder, dict[str, Tensor]]],
    tensors: Mapping[str, Tensor],
    embeddings: dict[str, Parameter],
    ignore: bool,
) -> None:
    """Raises for tensors of another shape, or takes them out of what is to be filled, with a warning."""
    wrong = []
    num = sum(len(restored) for _, restored in given) + len(embeddings)
    for holder, restored in given:
        own = _filled(holder)
        keys = {name: join(holder.layer, saved) for saved, name in holder.saved.items()}
        for name, value in list(restored.items()):
            here = tuple(whole_shape(own[name]))
            if tuple(value.shape) != here:
                wrong.append(f"{keys[name]!r} is {tuple(value.shape)} there and {here} here")
                del restored[name]
    for key, parameter in list(embeddings.items()):
        there, here = tuple(tensors[key].shape), tuple(whole_shape(parameter))
        if there != here:
            wrong.append(f"{key!r} is {there} there and {here} here")
            del embeddings[key]
    if wrong:
        message = (
            f"{len(wrong)} of {num} tensors of adapter {adapter_name!r} have another shape: "
            f"{', '.join(wrong[:3])}."
        )
        if not ignore:
            raise MismatchError(f"{message} Its rank, targets or base differ from this model's.")
        warnings.warn(f"{message} They keep their values.", stacklevel=3)


def _filled(holder: Holder) -> dict[str, Tensor]:
    """What a checkpoint is to fill, by the method's names: of a prompt method what it keeps."""
    if not isinstance(holder.method, PromptMethod):
        return holder.module.tensors(holder.adapter)
    wanted = holder.method.saved_form().params(holder.site)
    return {name: torch.empty(param.shape, device="meta") for name, param in wanted.items()}


def _device(module: nn.Module) -> torch.device:
    return getattr(getattr(module, "base", None), "device", torch.device("cpu"))
