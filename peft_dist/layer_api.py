"""What programs read of a layer with adapters and do with it alone, by HF PEFT's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_dist.lazy import lazy

torch = lazy("torch")
merging = lazy("peft_dist.merge")
tuner_layer = lazy("peft_dist.tuner_layer")


class LayerApi:
    """The face of a wrapped layer. `adapter -> value` where HF PEFT has it so."""

    methods: dict[str, Any]
    active_adapters: list[str]
    merged_adapters: list[str]
    disabled: bool
    base_layer: Any
    _holders: set[str]

    def _get_name(self) -> str:
        """Under which a printed model has this layer, as HF PEFT calls it: `lora.Linear`."""
        return tuner_layer.layer_title(self)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The attributes that hold adapters' tensors, also those that have none here."""
        told = self._facts("adapter_layer_names").values()
        return tuple(dict.fromkeys([*(name for names in told for name in names), *sorted(self._holders)]))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The attributes that are dictionaries, adapter -> a setting."""
        told = (method.facts(self.base.site) for method in self.methods.values())  # type: ignore[attr-defined]
        return tuple(dict.fromkeys(name for facts in told for name in facts if name != "adapter_layer_names"))

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the layer stores its weight as (in, out)."""
        return type(self.get_base_layer()).__name__ == "Conv1D"

    @property
    def _disable_adapters(self) -> bool:
        return self.disabled

    @property
    def _active_adapter(self) -> list[str]:
        return list(self.active_adapters)

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

    def _alone(self) -> Any:
        return torch.nn.ModuleDict({"layer": self})

    def _facts(self, attribute: str) -> dict[str, Any]:
        """adapter -> what its method says of itself here."""
        site = self.base.site  # type: ignore[attr-defined]
        told = {name: method.facts(site) for name, method in self.methods.items()}
        return {name: facts[attribute] for name, facts in told.items() if attribute in facts}
