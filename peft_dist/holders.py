"""Where the tensors of adapters hang on a layer, by the names that checkpoints give them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_dist.contract import Param
from peft_dist.errors import AdapterError


class Tensors(nn.Module):
    """A leaf that holds what hangs below an adapter's name: `lora_A.NAME` with its `.weight`.

    Where that is a matrix, programs take it for the linear layer that HF PEFT has there.
    """

    @property
    def out_features(self) -> int:
        """The rows of its matrix."""
        return self._matrix("out_features").shape[0]

    @property
    def in_features(self) -> int:
        """The columns of its matrix."""
        return self._matrix("in_features").shape[1]

    def _matrix(self, wanted: str) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            raise AttributeError(f"{self.extra_repr()} is no matrix, so it has no {wanted}")
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) by its matrix, and its bias: (..., out)."""
        return nn.functional.linear(x, self._matrix("forward"), self._parameters.get("bias"))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}{tuple(p.shape)}" for name, p in self._parameters.items() if p is not None)


class Held(nn.ModuleDict):
    """What hangs below one name of a layer: adapter -> its tensors. Modules of a program's own would not be called."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        raise AdapterError(
            f"{key!r}: an adapter's tensors cannot be replaced by a module. Copy values into its weight, or set "
            "the weight."
        )

    def _get_name(self) -> str:
        return "ModuleDict"


class HeldTensors(nn.ParameterDict):
    """What hangs below one name of a layer: adapter -> its tensor, a buffer where it is not trained."""

    def __setitem__(self, key: str, value: Any) -> None:
        held = self._buffers.get(key)
        if held is None or isinstance(value, nn.Parameter):
            super().__setitem__(key, value)
        elif value is not held:
            # `+=` puts the very tensor back.
            self._buffers[key] = value.to(held)

    def _get_name(self) -> str:
        return "ParameterDict"


class Place(NamedTuple):
    """Where a tensor hangs: a module, the name of its table, and the key there.

    The table is looked up each time, and read as a plain dict: DeepSpeed puts one of its own in its place, which takes
    a tensor in pieces for a weight of the layer that runs when it is read.
    """

    holder: nn.Module
    table: str
    key: str

    @property
    def tensor(self) -> Any:
        """The Parameter or buffer."""
        return dict.__getitem__(getattr(self.holder, self.table), self.key)

    def put(self, tensor: Tensor) -> None:
        """Hangs another there."""
        getattr(self.holder, self.table)[self.key] = tensor


def room(param: Param, dtype: torch.dtype, device: Any) -> Tensor:
    """An unfilled tensor, in `dtype` unless it is an index: a Parameter where it is trained or counted."""
    made = torch.empty(param.shape, dtype=torch.int64 if param.is_index else dtype, device=device)
    is_parameter = param.trainable or param.counted
    return nn.Parameter(made, param.trainable) if is_parameter else made


def hang(module: nn.Module, param: Param, adapter: str, tensor: Tensor) -> Place:
    """Hangs `tensor` on `module` under the key of `param`, the adapter's name after its first part."""
    first, _, rest = param.key.partition(".")
    if first not in module._modules:
        # Past `add_module`, which takes what hangs on a wrapper inside this one for this one's.
        module._modules[first] = Held() if rest else HeldTensors()
    # Into the dictionaries themselves: an adapter may be called `v1.2` or `keys`, which their doors refuse.
    node: Any = module._modules[first]
    last = adapter
    if rest:
        if adapter not in node._modules:
            node._modules[adapter] = Tensors()
        node = node._modules[adapter]
        *between, last = rest.split(".")
        for part in between:
            if part not in node._modules:
                node.add_module(part, Tensors())
            node = node._modules[part]
    elif isinstance(node, nn.ParameterDict):  # not where another method has modules under this name
        node._keys[adapter] = None
    if not isinstance(tensor, nn.Parameter) and not param.persistent:
        node._non_persistent_buffers_set.add(last)
    place = Place(node, "_parameters" if isinstance(tensor, nn.Parameter) else "_buffers", last)
    place.put(tensor)
    if isinstance(node, Tensors) and last == "weight":
        # A linear layer without a bias says None.
        node._parameters.setdefault("bias", None)
    return place
