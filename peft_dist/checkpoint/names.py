"""The names of an adapter's tensors in a checkpoint.

A name follows from where the tensor hangs in the model and from what its method asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft_dist.contract import Method, PromptMethod, Site
from peft_dist.errors import AdapterError, suggest
from peft_dist.pooled import PooledModule, outer_modules
from peft_dist.tuner_layer import BaseTunerLayer, HookedTensors


@dataclass(frozen=True)
class Holder:
    """A module that holds tensors of an adapter.

    Args:
        path: its name in the model. layer: what its tensors' names in a checkpoint begin with.
        method: whose tensors they are.
    """

    module: PooledModule
    path: str
    layer: str
    method: Any
    adapter: str

    @property
    def saved(self) -> dict[str, str]:
        """Name in a checkpoint, relative to the layer -> the method's own name of the tensor."""
        return {
            param.key if param.saved is None else param.saved: name
            for name, param in self.module.wanted(self.adapter).items()
            if param.persistent
        }

    def hung(self, name: str) -> str:
        """The tensor's own name in the model."""
        first, _, rest = self.module.wanted(self.adapter)[name].key.partition(".")
        return join(self.path, first, self.adapter, rest)

    @property
    def site(self) -> Site:
        """Where the method sits."""
        base = getattr(self.module, "base", None)
        return base.site if base is not None else Site(self.path, 0, 0, "module")


def holders(model: nn.Module, adapter_name: str) -> list[Holder]:
    """The modules of `model` that hold tensors of the adapter, in the model's order."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    adds_tokens = isinstance(config, PromptMethod)
    found: list[Holder] = []
    unchanged: list[str] = []
    for path, module in outer_modules(model):
        if not isinstance(module, PooledModule) and isinstance(module, BaseTunerLayer):
            tensors: Any = HookedTensors(module)
            if adapter_name in tensors.adapters:
                found.append(Holder(tensors, path, path, None, adapter_name))
            continue
        if not isinstance(module, PooledModule) or adapter_name not in module.adapters:
            continue
        # A wrapper inside another counts as the layer it adapts.
        layer = path.replace(".original_module", "")
        # One that changes nothing is there for the sake of those inside it: HF PEFT has none.
        for outer in (each for each in unchanged if layer.startswith(f"{each}.base_layer.")):
            layer = outer + layer.removeprefix(f"{outer}.base_layer")
        if not module.wanted(adapter_name):
            unchanged.append(layer)
        if adds_tokens:
            # HF PEFT wraps no layer of such a model, so its base hangs one part higher.
            layer = layer.replace("base_model.model", "base_model", 1)
        method = getattr(module, "methods", {}).get(adapter_name, config)
        found.append(Holder(module, path, layer, method, adapter_name))
    return found


def adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's own tensors in `model`, by their names in a checkpoint, the method's saved form aside."""
    return {
        join(holder.layer, saved): holder.module.tensors(adapter_name)[name]
        for holder in holders(model, adapter_name)
        for saved, name in holder.saved.items()
    }


def join(*parts: str) -> str:
    """The name whose parts these are; empty ones are left out."""
    return ".".join(part for part in parts if part)


def defines(method: Any, function: str) -> bool:
    """Whether a method has that function of the contract itself."""
    return isinstance(method, Method) and getattr(type(method), function) is not getattr(Method, function)


def known_adapter(model: nn.Module, adapter_name: str) -> None:
    """Raises AdapterError for an adapter that the model does not have."""
    known = _names(model)
    if adapter_name not in known:
        raise AdapterError(
            f"there is no adapter {adapter_name!r}; there are: {', '.join(known) or 'none'}."
            f"{suggest(adapter_name, known)}"
        )


def _names(model: Any) -> list[str]:
    """The adapters of a PeftModel, or of a base into which adapters were injected."""
    if hasattr(model, "peft_config"):
        return list(model.peft_config)
    modules = (module for _, module in outer_modules(model) if isinstance(module, PooledModule))
    return list(dict.fromkeys(name for module in modules for name in module.adapters))
