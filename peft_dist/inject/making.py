"""Puts an adapter on the layers that were chosen.

Everything that can be refused is refused before the base is touched; a failure half-way leaves it as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from peft_dist import packed
from peft_dist.adapted import Adapted, AdaptedBlock, AdapterModule, Replaced
from peft_dist.base_layer import (
    Layer,
    ParameterLayer,
)
from peft_dist.config import PeftConfig
from peft_dist.contract import Method
from peft_dist.errors import AdapterError
from peft_dist.inject.choosing import (
    check_ranks,
    on_biases,
    on_targets,
    on_token_rows,
    on_whole_modules,
    set_how_stored,
    without_tied,
)
from peft_dist.inject.places import (
    Place,
    adapter_modules,
    facts_of,
    places,
)
from peft_dist.inject.serving import delete
from peft_dist.pauses import pause
from peft_dist.pool import AdapterPool
from peft_dist.pooled import PooledModule, outer_modules
from peft_dist.replicate import replicate
from peft_dist.rows import BASE, Current


@dataclass
class Adapters:
    """What the adapters of one model share.

    Attributes:
        pool: their tensors. current: what the model runs now.
        common: the module on which tensors hang that all layers of an adapter share; None where there is no
            model around the base to hold them.
        prompts: the module on which tensors of prompt methods hang, where there is one.
        sites: adapter -> the wrapped layers on which its method sits, by their names in the bare base.
    """

    pool: AdapterPool = field(default_factory=AdapterPool)
    current: Current = field(default_factory=Current)
    common: PooledModule | None = None
    prompts: PooledModule | None = None
    sites: dict[str, dict[str, AdapterModule]] = field(default_factory=dict)


def beside_others(model: nn.Module) -> Adapters:
    """For a model around a base: with those that the base has already, of a model that was around it before."""
    there = next((module for module in model.modules() if isinstance(module, AdapterModule)), None)
    return Adapters() if there is None else Adapters(there._pool, there._current)


def check_name(adapter: str, taken: Any) -> None:
    """Whether an adapter may be called so: it is part of Parameters' names, and a folder's when saved.

    Raises:
        AdapterError: the name is no text, empty, reserved, not a folder's, or taken.
    """
    if not isinstance(adapter, str):
        raise AdapterError(f"adapter {adapter!r}: a name is text, such as {str(adapter)!r}.")
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
    targeted, tied = without_tied(on_targets(config, found, facts), found)
    whole, tied_whole = on_whole_modules(config, found, facts)
    rows, tied_rows = without_tied(on_token_rows(config, found, facts, [*targeted, *whole]), found)
    tied += [*tied_whole, *tied_rows]
    # Asked once before anything is touched: a method may refuse its neighbours, or a layer.
    shared = {}
    if isinstance(config, Method):
        config.check_beside(_neighbours(config, adapters))
        sites = [each.base.site for each in targeted]
        shared = config.shared(sites)
        if (over := config.over(sites)) is not config:
            targeted = [replace(each, method=over.at(each.base.site)) for each in targeted]
    chosen = [*targeted, *whole, *rows]
    chosen += on_biases(config, found, facts, {each.place.name for each in chosen})
    for each in chosen:
        pause()
        wanted = each.method.params(each.base.site)  # type: ignore[attr-defined]
        check_ranks(config, each.base.site, wanted)
    if shared and adapters.common is None:
        raise AdapterError(
            f"adapter {adapter!r}: the layers of {config.peft_type} share tensors, which a bare base cannot "
            "hold. Use get_peft_model."
        )
    set_how_stored(config, targeted)
    if adapters.sites:
        # What a program lets train, or freezes, beside the adapters that are there stays so.
        packed.settle_base(model, [module for _, module in outer_modules(model)])
    else:
        freeze(model)
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
            pause()
            wrapper = each.wrapper() or _wrap(each.place, each.kind, each.base, adapters)
            wrapper.share(adapter, adapters.common)
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
    """The base's own parameters get no gradient and keep their values; adapters' are left as they are."""
    modules = [module for _, module in outer_modules(model)]
    packed.settle_base(model, modules)
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
