"""Adapters into a base: chooses the layers, wraps them in place, makes room, fills, freezes the rest.

Everything that can be refused is refused before the base is touched.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dist.adapted import Adapted, AdaptedBlock, AdapterModule, Replaced
from peft_dist.base_layer import (
    OUT_PROJ,
    Layer,
    ParameterLayer,
    adopt_quantised,
    door,
    has_door,
    kind_of,
)
from peft_dist.config import PeftConfig, TargetedConfig
from peft_dist.contract import BlockMethod, Method, Param, ReplaceMethod, Site
from peft_dist.errors import AdapterError, ConfigError, TargetError
from peft_dist.methods.lora.tokens import RowsBeside
from peft_dist.methods.replace.modules_to_save import ModulesToSave, SameModule
from peft_dist.methods.weight.bias import BiasCopy, Unchanged
from peft_dist.pool import AdapterPool, PooledModule, outer_modules
from peft_dist.replicate import replicate
from peft_dist.rows import BASE, Current
from peft_dist.targets import (
    READ_BY_PARENT,
    BaseFacts,
    ends_in,
    resolve,
    resolve_parameters,
    resolve_saved,
)


@dataclass
class Adapters:
    """What the adapters of one model share.

    Attributes:
        pool: their tensors. current: what the model runs now.
        common: the module on which tensors hang that all layers of an adapter share; None where there is no
            model around the base to hold them.
        sites: adapter -> the wrapped layers on which its method sits, by their names in the bare base.
    """

    pool: AdapterPool = field(default_factory=AdapterPool)
    current: Current = field(default_factory=Current)
    common: PooledModule | None = None
    sites: dict[str, dict[str, AdapterModule]] = field(default_factory=dict)


@dataclass
class Place:
    """Where a layer of the base hangs: `parent._modules[key]`, wrapped or not."""

    name: str
    parent: nn.Module
    key: str
    module: nn.Module

    @property
    def layer(self) -> nn.Module:
        """The base's own layer."""
        layer: Any = self.module
        while isinstance(layer, AdapterModule):
            layer = layer.base_layer
        return layer

    def wrapper(self, kind: type[AdapterModule], parameter: str | None = None) -> AdapterModule | None:
        """The wrapper of this kind around the layer, or around one raw parameter of it, where there is
        one."""
        found = (each for each in self.wrappers() if isinstance(each, kind))
        return next((each for each in found if _parameter_of(each) == parameter), None)

    def wrappers(self) -> Iterator[AdapterModule]:
        """The wrappers around the layer, the outermost first."""
        module: Any = self.module
        while isinstance(module, AdapterModule):
            yield module
            module = module.base_layer


def _parameter_of(wrapper: Any) -> str | None:
    base = getattr(wrapper, "base", None)
    return base.key if isinstance(base, ParameterLayer) else None


def places(model: nn.Module) -> dict[str, Place]:
    """Every module of the base by its name in the bare base, wrappers looked through."""
    return {place.name: place for place in _walk(model, "", set())}


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[Place]:
    for key, child in module._modules.items():
        if child is None or id(child) in seen:
            continue
        seen.add(id(child))
        name = f"{prefix}.{key}" if prefix else key
        place = Place(name, module, key, child)
        yield place
        yield from _walk(place.layer, name, seen)


def facts_of(model: Any, found: dict[str, Place]) -> BaseFacts:
    """What targets are chosen from."""
    output = asked(model, "get_output_embeddings")
    heads = {name for name, place in found.items() if output is not None and place.layer is _bare(output)}
    kinds = {
        name: READ_BY_PARENT if isinstance(place.parent, nn.MultiheadAttention) else kind_of(place.layer)
        for name, place in found.items()
    }
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    inputs = _bare(asked(model, "get_input_embeddings"))
    embedding = next((name for name, place in found.items() if place.layer is inputs), None)
    return BaseFacts(type(model).__name__, kinds, frozenset(heads), architecture, embedding=embedding)


def asked(base: Any, getter: str) -> nn.Module | None:
    """The layer that a base names by a method, or None: transformers' convolutional models raise there."""
    try:
        return getattr(base, getter)() if hasattr(base, getter) else None
    except NotImplementedError:
        return None


def _bare(module: Any) -> nn.Module:
    while isinstance(module, AdapterModule):
        module = module.base_layer
    return module


def check_name(adapter: str, taken: Any) -> None:
    """Whether an adapter may be called so: it is part of Parameters' names, and a folder's when saved.

    Raises:
        AdapterError: the name is empty, reserved, not a folder's, or taken.
    """
    if not adapter.strip(".") or "/" in adapter or "\\" in adapter or adapter == BASE:
        raise AdapterError(
            f"adapter {adapter!r}: a name has no '/' or '\\', is more than dots, and is not '{BASE}'. "
            "Choose another."
        )
    if adapter in taken:
        raise AdapterError(
            f"adapter {adapter!r}: the model has one of this name. Delete it first, or choose another."
        )


def adapter_dtype(base: Layer, autocast: bool) -> torch.dtype:
    """The dtype of an adapter's tensors on a layer: the layer's, or fp32 for half precision and below."""
    dtype = base.dtype
    below = dtype.itemsize == 1 or base.is_quantised or (autocast and dtype.itemsize < 4)
    return torch.float32 if below else dtype


def inject(
    model: nn.Module,
    config: PeftConfig,
    adapter: str,
    adapters: Adapters,
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    start: bool = True,
) -> list[str]:
    """Puts an adapter on the base in place; a collective where a start reads partitioned weights.

    Args:
        low_cpu_mem_usage: makes the adapter's tensors on meta; whoever loads them gives them memory.
        start: fills the tensors; False where a checkpoint will.

    Returns:
        names of the layers it sits on.

    Raises:
        TargetError: targets match nothing, or a layer that cannot be adapted.
        AdapterError: its layers share tensors, and nothing is there to hold them.
    """
    ranges = getattr(config, "layer_replication", None)
    if ranges is None:
        return _inject(model, config, adapter, adapters, autocast_adapter_dtype, low_cpu_mem_usage, start)
    undo = replicate(model, ranges, any(True for _ in adapter_modules(model)))
    try:
        return _inject(model, config, adapter, adapters, autocast_adapter_dtype, low_cpu_mem_usage, start)
    except BaseException:
        undo()
        raise


def _inject(
    model: nn.Module,
    config: PeftConfig,
    adapter: str,
    adapters: Adapters,
    autocast_adapter_dtype: bool,
    low_cpu_mem_usage: bool,
    start: bool,
) -> list[str]:
    found = places(model)
    facts = facts_of(model, found)
    targeted, tied = _without_tied(_targeted(config, found, facts), found)
    whole, tied_whole = _whole(config, found, facts)
    rows, tied_rows = _without_tied(_token_rows(config, found, facts, [*targeted, *whole]), found)
    tied += [*tied_whole, *tied_rows]
    chosen = [*targeted, *whole, *rows]
    chosen += _biases(config, found, {each.place.name for each in chosen})
    # Asked once before anything is touched: a method may refuse its neighbours, or a layer.
    if isinstance(config, Method):
        config.check_beside(_neighbours(config, adapters))
    shared = config.shared([each.base.site for each in targeted]) if isinstance(config, Method) else {}
    for each in chosen:
        wanted = each.method.params(each.base.site)  # type: ignore[attr-defined]
        _check_ranks(config, each.base.site, wanted)
    if shared and adapters.common is None:
        raise AdapterError(
            f"adapter {adapter!r}: the layers of {config.peft_type} share tensors, which a bare base cannot "
            "hold. Use get_peft_model."
        )
    _set_how_stored(config, targeted)
    freeze(model)
    adopt_quantised(place.layer for place in found.values())
    fills = start and not low_cpu_mem_usage
    try:
        if shared:
            assert adapters.common is not None
            base = targeted[0].base
            device = torch.device("meta") if low_cpu_mem_usage else base.device
            dtype = adapter_dtype(base, autocast_adapter_dtype)
            adapters.common.hold(adapter, type(config).__name__, shared, dtype, device)
            if fills:
                adapters.common.fill(adapter)
        adapters.sites[adapter] = {}
        for each in chosen:
            wrapper = each.wrapper() or _wrap(each.place, each.kind, each.base, adapters)
            device = torch.device("meta") if low_cpu_mem_usage else each.base.device
            dtype = adapter_dtype(each.base, autocast_adapter_dtype)
            wrapper.add(adapter, each.method, each.base, dtype, device)
            if fills:
                wrapper.start(adapter, each.base)
            if len(adapters.sites[adapter]) < len(targeted):
                adapters.sites[adapter][each.name] = wrapper
        for each, lender in tied:
            wrapper = each.wrapper() or _wrap(each.place, each.kind, each.base, adapters)
            wrapper.borrow(adapter, each.method, lender.wrapper())  # type: ignore[arg-type]
        _leave_fast_paths(model, found)
    except BaseException:
        delete(model, adapter)
        forget(adapter, adapters)
        raise
    return [each.name for each in targeted]


@dataclass(frozen=True)
class _Chosen:
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


def _targeted(config: PeftConfig, found: dict[str, Place], facts: BaseFacts) -> list[_Chosen]:
    """The layers of the method itself."""
    if not isinstance(config, TargetedConfig):
        return []
    assert isinstance(config, Method)
    kind = _wrapper_of(config)
    chosen = []
    blocks = (
        config.blocks(list(facts.layers), facts.architecture) if isinstance(config, BlockMethod) else None
    )
    names = _tying(config, resolve(config, facts), found, facts) if blocks is None else blocks
    for name in names:
        base = _door(found[name], kind)
        _check_kind(config, base)
        if kind is Replaced:
            _check_whole(name, found[name].layer)
        chosen.append(_Chosen(found[name], kind, base, config.at(base.site)))
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
            chosen.append(_Chosen(inner, kind, base, config.at(base.site)))
    return [*chosen, *_parameters(config, found, facts, {each.place.name for each in chosen})]


def _without_tied(
    chosen: list[_Chosen], found: dict[str, Place]
) -> tuple[list[_Chosen], list[tuple[_Chosen, _Chosen]]]:
    """The layers of their own, and of those that share the weight of one of them, whether chosen or not, where
    its method asks for them: (layer, the one whose tensors serve it)."""
    tied: dict[str, tuple[_Chosen, _Chosen]] = {}
    for each in chosen:
        method = each.method.tied(each.base.site)
        weight = each.place.layer._parameters.get("weight")
        if method is None or weight is None or each.place.name in tied:
            continue
        for name, place in found.items():
            if place.layer is not each.place.layer and place.layer._parameters.get("weight") is weight:
                there = place.wrapper(each.kind)
                base = there.base if there is not None else _door(place, each.kind)  # type: ignore[attr-defined]
                tied[name] = _Chosen(place, each.kind, base, method), each
    return [each for each in chosen if each.place.name not in tied], list(tied.values())


def _parameters(
    config: PeftConfig, found: dict[str, Place], facts: BaseFacts, taken: set[str]
) -> list[_Chosen]:
    """The raw parameters that the method sits on: `target_parameters`."""
    if not getattr(config, "target_parameters", None):
        return []
    names = [f"{name}.{key}" for name, place in found.items() for key in place.layer._parameters]
    chosen = []
    for name in resolve_parameters(config, dataclasses.replace(facts, parameters=names), bool(taken)):
        place = found[name.rpartition(".")[0]]
        key = name.rpartition(".")[2]
        if place.name in taken or any(_parameter_of(w) is None for w in place.wrappers()):
            raise TargetError(
                f"target_parameters: {name!r} is a parameter of {place.name!r}, on which an adapter sits as a "
                "layer. Name one or the other; target_modules=[] names no layer."
            )
        there: Any = place.wrapper(Adapted, key)
        base = ParameterLayer(place.layer, name) if there is None else there.base
        _check_kind(config, base)
        assert isinstance(config, Method)
        chosen.append(_Chosen(place, Adapted, base, config.at(base.site)))
    for each in chosen:
        before = {_parameter_of(wrapper) for wrapper in each.place.wrappers()}
        now = {other.base.key for other in chosen if other.place is each.place}
        if before and before != now:
            raise TargetError(
                f"target_parameters: {', '.join(sorted(now))} of {each.place.name!r}, where adapters sit on "
                f"{', '.join(sorted(map(str, before)))}. All adapters of a module name the same parameters."
            )
    return chosen


def _whole(
    config: PeftConfig, found: dict[str, Place], facts: BaseFacts
) -> tuple[list[_Chosen], list[tuple[_Chosen, _Chosen]]]:
    """The modules that are trained whole, `modules_to_save`, and those that are tied to one of them."""
    chosen, tied = [], []
    names = resolve_saved(getattr(config, "modules_to_save", None), facts)
    for name in _tying(config, names, found, facts):
        layer = found[name].layer
        if any(isinstance(part, AdapterModule) for part in layer.modules()):
            raise TargetError(
                f"modules_to_save: {name!r} holds layers that other adapters sit on. Name its layers."
            )
        if any(True for _ in layer.buffers()):
            warnings.warn(f"modules_to_save: buffers of {name!r} stay the base's.", stacklevel=4)
        _check_whole(name, layer)
        if any(True for _ in layer.parameters()):
            chosen.append(_Chosen(found[name], Replaced, Layer(layer, name), ModulesToSave()))
        if getattr(config, "ensure_weight_tying", False) and name == facts.embedding:
            for other in _sharing(found, name):
                place = found[other]
                tied.append((_Chosen(place, Replaced, Layer(place.layer, other), SameModule()), chosen[-1]))
    return chosen, tied


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


def _token_rows(
    config: Any, found: dict[str, Place], facts: BaseFacts, taken: list[_Chosen]
) -> list[_Chosen]:
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
        chosen.append(_Chosen(found[name], Adapted, base, method))
    return chosen


def _say_untied(config: Any, facts: BaseFacts, others: list[str], taken: list[_Chosen], rows: Any) -> None:
    if not getattr(config, "ensure_weight_tying", False):
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


def _biases(config: PeftConfig, found: dict[str, Place], taken: set[str]) -> list[_Chosen]:
    """The other layers whose biases are trained too: `bias: all`."""
    if getattr(config, "bias", "none") != "all":
        return []
    chosen = []
    for name, place in found.items():
        inside = any(name == other or name.startswith(f"{other}.") for other in taken)
        if place.layer._parameters.get("bias") is not None and not inside:
            there: Any = place.wrapper(Adapted)
            made = door if has_door(place.layer) else Layer
            base = made(place.layer, name) if there is None else there.base
            chosen.append(_Chosen(place, Adapted, base, BiasCopy()))
            outer = found.get(name.rpartition(".")[0])
            if outer is not None and isinstance(outer.layer, nn.MultiheadAttention):
                chosen.append(_Chosen(outer, Adapted, _door(outer, Adapted), Unchanged()))
    return chosen


def _neighbours(config: Method, adapters: Adapters) -> list[Any]:
    """The methods of the adapters that are there and of its class, one for each."""
    firsts = [(name, wrapper) for name, sites in adapters.sites.items() for wrapper in [*sites.values()][:1]]
    methods = [wrapper.methods[name] for name, wrapper in firsts if name in wrapper.methods]
    return [method for method in methods if type(method) is type(config)]


def forget(adapter: str, adapters: Adapters) -> None:
    """Lets go of what the layers of an adapter shared."""
    adapters.sites.pop(adapter, None)
    if adapters.common is not None and adapter in adapters.common.adapters:
        adapters.common.drop(adapter)


def _wrapper_of(config: Method) -> type[AdapterModule]:
    if isinstance(config, BlockMethod):
        return AdaptedBlock
    return Replaced if isinstance(config, ReplaceMethod) else Adapted


def _door(place: Place, kind: type[AdapterModule]) -> Layer:
    there: Any = place.wrapper(kind)
    if there is not None:
        return there.base
    if kind is Adapted and place.wrapper(Adapted) is None and any(map(_parameter_of, place.wrappers())):
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


def _set_how_stored(config: Any, targeted: list[_Chosen]) -> None:
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


def _check_ranks(config: Any, site: Site, wanted: Mapping[str, Param]) -> None:
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


def _wrap(place: Place, kind: type[AdapterModule], base: Layer, adapters: Adapters) -> AdapterModule:
    name = base.site.name if isinstance(base, ParameterLayer) else place.name
    made = (name, adapters.pool, adapters.current, base, adapters.common)
    if kind is Adapted and isinstance(place.module, (Replaced, AdaptedBlock)):
        inner = Adapted(place.layer, *made)
        outer: Any = place.module
        outer.original_module = inner
        wrapper: AdapterModule = inner
    else:
        wrapper = kind(place.module, *made)  # type: ignore[arg-type, call-arg]
        place.parent._modules[place.key] = wrapper
        place.module = wrapper
    wrapper.train(base.layer.training)
    return wrapper


def _leave_fast_paths(model: nn.Module, found: dict[str, Place]) -> None:
    """Torch's encoder layers have a path for inference that reads their children's weights past all
    wrappers: not where adapters are."""
    layer: Any
    for layer in (model, *(place.layer for place in found.values())):
        if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and any(
            isinstance(part, AdapterModule) for part in layer.modules()
        ):
            if isinstance(layer, nn.TransformerEncoder):
                layer.use_nested_tensor = False
            else:
                layer.activation_relu_or_gelu = 0


def freeze(model: nn.Module) -> None:
    """The base's own parameters get no gradient; adapters' are left as they are."""
    for _, module in outer_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """(name in the bare base, wrapper) of every wrapped layer."""
    for place in places(model).values():
        for wrapper in place.wrappers():
            yield wrapper._site_name, wrapper


def remove_wrappers(model: nn.Module) -> None:
    """Puts the base's own layers back in the place of their wrappers."""
    for place in places(model).values():
        if isinstance(place.module, AdapterModule):
            place.parent._modules[place.key] = place.layer


def check_together(model: nn.Module, names: Sequence[str]) -> None:
    """Whether the named adapters can be active at once: one alone can stand in a module's place, and their
    methods may have more to say.

    Raises:
        AdapterError: two do, or one does where another sits on the same module; names it.
    """
    for place in places(model).values() if len(names) > 1 else ():
        for each in place.wrappers():
            here = {name: each.methods[name] for name in names if name in each.methods}
            for name, method in here.items():
                method.check_together(place.name, [other for key, other in here.items() if key != name])
        wrapper = place.wrapper(Replaced)
        if wrapper is None:
            continue
        stand_in = [name for name in names if name in wrapper.methods]
        under = place.wrapper(Adapted)
        beside = [
            name for name in names if under is not None and name in under.methods and name not in stand_in
        ]
        if len(stand_in) > 1 or (stand_in and beside):
            raise AdapterError(
                f"{place.name}: {stand_in[0]!r} stands in the module's place, so {(stand_in[1:] + beside)[0]!r} "
                "cannot act on it too. Activate one of them, or leave the module out of one's targets."
            )


def activate(model: nn.Module, names: list[str]) -> None:
    """Makes the named adapters serve rows that name none, in this order."""
    for _, module in adapter_modules(model):
        module.active_adapters = list(names)


def set_requires_grad(model: nn.Module, names: list[str], requires_grad: bool) -> None:
    """Lets the named adapters' tensors be trained, or not; others stay as they are. Frozen ones stay
    frozen."""
    for _, module in adapter_modules(model):
        for name in names:
            for key, param in module.wanted(name).items():
                module.tensors(name)[key].requires_grad_(requires_grad and param.trainable)


def delete(model: nn.Module, adapter: str) -> None:
    """Removes an adapter, and the wrappers that are left without any.

    Raises:
        AdapterError: it is merged; nothing is removed.
    """
    modules = [(name, module) for name, module in adapter_modules(model) if adapter in module.adapters]
    for name, module in modules:
        if adapter in module.merged_adapters:
            raise AdapterError(f"{name}: adapter {adapter!r} is merged. Unmerge it before deleting it.")
    for _, module in modules:
        module.delete(adapter)
    for place in places(model).values():
        _unwrap_empty(place)


def _unwrap_empty(place: Place) -> None:
    parent, key = place.parent, place.key
    module: Any = place.module
    while isinstance(module, AdapterModule):
        inner: Any = module.base_layer
        if not module.adapters:
            parent._modules[key] = inner
        else:
            parent, key = module, "base_layer" if isinstance(module, Adapted) else "original_module"
        module = inner
