"""What programs read of a layer with adapters and do with it alone, by HF PEFT's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_dist.lazy import lazy

torch = lazy("torch")
merging = lazy("peft_dist.merge")
tuner_layer = lazy("peft_dist.tuner_layer")
settings = lazy("peft_dist.scaling")


class Scaling(dict[str, Any]):
    """Adapter -> its scaling at a layer; another value that is put in is the one that serves from then on."""

    def __init__(self, layer: LayerApi, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._layer = layer

    def __setitem__(self, adapter: str, value: Any) -> None:
        self._layer.take_scaling(adapter, float(value))
        super().__setitem__(adapter, value)


class LayerApi:
    """The face of a wrapped layer. `adapter -> value` where HF PEFT has it so."""

    methods: dict[str, Any]
    active_adapters: Any
    merged_adapters: list[str]
    disabled: bool
    base_layer: Any
    _holders: set[str]
    _wanted: dict[str, dict[str, Any]]

    def _get_name(self) -> str:
        """Under which a printed model has this layer, as HF PEFT calls it: `lora.Linear`."""
        return tuner_layer.layer_title(self)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The attributes that hold what adapters train, also those that have nothing here."""
        told = self._facts("adapter_layer_names").values()
        held = sorted(self._holders - self._frozen())
        return tuple(dict.fromkeys([*(name for names in told for name in names), *held]))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The attributes that are dictionaries, adapter -> a setting, or a tensor that is not trained."""
        told = (method.facts(self.base.site) for method in self.methods.values())  # type: ignore[attr-defined]
        named = (name for facts in told for name in facts if name != "adapter_layer_names")
        return tuple(dict.fromkeys([*named, *sorted(self._frozen())]))

    def _frozen(self) -> set[str]:
        wanted = [param for each in self._wanted.values() for param in each.values()]
        return self._holders - {param.key.partition(".")[0] for param in wanted if param.trainable}

    def _features(self) -> tuple[int | None, int | None]:
        """What goes into the layer underneath and comes out of it: channels, or tokens and their width."""
        layer, site = self.get_base_layer(), self.base.site  # type: ignore[attr-defined]
        if site.kind in ("mha", "experts"):
            return site.in_, site.out
        pairs = (("in_channels", "out_channels"), ("num_embeddings", "embedding_dim"), ("nx", "nf"))
        return next(
            (
                (getattr(layer, a), getattr(layer, b))
                for a, b in pairs
                if hasattr(layer, a) and hasattr(layer, b)
            ),
            (None, None),
        )

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the layer stores its weight as (in, out)."""
        return type(self.get_base_layer()).__name__ == "Conv1D"

    @property
    def _disable_adapters(self) -> bool:
        return self.disabled

    @_disable_adapters.setter
    def _disable_adapters(self, disabled: bool) -> None:
        self.disabled = disabled

    @property
    def _active_adapter(self) -> list[str]:
        return list(self.active_adapters)

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        self.active_adapters = [names] if isinstance(names, str) else list(names)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Makes an adapter's scaling here `scale` times what its config says; nothing where it is not here."""
        if adapter in self.methods:
            self.take_scaling(adapter, scale * self._as_configured(adapter)["scaling"])

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scaling of the active adapters here."""
        told = self._facts("scaling")
        for adapter in self.active_adapters:
            if adapter in told and scale != 1:
                told[adapter] = told[adapter] * scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scaling of the active adapters here; without `scale` it is what their configs say again."""
        told = self._facts("scaling")
        for adapter in self.active_adapters:
            if adapter in told:
                before = self._as_configured(adapter)["scaling"]
                told[adapter] = before if scale is None else told[adapter] / scale

    def take_scaling(self, adapter: str, value: float) -> None:
        """Lets an adapter serve here with another scaling; its config, and what is saved, stay.

        Raises:
            AdapterError: its method has none that can be set so.
        """
        site = self.base.site  # type: ignore[attr-defined]
        self._take(adapter, settings.with_scaling(self.methods[adapter], site, value))

    def take_dropout(self, adapter: str, p: float) -> None:
        """Lets an adapter be trained here with another dropout; its config stays."""
        self._take(adapter, settings.with_dropout(self.methods[adapter], self.base.site, p))  # type: ignore[attr-defined]

    def _take(self, adapter: str, method: Any) -> None:
        before = self._as_configured(adapter)
        self.methods = {**self.methods, adapter: method}
        self.__dict__.setdefault("_set_here", {})[adapter] = (before, method)
        self._pool.changed(self._site_name, adapter)  # type: ignore[attr-defined]

    def _as_configured(self, adapter: str) -> dict[str, Any]:
        """The facts of an adapter before a program set some of them here."""
        before, method = self.__dict__.get("_set_here", {}).get(adapter, (None, None))
        if before is not None and self.methods[adapter] is method:
            return before
        return self.methods[adapter].facts(self.base.site)  # type: ignore[attr-defined]

    @property
    def token_adapter(self) -> Any:
        """The layer itself where tokens are trained beside an adapter, as programs reach their vectors:
        `token_adapter.trainable_tokens_delta[adapter]`, `token_adapter.token_indices[adapter]`."""
        if any(getattr(method, "prefix", None) == "token_adapter." for method in self.methods.values()):
            return self
        raise AttributeError("token_adapter")

    def get_base_layer(self) -> Any:
        """The layer underneath all wrappers."""
        layer: Any = self
        while isinstance(layer, LayerApi):
            layer = layer.base_layer
        return layer

    @property
    def active_adapter(self) -> list[str]:
        """The active adapters."""
        return list(self.active_adapters)

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the bare base serves."""
        return self.disabled

    def enable_adapters(self, enabled: bool) -> None:
        """Lets the adapters serve, or the bare base."""
        self.disabled = not enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes adapters active here; they alone are trained here, and none in `inference_mode`."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.active_adapters = names
        for adapter in self.methods:
            self.set_requires_grad(adapter, adapter in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Lets adapters be trained here, or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for adapter in names:
            self.let_train(adapter, requires_grad)  # type: ignore[attr-defined]

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Adds the named adapters' change to this layer's weight; the active ones' where none is named."""
        names = [name for name in adapter_names or self.active_adapters if name in self.methods]
        if names:
            merging.merge(self._alone(), names, safe_merge)

    def unmerge(self) -> None:
        """Takes it out again."""
        merging.unmerge(self._alone())

    def get_delta_weight(self, adapter: str) -> Any:
        """dW of an adapter, in the shape in which the layer stores its weight."""
        change, _ = self.change([adapter])  # type: ignore[attr-defined]
        return self.base._as_stored(change)  # type: ignore[attr-defined]

    def _get_available_adapters(self) -> set[str]:
        return set(self.methods)

    def _all_available_adapter_names(self) -> list[str]:
        return list(self.methods)

    @property
    def _adapters(self) -> set[str]:
        return set(self.methods)

    def _alone(self) -> Any:
        return torch.nn.ModuleDict({"layer": self})

    def _facts(self, attribute: str) -> dict[str, Any]:
        """adapter -> what its method says of itself here."""
        site = self.base.site  # type: ignore[attr-defined]
        is_set = attribute in ("scaling", "lora_dropout")
        told = {
            name: method.facts(site) if is_set else self._as_configured(name)
            for name, method in self.methods.items()
        }
        found = {name: facts[attribute] for name, facts in told.items() if attribute in facts}
        if attribute == "lora_dropout":
            for name, each in found.items():
                if hasattr(each, "p") or name in self.__dict__.get("_set_here", {}):
                    found[name] = settings.LayersDropout(self, name, getattr(each, "p", 0.0))
        return Scaling(self, found) if attribute == "scaling" and found else found
