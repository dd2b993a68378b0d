"""Adapters into the base's weights and out again: W + dW, computed in fp32 and rounded once to W's dtype.

Knows no method and no storage: `Adapted.change` gives dW and db, the layer's door adds them. Under ZeRO-3
every function here is a collective, and what it changes holds on every rank and across steps. The stored bits
are kept at a merge, so unmerging restores them exactly in any dtype; at stage 3 a rank keeps its own piece of
them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.adapted import Adapted, AdapterModule, Replaced
from peft_dist.base_layer import QuantisedLayer, door
from peft_dist.contract import Method, PromptMethod
from peft_dist.errors import AdapterError, MergeError, suggest
from peft_dist.inject import adapter_modules, check_together, remove_wrappers
from peft_dist.packed import is_quantised
from peft_dist.pooled import outer_modules
from peft_dist.sharding import (
    gathered,
    is_partitioned,
    layers_changed,
    partition_like,
    set_whole,
    stored_bits,
    whole,
)

_KEPT = "_kept_at_merge"
_TIED = "_tied_before_merge"
_QUANTISED = "_quantised_before_merge"


def merge(
    base: nn.Module,
    adapter_names: Sequence[str] | None = None,
    safe_merge: bool = False,
    *,
    keep: bool = True,
    dequantize: bool = False,
) -> list[str]:
    """Adds the adapters' changes to the weights of `base`, in place; the bare layers then serve them.

    Adapters that are merged already stay so: their changes and the new ones are put together anew on the
    stored weights, as if merged at once. A merged adapter of LN_TUNING serves its own tensors whichever adapter is
    active; modules trained whole (`modules_to_save`) go on serving their active adapter's copy.

    Args:
        base: the model whose layers are wrapped.
        adapter_names: in the order in which they act; the active ones by default.
        safe_merge: look first whether every merged weight is finite, and change nothing if one is not.
        keep: keep the stored weights for `unmerge`: as much memory again as the adapted layers take.
        dequantize: a quantised layer becomes an ordinary nn.Linear of W + dW, in the dtype of the base's other
            weights; else W + dW is quantised anew. `unmerge` makes it what it was.

    Returns:
        the names that are merged now.

    Raises:
        AdapterError: an adapter that has no layer here.
        MergeError: a merged weight would not be finite (`safe_merge`); other adapters are merged and the
        stored
            weights were not kept.
    """
    wrappers = [module for _, module in adapter_modules(base)]
    modules = [module for module in wrappers if isinstance(module, Adapted)]
    merged_before = _merged(wrappers)
    wanted = _names(wrappers, adapter_names)
    new = [name for name in wanted if name not in merged_before]
    if not new:
        if merged_before:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
        return merged_before
    names = [*merged_before, *new]
    check_together(base, names)
    if merged_before:
        warnings.warn(
            f"{', '.join(merged_before)} were merged already; {', '.join(new)} are now merged with them.",
            stacklevel=2,
        )
        unmerge(base)
    touched = [module for module in modules if any(name in module.methods for name in names)]
    users = _users(base)
    if safe_merge:
        _check_finite(touched, names)
    dtype = dtype_of(base) if dequantize else torch.float32
    if dequantize or any(_is_tied(module, key, users) for module in touched for key in _keys(module)):
        layers_changed(base)
    for module in touched:
        dW, db = _change(module, names)
        if dequantize and isinstance(module.base, QuantisedLayer) and dW is not None:
            _merge_dense(module, dW, db, dtype, keep)
            continue
        for key, change in zip(_keys(module), (dW, db), strict=True):
            if change is not None:
                _untie(module, key, users, names)
        old = module.base.exchange_(_own(dW, module, names)) if keep and dW is not None else None
        if keep:
            _keep(module, old)
        if dW is not None and old is None:
            module.base.add_(dW)
        if db is not None:
            module.base.add_bias_(db)
    # Also where a merged adapter has nothing: a layer must not add the active ones on top of the merged ones.
    for module in modules:
        module.merged_adapters = list(names)
    for wrapper in wrappers:
        if isinstance(wrapper, Replaced) and any(_stands_in(wrapper, name) for name in names):
            wrapper.merged_adapters = list(names)
    return names


def unmerge(base: nn.Module) -> None:
    """Puts back the stored weights, bit for bit, and the adapters to work.

    Raises:
        MergeError: the stored weights were not kept at the merge.
    """
    merged = [module for _, module in adapter_modules(base) if module.merged_adapters]
    if not merged:
        warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
        return
    layers = [module for module in merged if isinstance(module, Adapted)]
    changed = [m for m in layers if any(name in m.methods for name in m.merged_adapters)]
    lost = [module for module in changed if not {_KEPT, _QUANTISED} & module.__dict__.keys()]
    if lost:
        raise MergeError(
            f"{lost[0]._site_name}: the stored weight was not kept when {lost[0].merged_adapters} was "
            "merged, and "
            "subtracting would not restore its bits. Load the base again, or merge with keep=True."
        )
    if is_dequantised(base) or any(_TIED in module.base.layer.__dict__ for module in changed):
        layers_changed(base)
    for module in changed:
        if _QUANTISED in module.__dict__:
            module.base, turn_back = module.__dict__.pop(_QUANTISED)
            turn_back()
            continue
        _retie(module)
        module.base.restore_(module.__dict__.pop(_KEPT))
    for wrapper in merged:
        wrapper.merged_adapters = []


def merge_and_unload(
    base: nn.Module,
    adapter_names: Sequence[str] | None = None,
    safe_merge: bool = False,
    *,
    dequantize: bool = False,
) -> nn.Module:
    """`base` with the adapters' changes in its weights and without their wrappers; in place.

    Modules trained whole take the copy of the last of the adapters that has one.

    Args:
        dequantize: as `merge`, and every other quantised layer becomes an nn.Linear too: the base is then an
            ordinary one. Adapters that are merged already are merged anew.

    Raises:
        AdapterError, MergeError: as `merge`.
    """
    if dequantize:
        layers_changed(base)
    wrappers = [module for _, module in adapter_modules(base)]
    merged = _merged(wrappers)
    names = [*merged, *_names(wrappers, adapter_names)]
    replaced = [module for module in wrappers if isinstance(module, Replaced)]
    apart = _apart(base, replaced, names)
    if dequantize and merged and not is_dequantised(base):
        unmerge(base)
        merged, adapter_names = [], names
    if set(names) - set(merged):
        names = merge(base, adapter_names, safe_merge, keep=False, dequantize=dequantize)
    for module in replaced:
        _take_over(module, names, apart)
    remove_wrappers(base)
    if _stay_untied(base):
        _say_untied(base)
    if dequantize:
        _dequantise(base)
    return base


def unload(base: nn.Module) -> nn.Module:
    """`base` without adapters and their wrappers, its weights as they were; in place.

    Raises:
        MergeError: adapters are merged and the stored weights were not kept.
    """
    if any(module.merged_adapters for _, module in adapter_modules(base)):
        unmerge(base)
    remove_wrappers(base)
    return base


def is_dequantised(base: nn.Module) -> bool:
    """Whether adapters are merged into layers that were quantised, and are dense until `unmerge`."""
    return any(_QUANTISED in module.__dict__ for _, module in adapter_modules(base))


def _stands_in(module: Replaced, name: str) -> bool:
    """Whether an adapter's tensors are in the place of the module's own when it is merged."""
    return name in module.methods and not module.methods[name].is_beside


def refuse_unmergeable(methods: Mapping[str, object], adapter_names: Sequence[str] | None) -> None:
    """Raises for an adapter that is no change of weights, so that there is nothing to merge it into.

    Args:
        methods: adapter -> its config.

    Raises:
        MergeError: names the adapter and its method.
    """
    for name in methods if adapter_names is None else adapter_names:
        method = methods.get(name)
        if isinstance(method, Method) and not method.merges:
            what = (
                "adds tokens before the input and changes no weight"
                if isinstance(method, PromptMethod)
                else "depends on the input in a way that no weight can hold"
            )
            raise MergeError(
                f"adapter {name!r}: {getattr(method, 'peft_type', type(method).__name__)} {what}, so it "
                "cannot be merged. Serve it as an adapter."
            )


def _names(wrappers: Sequence[AdapterModule], adapter_names: Sequence[str] | None) -> list[str]:
    known: dict[str, None] = {}
    active: dict[str, None] = {}
    for module in wrappers:
        known |= dict.fromkeys(module.methods)
        active |= dict.fromkeys(module.active_adapters)
    names = list(active) if adapter_names is None else list(dict.fromkeys(adapter_names))
    for name in names:
        if name not in known:
            raise AdapterError(
                f"merge: there is no adapter {name!r}; there are: "
                f"{', '.join(known) or 'none'}.{suggest(name, known)}"
            )
    return names


def _merged(wrappers: Sequence[AdapterModule]) -> list[str]:
    return next((list(m.merged_adapters) for m in wrappers if m.merged_adapters), [])


def _change(module: Adapted, names: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
    """`Adapted.change`, also of adapters that a user's own engine has partitioned."""
    here = [name for name in names if name in module.methods]
    with gathered(tensor for name in here for tensor in module.tensors(name).values()):
        return module.change(here)


def _check_finite(modules: Sequence[Adapted], names: Sequence[str]) -> None:
    for module in modules:
        dW, db = _change(module, names)
        with torch.no_grad():
            merged = [] if dW is None else [module.base.plus(module.base.weight(), dW)]
            bias = module.base.bias()
            if bias is not None and db is not None:
                merged.append(bias + db)
        if not all(bool(torch.isfinite(value.to(module.base.dtype)).all()) for value in merged):
            raise MergeError(
                f"{module._site_name}: the weight merged with {', '.join(map(repr, names))} would not be "
                "finite. "
                "The adapter seems to be broken; nothing was merged."
            )


# Quantised layers that become dense


def dtype_of(base: nn.Module) -> torch.dtype:
    """The dtype of the base's own weights that are not quantised; fp32 where it has none."""
    own = (module for _, module in outer_modules(base) if not isinstance(module, AdapterModule))
    return next((dtype for module in own for dtype in _floats(module)), torch.float32)


def _floats(module: nn.Module) -> Iterator[torch.dtype]:
    if not is_quantised(module):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                yield parameter.dtype


def _merge_dense(module: Adapted, dW: Tensor, db: Tensor | None, dtype: torch.dtype, keep: bool) -> None:
    quantised = module.base
    assert isinstance(quantised, QuantisedLayer)
    turn_back = quantised.make_dense(dtype, dW)
    module.base = door(quantised.layer, quantised.site.name)
    if keep:
        module.__dict__[_QUANTISED] = (quantised, turn_back)
    if db is not None:
        module.base.add_bias_(db)


def _dequantise(base: Any) -> None:
    """Makes an ordinary model of a base without wrappers."""
    layers_changed(base)
    dtype = dtype_of(base)
    for name, layer in list(base.named_modules()):
        if is_quantised(layer):
            opened = door(layer, name)
            assert isinstance(opened, QuantisedLayer)
            opened.make_dense(dtype)
    layers_changed(base)
    for key in ("hf_quantizer", "quantization_method"):
        if key in vars(base):
            delattr(base, key)
    for flag in ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        if getattr(base, flag, False):
            setattr(base, flag, False)
    if hasattr(getattr(base, "config", None), "quantization_config"):
        del base.config.quantization_config


# Weights and biases that two layers share


def _users(base: nn.Module) -> dict[int, int]:
    """Parameter's id -> how many places of the base's layers use it."""
    counts: dict[int, int] = {}
    for _, module in outer_modules(base):
        if not isinstance(module, AdapterModule):
            for parameter in module._parameters.values():
                if parameter is not None:
                    counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _keys(module: Adapted) -> tuple[str, str]:
    """Of the weight and the bias."""
    return module.base.key, module.base.bias_key


def _is_tied(module: Adapted, key: str, users: dict[int, int]) -> bool:
    return users.get(id(module.base.layer._parameters.get(key)), 0) > 1


def _untie(module: Adapted, key: str, users: dict[int, int], names: Sequence[str]) -> None:
    """Gives a layer that shares its weight, or its bias, one of its own, so that a merge leaves the other layer as it
    is."""
    if _is_tied(module, key, users):
        layer = module.base.layer
        shared: Any = layer._parameters[key]
        # Whose tensors change it: layers that they change alike are tied again when the wrappers go.
        sources = [(name, id(module._lenders.get(name, module))) for name in names if name in module.methods]
        layer.__dict__.setdefault(_TIED, {})[key] = (shared, sources)
        own = (
            nn.Parameter(whole(shared), requires_grad=False)
            if is_partitioned(shared)
            else copy.deepcopy(shared)
        )
        partition_like(own, shared)
        setattr(layer, key, own.requires_grad_(False))


def _retie(module: Adapted) -> None:
    for key, (shared, _) in module.base.layer.__dict__.pop(_TIED, {}).items():
        setattr(module.base.layer, key, shared)
        # The shared one was never changed; what was kept of the copy must not be written into it.
        module.__dict__[_KEPT].pop(key)


def _stay_untied(base: nn.Module) -> bool:
    """Ties again all layers of one parameter that a merge has changed alike; whether others stay apart."""
    groups: dict[int, list[tuple[nn.Module, str, Any, Any]]] = {}
    for module in base.modules():
        for key, (shared, sources) in module.__dict__.pop(_TIED, {}).items():
            groups.setdefault(id(shared), []).append((module, key, shared, sources))
    users, apart = _users(base), False
    for layers in groups.values():
        (first, key, shared, sources), *others = layers
        if users.get(id(shared), 0) or sources is None or any(other[3] != sources for other in others):
            apart = True
            continue
        for layer, own_key, *_ in others:
            setattr(layer, own_key, getattr(first, key))
    return apart


def _say_untied(base: nn.Module) -> None:
    config: Any = getattr(base, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def _keep(module: Adapted, old: Tensor | None) -> None:
    """Keeps what is stored, of the weight `old` where that is given."""
    base = module.base
    if old is None:
        module.__dict__[_KEPT] = base.stored()
        return
    bias = base.layer._parameters.get(base.bias_key)
    kept = {} if bias is None else {base.bias_key: stored_bits(bias)}
    module.__dict__[_KEPT] = {base.key: old, **kept}


def _own(dW: Tensor, module: Adapted, names: Sequence[str]) -> Tensor:
    """dW in memory of its own: a method may give a view of one of its tensors."""
    held = [t for name in names if name in module.methods for t in module.held(name).values()]
    others = [t for t in [*held, *module.base.layer.parameters()] if not is_partitioned(t)]
    taken = {t.untyped_storage().data_ptr() for t in others}
    is_whole = dW.untyped_storage().nbytes() == dW.nbytes
    return dW if is_whole and dW.untyped_storage().data_ptr() not in taken else dW.clone()


def _apart(base: nn.Module, replaced: Sequence[Replaced], names: Sequence[str]) -> set[int]:
    """Ids of the Parameters of modules trained whole that other layers share and do not replace alike."""
    users, sources = _users(base), dict[int, list[int]]()
    for module in replaced:
        name = next((name for name in reversed(names) if name in module.methods), None)
        if name is None:
            continue
        source = module._lenders.get(name, module).tensors(name)
        for key, parameter in module.original_module.named_parameters():
            if key in source:
                sources.setdefault(id(parameter), []).append(id(source[key]))
    apart = {key for key, used in sources.items() if users.get(key, 0) > len(used) or len(set(used)) > 1}
    for module in replaced:
        for parameter in module.original_module.parameters():
            if id(parameter) in apart and is_partitioned(parameter):
                raise MergeError(
                    f"{module._site_name}: its weight is tied to another layer's and partitioned by ZeRO-3; taking it "
                    "over would change both layers. Unload on an unpartitioned base, or set ensure_weight_tying."
                )
    return apart


def _take_over(module: Replaced, names: Sequence[str], apart: set[int]) -> None:
    chosen = [name for name in names if name in module.methods]
    if chosen:
        wanted = module.wanted(chosen[-1])
        for key, value in module.tensors(chosen[-1]).items():
            if not wanted[key].trainable:
                module.original_module.get_buffer(key).copy_(value)
                continue
            shared = module.original_module.get_parameter(key)
            if id(shared) in apart:
                above, _, last = key.rpartition(".")
                layer = module.original_module.get_submodule(above)
                layer.__dict__.setdefault(_TIED, {})[last] = (shared, None)
                setattr(layer, last, copy.deepcopy(shared).requires_grad_(False))
            set_whole(module.original_module.get_parameter(key), whole(value))
