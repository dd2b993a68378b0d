"""Values for a model on the meta device, from its files: whole on each rank, or each rank its own pieces.

What the files do not hold is started first (non-persistent buffers, a new head), tied weights are joined while
they are still empty, and then each tensor is read, converted and quantised on its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.loading_report import LoadStateDictInfo

from peft_dist.errors import BaseModelError
from peft_dist.loading.codes import Codes, Codes4bit
from peft_dist.loading.keys import Group, Keys
from peft_dist.loading.pending import Pending
from peft_dist.loading.quantising import kept_4bit, kept_8bit, params_4bit, params_8bit
from peft_dist.loading.skeleton import quantised_weights
from peft_dist.loading.stored import equal

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def tie(model: Any, keys: Keys, slices: tuple[int, int], agree: Callable[[bool], bool]) -> None:
    """Ties weights while they are empty, and brings `keys.missing` and `keys.unexpected` to what really is so.

    Args:
        slices: rank and number of ranks: of weights that are stored twice, each rank compares a share.
        agree: whether all ranks say so.
    """
    _tie_apart(model, keys, slices, agree)
    report = _report(keys)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in keys.missing and isinstance(tensor, Tensor):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.mark_tied_weights_as_initialized(report)
    model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(report)
    keys.missing, keys.unexpected = report.missing_keys, report.unexpected_keys


def start_the_rest(model: Any) -> None:
    """Gives values, on the CPU, to all that no file holds; what files hold stays on meta. After `tie`."""
    begun = {name for name, tensor in _tensors(model) if not getattr(tensor, "_is_hf_initialized", False)}
    for name in begun:
        _put(model, name, torch.empty_like(model.get_parameter_or_buffer(name), device="cpu"))
    model.initialize_weights()


def _report(keys: Keys) -> LoadStateDictInfo:
    return LoadStateDictInfo(
        missing_keys=set(keys.missing),
        unexpected_keys=set(keys.unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def _tie_apart(model: Any, keys: Keys, slices: tuple[int, int], agree: Callable[[bool], bool]) -> None:
    """Weights that the config ties and the files hold twice are read once, or are not tied if they differ."""
    made = {name: group for group in keys.groups for name in group.targets}
    for target, source in list(getattr(model, "all_tied_weights_keys", {}).items()):
        if target not in made or source not in made:
            continue
        first = made[target].converted(keys.outline)[target]
        second = made[source].converted(keys.outline)[source]
        if agree(equal(first, second, *slices)):
            keys.drop(target)
            continue
        logger.warning(
            "%s and %s are tied by the config, and differ in the files: they are not tied. Set tie_word_embeddings "
            "to false in config.json.",
            target,
            source,
        )
        model.all_tied_weights_keys.pop(target)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path) if path else model
    if key in module._parameters:
        old = module._parameters[key]
        kept = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        if not isinstance(value, nn.Parameter) and kept.is_floating_point():
            kept.requires_grad_(old is None or old.requires_grad)
        module._parameters[key] = kept
    else:
        module._buffers[key] = value


class Places:
    """Where a model keeps each of its tensors: a tied one in several modules."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, list[tuple[dict[str, Any], str]]] = {}
        self._names: dict[str, Tensor] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for table in (module._parameters, module._buffers):
                for key, tensor in table.items():
                    if tensor is not None:
                        self._names[f"{path}.{key}" if path else key] = tensor
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for key, tensor in table.items():
                    if tensor is not None:
                        self._owners.setdefault(id(tensor), []).append((table, key))

    def __getitem__(self, name: str) -> Any:
        return self._names[name]

    def put(self, name: str, value: Tensor) -> None:
        """Keeps `value` everywhere in place of the tensor of that name."""
        for table, key in self._owners[id(self._names[name])]:
            table[key] = value


@torch.no_grad()
def fill(model: Any, keys: Keys, device: torch.device, advance: Callable[[Group], None]) -> None:
    """Reads all that the files hold into the model, whole, each layer quantised as it is read.

    Args:
        advance: called after each group.
    """
    places, quantised = Places(model), quantised_weights(model)
    for group in keys.groups:
        values = group.converted(keys.outline)
        for name in group.targets:
            places.put(name, _whole(values[name], name, places[name], quantised.get(name), device))
        del values
        advance(group)
    move_started(model, device)


def move_started(model: nn.Module, device: torch.device) -> None:
    """Moves what was started, and not read, to the device."""
    if device.type == "cpu":
        return
    places = Places(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "cpu":
            moved = tensor.to(device)
            if isinstance(tensor, nn.Parameter):
                moved = nn.Parameter(moved.detach(), requires_grad=tensor.requires_grad)
            places.put(name, moved)


def _whole(value: Pending, name: str, old: Any, layer: Any, device: torch.device) -> Tensor:
    if layer is not None:
        made = (
            _stored(value, old, device)
            if isinstance(value, Codes)
            else _quantised(as_matrix(value, layer), name, old, device)
        )
        made._is_hf_initialized = True
        return made
    out = torch.empty(value.shape, dtype=value.dtype, device=device)
    value.read(0, out.view(-1))
    if not isinstance(old, nn.Parameter):
        return out
    return nn.Parameter(out, requires_grad=old.requires_grad and out.is_floating_point())


def _quantised(W: Pending, name: str, old: Any, device: torch.device) -> Any:
    is_8bit = type(old).__name__ == "Int8Params"
    return params_8bit(W, old, device) if is_8bit else params_4bit(W, old, name, device)


def _stored(value: Codes, old: Any, device: torch.device) -> Any:
    parts = {key: part.whole().to(device) for key, part in value.parts.items()}
    if isinstance(value, Codes4bit):
        return kept_4bit(parts["weight"], value.state(parts, value.shape), old)
    return kept_8bit(parts["weight"], parts["SCB"], old)


def as_matrix(value: Pending, layer: Any) -> Pending:
    """A weight as a quantised layer keeps it, (out, in): GPT-2's layers store theirs the other way round."""
    return value.T if getattr(layer, "source_cls", nn.Linear).__name__ == "Conv1D" else value


def check_filled(model: nn.Module) -> None:
    """Raises if anything of the model has no values yet.

    Raises:
        BaseModelError: it names the first such tensor.
    """
    for name, tensor in _tensors(model):
        if tensor.is_meta:
            raise BaseModelError(
                f"base model: {name} of {type(model).__name__} got no values: neither the files nor the model's own "
                "start gives it any."
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
