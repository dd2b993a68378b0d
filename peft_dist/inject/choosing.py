"""Which layers an adapter gets a method on: its targets, what is trained whole, token rows, biases."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dist.adapted import Adapted, AdaptedBlock, AdapterModule, Replaced
from peft_dist.base_layer import (
    OUT_PROJ,
    Layer,
    ParameterLayer,
    door,
    has_door,
)
from peft_dist.config import PeftConfig, TargetedConfig
from peft_dist.contract import BlockMethod, Method, Param, ReplaceMethod, Site
from peft_dist.errors import ConfigError, ContainerError, TargetError
from peft_dist.inject.places import (
    Place,
    parameter_of,
)
from peft_dist.methods.lora.tokens import RowsBeside
from peft_dist.methods.replace.modules_to_save import ModulesToSave, SameModule
from peft_dist.methods.weight.bias import BiasCopy, Unchanged
from peft_dist.pauses import pause
from peft_dist.targets import (
    READ_BY_KERNELS,
    BaseFacts,
    ends_in,
    resolve,
    resolve_parameters,
    resolve_saved,
)


@dataclass(frozen=True)
class Chosen:
    """A layer that an adapter gets a method on."""

    place: Place
    kind: type[AdapterModule]
    base: Layer
    method: Method

    @property
    def name(self) -> str:
        """The layer's name, or the parameter's where it is on one."""
        return self.base.site.name if isinstance(self.base, ParameterLayer) else self.place.name

    def wrapper(self) -> AdapterModule | None:
        """The wrapper that is there already."""
        key = self.base.key if isinstance(self.base, ParameterLayer) else None
        return self.place.wrapper(self.kind, key)


def on_targets(config: PeftConfig, found: dict[str, Place], facts: BaseFacts) -> list[Chosen]:
    """The layers of the method itself."""
    if not isinstance(config, TargetedConfig):
        return []
    assert isinstance(config, Method)
    kind = _wrapper_of(config)
    if getattr(config, "target_parameters", None):
        raw = [f"{name}.{key}" for name, place in found.items() for key in place.layer._parameters]
        facts = dataclasses.replace(facts, parameters=raw)
    chosen = []
    blocks = (
        config.blocks(list(facts.layers), facts.architecture) if isinstance(config, BlockMethod) else None
    )
    names = _tying(config, resolve(config, facts), found, facts) if blocks is None else blocks
    for name in names:
        pause()
        base = _door(found[name], kind)
        _check_kind(config, base)
        if kind is Replaced:
            _check_whole(name, found[name].layer)
        chosen.append(Chosen(found[name], kind, base, config.at(base.site)))
        if base.site.kind == "mha" and kind is Adapted:
            if getattr(config, "dropout", 0):
                warnings.warn(
                    f"targets: {name!r} reads the changed weight as a whole, so dropout has no effect on it.",
                    stacklevel=4,
                )
            # It reads the weight of its output projection itself; HF PEFT adapts both or none.
            inner = found[f"{name}.{OUT_PROJ}"]
            base = _door(inner, kind)
            # One layer to whoever names ranks.
            base.site = dataclasses.replace(base.site, name=name)
            chosen.append(Chosen(inner, kind, base, config.at(base.site)))
    return [*chosen, *_parameters(config, found, facts, {each.place.name for each in chosen})]


def without_tied(
    chosen: list[Chosen], found: dict[str, Place]
) -> tuple[list[Chosen], list[tuple[Chosen, Chosen]]]:
    """The layers of their own, and of those that share the weight of one of them, whether chosen or not, where
    its method asks for them: (layer, the one whose tensors serve it)."""
    tied: dict[str, tuple[Chosen, Chosen]] = {}
    for each in chosen:
        method = each.method.tied(each.base.site)
        weight = each.place.layer._parameters.get("weight")
        if method is None or weight is None or each.place.name in tied:
            continue
        for name, place in found.items():
            if place.layer is not each.place.layer and place.layer._parameters.get("weight") is weight:
                there = place.wrapper(each.kind)
                base = there.base if there is not None else _door(place, each.kind)  # type: ignore[attr-defined]
                tied[name] = Chosen(place, each.kind, base, method), each
    return [each for each in chosen if each.place.name not in tied], list(tied.values())


def _parameters(
    config: PeftConfig, found: dict[str, Place], facts: BaseFacts, taken: set[str]
) -> list[Chosen]:
    """The raw parameters that the method sits on: `target_parameters`."""
    if not getattr(config, "target_parameters", None):
        return []
    chosen = []
    for name in resolve_parameters(config, facts, bool(taken)):
        place = found[name.rpartition(".")[0]]
        key = name.rpartition(".")[2]
        if place.name in taken or any(parameter_of(w) is None for w in place.wrappers()):
            raise TargetError(
                f"target_parameters: {name!r} is a parameter of {place.name!r}, on which an adapter sits as a "
                "layer. Name one or the other; target_modules=[] names no layer."
            )
        there: Any = place.wrapper(Adapted, key)
        base = ParameterLayer(place.layer, name) if there is None else there.base
        _check_kind(config, base)
        assert isinstance(config, Method)
        chosen.append(Chosen(place, Adapted, base, config.at(base.site)))
    for each in chosen:
        before = {parameter_of(wrapper) for wrapper in each.place.wrappers()}
        now = {other.base.key for other in chosen if other.place is each.place}
        if before and before != now:
            raise TargetError(
                f"target_parameters: {', '.join(sorted(now))} of {each.place.name!r}, where adapters sit on "
                f"{', '.join(sorted(map(str, before)))}. All adapters of a module name the same parameters."
            )
    return chosen


def on_whole_modules(
    config: PeftConfig, found: dict[str, Place], facts: BaseFacts
) -> tuple[list[Chosen], list[tuple[Chosen, Chosen]]]:
    """The modules that are trained whole, `modules_to_save`, and those that are tied to one of them."""
    chosen, tied = [], []
    names = resolve_saved(getattr(config, "modules_to_save", None), facts)
    for name in _tying(config, names, found, facts):
        layer = found[name].layer
        if any(isinstance(part, AdapterModule) for part in layer.modules()):
            raise TargetError(
                f"modules_to_save: {name!r} holds layers that other adapters sit on. Name its layers."
            )
        if isinstance(layer, _CONTAINERS):
            raise ContainerError(
                f"modules_to_save: {name!r} is a {type(layer).__name__}, which is never called itself, so that nothing "
                "of it would be trained. Name the modules in it."
            )
        _check_whole(name, layer)
        if any(True for _ in layer.parameters()):
            chosen.append(
                Chosen(found[name], Replaced, Layer(layer, name), ModulesToSave(_kept(name, layer)))
            )
        if getattr(config, "ensure_weight_tying", False) and name == facts.embedding:
            for other in _sharing(found, name):
                place = found[other]
                tied.append((Chosen(place, Replaced, Layer(place.layer, other), SameModule()), chosen[-1]))
    return chosen, tied


def _kept(name: str, layer: nn.Module) -> tuple[tuple[str, tuple[int, ...], bool], ...]:
    """The buffers of a module that a checkpoint of it holds: of each its name, its shape and whether it is int64."""
    saved = layer.state_dict(keep_vars=True)
    held = [(key, buffer) for key, buffer in layer.named_buffers() if key in saved]
    other = [key for key, b in held if not b.is_floating_point() and b.dtype != torch.int64]
    if other:
        warnings.warn(f"modules_to_save: {', '.join(other)} of {name!r} stay the base's.", stacklevel=5)
    return tuple((key, tuple(b.shape), b.dtype == torch.int64) for key, b in held if key not in other)


_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def _check_whole(name: str, layer: nn.Module) -> None:
    """Refuses to train a module whole of which a weight is stored as codes."""
    for key, p in layer.named_parameters():
        if not p.is_floating_point() or type(p).__name__ == "Params4bit":
            raise TargetError(
                f"{name}.{key} is quantised, so it cannot be trained whole. Leave {name!r} out, or put an "
                "adapter on its layers."
            )


def _sharing(found: dict[str, Place], name: str | None) -> list[str]:
    """The other layers that share the weight of a layer."""
    weight = None if name is None else found[name].layer._parameters.get("weight")
    return [
        other
        for other, place in found.items()
        if weight is not None and other != name and place.layer._parameters.get("weight") is weight
    ]


def _tying(config: Any, names: list[str], found: dict[str, Place], facts: BaseFacts) -> list[str]:
    """`names`, with the input embedding in the place of layers that share its weight, where the config ties
    their adapters."""
    others = _sharing(found, facts.embedding)
    if not getattr(config, "ensure_weight_tying", False) or not {*others} & {*names}:
        return names
    wanted = {facts.embedding, *names} - {*others}
    return [name for name in facts.layers if name in wanted]


def on_token_rows(
    config: Any, found: dict[str, Place], facts: BaseFacts, taken: list[Chosen]
) -> list[Chosen]:
    """The embeddings some of whose rows are trained beside the adapter: `trainable_token_indices`."""
    given = getattr(config, "trainable_token_indices", None)
    others = _sharing(found, facts.embedding)
    _say_untied(config, facts, others, taken, given)
    if given is None:
        return []
    if not isinstance(given, dict):
        given = {facts.embedding or "embed_tokens": given}
    wanted: dict[str, list[int]] = {}
    for target, tokens in given.items():
        names = [name for name in facts.layers if ends_in([target], name)]
        if not names:
            raise TargetError(f"trainable_token_indices: {target!r} matched no layer of {facts.name}.")
        wanted |= dict.fromkeys(names, tokens)
    tied = [name for name in wanted if name in (facts.embedding, *others)]
    agree = all(list(wanted[name]) == list(wanted[tied[0]]) for name in tied)
    if not agree and config.ensure_weight_tying:
        raise ConfigError(
            f"trainable_token_indices: {', '.join(tied)} share one weight, and their tokens differ. Name the same "
            "ones, or leave ensure_weight_tying out."
        )
    chosen = []
    for name, tokens in wanted.items():
        for each in taken:
            if each.place.name == name:
                field_name = "modules_to_save" if each.kind is Replaced else "target_modules"
                raise ConfigError(
                    f"trainable_token_indices: {name!r} is among {field_name} already. Name it in one of them."
                )
        base = _door(found[name], Adapted)
        method = RowsBeside(tuple(tokens), ties=agree and name == facts.embedding)
        _check_kind_of(base, method.layers, "trainable_token_indices")
        chosen.append(Chosen(found[name], Adapted, base, method))
    return chosen


def _say_untied(config: Any, facts: BaseFacts, others: list[str], taken: list[Chosen], rows: Any) -> None:
    if not getattr(config, "ensure_weight_tying", False):
        tied = [name for name in (facts.embedding, *others) if any(each.place.name == name for each in taken)]
        if others and tied:
            instead = (
                " Set ensure_weight_tying for one adapter on all of them."
                if hasattr(config, "ensure_weight_tying")
                else ""
            )
            warnings.warn(
                f"{', '.join(map(repr, tied))} of {facts.name}: {facts.embedding!r} and {', '.join(map(repr, others))} "
                f"share one weight, and the adapter changes what it sits on alone: merging it unties them.{instead}",
                stacklevel=4,
            )
        return
    if not others:
        warnings.warn(
            f"ensure_weight_tying: no layer of {facts.name} shares the input embedding's weight; it has no effect.",
            stacklevel=4,
        )
    elif rows is None and not any(each.place.name == facts.embedding for each in taken):
        warnings.warn(
            "ensure_weight_tying: the adapter is on no layer that shares its weight; it has no effect.",
            stacklevel=4,
        )


def on_biases(config: PeftConfig, found: dict[str, Place], facts: BaseFacts, taken: set[str]) -> list[Chosen]:
    """The other layers whose biases are trained too: `bias: all`.

    Raises:
        TargetError: the model reads one of them without calling its layer.
    """
    if getattr(config, "bias", "none") != "all":
        return []
    chosen = []
    for name, place in found.items():
        inside = any(name == other or name.startswith(f"{other}.") for other in taken)
        if place.layer._parameters.get("bias") is not None and not inside:
            if facts.layers[name] == READ_BY_KERNELS:
                raise TargetError(
                    f"bias: all: {facts.name} reads the bias of {name!r} past its layer's forward, so that a copy "
                    "would do nothing there. Train the targets' biases alone (`lora_only` and its like), or none."
                )
            there: Any = place.wrapper(Adapted)
            made = door if has_door(place.layer) else Layer
            base = made(place.layer, name) if there is None else there.base
            chosen.append(Chosen(place, Adapted, base, BiasCopy(_is_channels_first(base.layer))))
            outer = found.get(name.rpartition(".")[0])
            if outer is not None and isinstance(outer.layer, nn.MultiheadAttention):
                chosen.append(Chosen(outer, Adapted, _door(outer, Adapted), Unchanged()))
    return chosen


def _is_channels_first(layer: nn.Module) -> bool:
    """Whether a layer's bias goes along the second dimension of what it gives."""
    kinds = (nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.modules.conv._ConvTransposeNd)
    # Norms of transformers and of timm that stand among convolutions.
    return isinstance(layer, kinds) or (
        getattr(layer, "data_format", None) == "channels_first" or type(layer).__name__ == "LayerNorm2d"
    )


def _wrapper_of(config: Method) -> type[AdapterModule]:
    if isinstance(config, BlockMethod):
        return AdaptedBlock
    return Replaced if isinstance(config, ReplaceMethod) else Adapted


def _door(place: Place, kind: type[AdapterModule]) -> Layer:
    there: Any = place.wrapper(kind)
    if there is not None:
        return there.base
    if kind is Adapted and place.wrapper(Adapted) is None and any(map(parameter_of, place.wrappers())):
        raise TargetError(
            f"targets: adapters sit on parameters of {place.name!r}, so none can sit on it as a layer. Delete "
            "them first, or name its parameters by target_parameters."
        )
    return door(place.layer, place.name) if kind is Adapted else Layer(place.layer, place.name)


def _check_kind(config: Any, base: Layer) -> None:
    _check_kind_of(base, config.layers, config.peft_type)


def _check_kind_of(base: Layer, layers: frozenset[str], what: str) -> None:
    if base.site.kind not in layers and "module" not in layers:
        raise TargetError(
            f"targets: {base.site.name!r} is a {type(base.layer).__name__}; {what} sits on "
            f"{', '.join(sorted(layers))}. Leave it out, or choose another method for it."
        )


def set_how_stored(config: Any, targeted: list[Chosen]) -> None:
    """Puts `fan_in_fan_out` right, with a warning: a layer knows itself whether it stores (in, out)."""
    linear = [each for each in targeted if each.base.site.kind == "linear"]
    if not hasattr(config, "fan_in_fan_out") or not linear:
        return
    last = linear[-1]
    is_transposed = isinstance(last.base.layer, Conv1D)
    if config.fan_in_fan_out != is_transposed:
        warnings.warn(
            f"fan_in_fan_out is {config.fan_in_fan_out}, but {last.name!r} is a "
            f"{type(last.base.layer).__name__}. It is set to {is_transposed}.",
            stacklevel=5,
        )
        config.fan_in_fan_out = is_transposed


def check_ranks(config: Any, site: Site, wanted: Mapping[str, Param]) -> None:
    """Refuses factors of a higher rank than a matrix of either of the layer's sizes can have."""
    sizes = (site.out, site.in_ * site.groups)
    for param in wanted.values():
        if not {"in", "out"} & set(param.dims):
            continue
        for dim, length in zip(param.dims, param.shape, strict=True):
            r = length if dim == "r" else length // max(1, site.experts) if " x " in dim else 0
            if r > max(sizes):
                raise ConfigError(
                    f"{config.peft_type}: a rank of {r} at {site.name!r}, whose weight is {sizes[0]} x "
                    f"{sizes[1]}. A rank over {min(sizes)} adds nothing there; choose a smaller one."
                )
