"""What a layer with adapters is to programs: `BaseTunerLayer`, by HF PEFT's names.

A method of a user's own that is written with HF PEFT's hooks makes its layers subclasses of it. The layers of
this package are no subclasses: they answer `isinstance` for it, and for the classes that stand for a method and
a kind of layer.
"""

from __future__ import annotations

import warnings
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_dist.adapted import AdapterModule, bare
from peft_dist.catalog import class_name
from peft_dist.config import PeftConfig
from peft_dist.contract import Param
from peft_dist.packed import quantised_name
from peft_dist.pooled import outer_modules


class Answers(ABCMeta):
    """The class of classes that this package's layers are instances of without being made from them."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        # What a user derives from such a class stands for itself alone.
        stands_for = cls.__dict__.get("stands_for")
        return stands_for is not None and isinstance(instance, AdapterModule) and stands_for(instance)


def peft_types(module: AdapterModule) -> set[str]:
    """The methods whose adapters sit on a layer; copies of biases and modules trained whole are none."""
    return {found for method in module.methods.values() if (found := _type_of(method))}


def _type_of(method: Any) -> str | None:
    """Of a config, or of the variant of one that sits at a layer and holds it."""
    own = getattr(method, "peft_type", None)
    if own:
        return str(own)
    held = [value for value in vars(method).values() if isinstance(value, PeftConfig)]
    return str(held[0].peft_type) if held else None


class BaseTunerLayer(metaclass=Answers):
    """A layer with adapters.

    Attributes:
        adapter_layer_names: attributes that are dictionaries, adapter -> trained modules or parameters.
        other_param_names: attributes that are dictionaries, adapter -> something else.
        merged_adapters: names whose change is in the base's weights now.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    merged_adapters: list[str] = []  # noqa: RUF012
    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"

    stands_for = staticmethod(lambda module: bool(peft_types(module)))

    def get_base_layer(self) -> Any:
        """The layer underneath all wrappers."""
        layer: Any = self
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        return layer

    @property
    def weight(self) -> Tensor:
        """The base layer's own weight."""
        return self.get_base_layer().weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's own bias."""
        return self.get_base_layer().bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' change to the base's weight."""
        raise NotImplementedError(f"{type(self).__name__} defines no merge.")

    def unmerge(self) -> None:
        """Takes it out again."""
        raise NotImplementedError(f"{type(self).__name__} defines no unmerge.")

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the bare base serves."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or adapters."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters."""
        active = self.active_adapter
        return [active] if isinstance(active, str) else list(active)

    def adapter_parts(self) -> Iterator[tuple[str, str, Any]]:
        """(attribute, adapter, module or Parameter) of all that is trained here."""
        for attribute in self.adapter_layer_names:
            for name, part in getattr(self, attribute).items():
                yield attribute, name, part

    def _get_available_adapters(self) -> set[str]:
        return {name for _, name, _ in self.adapter_parts()}

    def _all_available_adapter_names(self) -> list[str]:
        held = [getattr(self, name) for name in (*self.adapter_layer_names, *self.other_param_names)]
        return sorted({name for each in held if hasattr(each, "keys") for name in each})

    def enable_adapters(self, enabled: bool) -> None:
        """Lets the adapters serve and be trained, or the bare base."""
        self._disable_adapters = not enabled
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            self.set_requires_grad(self._all_available_adapter_names(), False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters active; they alone are trained, and none in `inference_mode`."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for _, name, part in self.adapter_parts():
            part.requires_grad_(name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Lets adapters be trained, or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for _, name, part in self.adapter_parts():
            if name in names:
                part.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter from this layer; another becomes active where none is left so."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, attribute)
            if adapter_name in held:
                del held[adapter_name]
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name]
            left = left or self._all_available_adapter_names()[:1]
            self.set_adapter(left)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        weight = next(iter(self.get_base_layer().parameters()), None)
        device = device or (None if weight is None else weight.device)
        for attribute, name, part in list(self.adapter_parts()):
            tensors = part.parameters() if isinstance(part, nn.Module) else [part]
            if name == adapter_name and device is not None and not any(t.is_meta for t in tensors):
                getattr(self, attribute)[name] = part.to(device) if isinstance(part, nn.Module) else part
                if not isinstance(part, nn.Module):
                    part.data = part.data.to(device)

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def _check_forward_args(self, x: Any, *args: Any, **kwargs: Any) -> None:
        names = kwargs.get("adapter_names")
        if names is not None and self.merged:
            raise ValueError("adapter_names: adapters are merged. Unmerge to name adapters per row.")
        if names is not None and len(names) != len(x):
            raise ValueError(f"adapter_names: {len(names)} names for {len(x)} rows. Name one for each.")


# What HF PEFT calls the class of a layer, by the kind of layer underneath, where that is not the kind's own name.
_NAMES: dict[str, dict[str, str]] = {
    "ADALORA": {"Linear": "SVDLinear", "Conv2d": "SVDConv2d"},
    "C3A": {"Linear": "C3ALinear"},
    "DELORA": {"Linear": "DeloraLinear"},
    "FOURIERFT": {"Linear": "FourierFTLinear"},
    "HRA": {"Linear": "HRALinear", "Conv2d": "HRAConv2d"},
    "MISS": {"Linear": "MissLinear"},
    "BONE": {"Linear": "BoneLinear"},
    "WAVEFT": {"Linear": "WaveFTLinear"},
}
# Methods whose every layer is of one class.
_ONE_CLASS = {"LN_TUNING": "LNTuningLayer", "TRAINABLE_TOKENS": "TrainableTokensLayer"}
# Methods that have a class of their own for 8-bit and for 4-bit layers.
_OWN_QUANTISED = frozenset({"LORA", "ADALORA", "IA3", "ROAD", "RANDLORA"})
_KINDS = (
    "Linear",
    "Embedding",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "MultiheadAttention",
    "ParamWrapper",
    "Linear8bitLt",
    "Linear4bit",
)
_made: dict[tuple[str, str], Any] = {}


def layer_class(peft_type: str, name: str | None = None) -> Any:
    """The class that layers with adapters of a method are instances of: of any kind where no name is given, else
    of the kind that HF PEFT calls so.

    Raises:
        AttributeError: there is no class of this name.
    """
    title = f"{class_name(peft_type).removesuffix('Model')}Layer"
    name = name or title
    if (peft_type, name) not in _made:
        kinds = [kind for kind in _KINDS if _called(peft_type, kind) == name]
        if not kinds and name != title:
            raise AttributeError(f"{peft_type} has no layer class {name!r}")
        wanted = {peft_type, "ADALORA"} if peft_type == "LORA" and name == title else {peft_type}

        def stands_for(module: AdapterModule) -> bool:
            return bool(peft_types(module) & wanted) and (not kinds or _kind(module, peft_type) in kinds)

        bases: tuple[Any, ...] = (BaseTunerLayer,) if name == title else (layer_class(peft_type),)
        if peft_type == "ADALORA" and name == title:
            bases = (layer_class("LORA"),)
        _made[peft_type, name] = type(bases[0])(
            name, bases, {"stands_for": staticmethod(stands_for), "__module__": __name__}
        )
    return _made[peft_type, name]


def layer_title(module: Any) -> str:
    """What HF PEFT calls a layer: `lora.Linear`."""
    found = sorted(peft_types(module)) if isinstance(module, AdapterModule) else []
    if not isinstance(module, AdapterModule):
        return repr(module).partition("(")[0]
    if not found:
        return "ModulesToSaveWrapper"
    name = _called(found[0], _kind(module, found[0]))
    return name if found[0] in ("IA3", "TRAINABLE_TOKENS") else f"{found[0].lower()}.{name}"


def _called(peft_type: str, kind: str) -> str:
    return _ONE_CLASS.get(peft_type) or _NAMES.get(peft_type, {}).get(kind, kind)


def _kind(module: AdapterModule, peft_type: str) -> str:
    base: Any = getattr(module, "base", None)
    if base is not None and base.site.kind == "experts":
        return "ParamWrapper"
    layer = bare(module)
    if name := quantised_name(type(layer)):
        return name if peft_type in _OWN_QUANTISED else "Linear"
    return next((kind for kind in _KINDS[1:7] if isinstance(layer, getattr(nn, kind, ()))), "Linear")


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer with adapters, this package's and those of methods with hooks."""
    for name, module in outer_modules(model):
        if isinstance(module, BaseTunerLayer):
            yield name, module


def hooked_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the layers of methods with hooks alone."""
    for name, module in outer_modules(model):
        if not isinstance(module, AdapterModule) and isinstance(module, BaseTunerLayer):
            yield name, module


def merge_hooked(model: nn.Module, names: list[str] | None, safe_merge: bool) -> bool:
    """Merges adapters of methods with hooks; whether there is any such layer."""
    layers = [layer for _, layer in hooked_layers(model)]
    for layer in layers:
        layer.merge(safe_merge=safe_merge, adapter_names=names)
    return bool(layers)


def unmerge_hooked(model: nn.Module) -> bool:
    """Unmerges them; whether there is any such layer."""
    layers = [layer for _, layer in hooked_layers(model)]
    for layer in layers:
        if not layer.merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=3)
            continue
        layer.unmerge()
    return bool(layers)


class HookedTensors:
    """The tensors of a layer of a method with hooks, as a `PooledModule` gives those of its adapters."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that have tensors here."""
        return tuple(self._layer._all_available_adapter_names())

    def tensors(self, adapter: str) -> dict[str, Any]:
        """The adapter's tensors here, by their names without the adapter's."""
        layer, found = self._layer, {}
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            held = getattr(layer, attribute)
            part = held[adapter] if hasattr(held, "keys") and adapter in held else None
            if isinstance(part, Tensor):
                found[attribute] = part
            elif isinstance(part, nn.Module):
                found.update({f"{attribute}.{key}": t for key, t in part.state_dict(keep_vars=True).items()})
        return found

    def wanted(self, adapter: str) -> dict[str, Param]:
        """What is known of each of them."""
        return {
            key: Param(key, (), tuple(t.shape), nn.init.zeros_, trainable=isinstance(t, nn.Parameter))
            for key, t in self.tensors(adapter).items()
        }

    def part(self, adapter: str) -> None:
        """Nothing to do: no adapter's tensors are another's."""
        return None

    unite = part

    def shared(self, adapter: str) -> dict[str, Any]:
        """None: what layers share is the method's own affair."""
        return {}

    def materialise(self, adapter: str, device: Any) -> None:
        """Gives tensors that rest on meta real memory on the base layer's device, unfilled."""
        layer = self._layer
        weight = next((p for p in layer.get_base_layer().parameters() if not p.is_meta), None)
        where = device if weight is None else weight.device
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            held = getattr(layer, attribute)
            part = held[adapter] if hasattr(held, "keys") and adapter in held else None
            if isinstance(part, nn.Module) and any(t.is_meta for t in part.state_dict().values()):
                part.to_empty(device=where)
            elif isinstance(part, Tensor) and part.is_meta:
                room = torch.empty_like(part, device=where)
                is_trained = isinstance(part, nn.Parameter)
                held[adapter] = nn.Parameter(room, part.requires_grad) if is_trained else room
