"""An adapter whose start changes the base (LoftQ's), on a base that others are served from: what it would change of a
layer stands beside the layer, and serves its own rows alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peft_dist.base_layer import Layer
from peft_dist.contract import BaseLayer, Params, Site, WeightMethod
from peft_dist.errors import AdapterError


class OnOwnBase(WeightMethod):
    """A method at one layer, on the layer as its start would have made it: dW = D + what the method adds to W + D.

    Args:
        method: that changes its layer. change: D (out, in), in the layer's dtype. digest: of its contents.
    """

    def __init__(self, method: WeightMethod, change: Tensor, digest: bytes) -> None:
        self.method, self.change, self.digest = method, change, digest

    def __getattr__(self, name: str) -> Any:
        if name in ("method", "change", "digest") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.method, name)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the method."""
        return self.method.reads

    @property
    def dropout(self) -> float:
        return self.method.dropout

    def params(self, site: Site) -> dict[str, Any]:
        return self.method.params(site)

    def facts(self, site: Site) -> dict[str, Any]:
        return self.method.facts(site)

    def export(self, p: Params, site: Site) -> dict[str, Tensor] | None:
        return self.method.export(p, site)

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        return self.method.bias_delta(p, _Changed(base, self.change))

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        return self.change + self.method.delta(p, _Changed(base, self.change))

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        own = base.apply(self.change.to(x.dtype), x)
        return own + self.method.added(p, _Changed(base, self.change), x)


def plain(method: Any) -> Any:
    """The method itself, where it stands on a base of its own."""
    return method.method if isinstance(method, OnOwnBase) else method


def beside(method: Any, p: Params, layer: Layer, others: Iterable[Any]) -> Any:
    """The method as it serves while the layer stays as it is.

    Args:
        p: its tensors, filled. layer: that it would change. others: the methods there, so that those which would
            change the same have one tensor.

    Raises:
        AdapterError: it does more than to add to the layer's weight.
    """
    recorder: Any = _Recorder(layer)
    method.replace_base(p, recorder)
    if recorder.change is None:
        return method
    if not isinstance(method, WeightMethod):
        raise AdapterError(
            f"{layer.site.name}: {type(method).__name__} changes the layer and does not add to its weight, so it "
            "cannot stand beside other adapters. Put it on a base of its own."
        )
    dtype = layer.dtype if layer.dtype.is_floating_point and layer.dtype.itemsize > 1 else torch.float32
    change = recorder.change.to(dtype).contiguous()
    digest = hashlib.sha256(change.cpu().view(torch.uint8).numpy().data).digest()
    known = (other.change for other in others if isinstance(other, OnOwnBase) and other.digest == digest)
    return OnOwnBase(method, next(known, change), digest)


class _Recorder:
    """A layer that stays as it is: what is to be added to its weight is written down."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        # What marks a layer as changed marks nothing.
        self.layer = SimpleNamespace()
        self.change: Tensor | None = None

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._layer, attribute)

    def add_(self, dW: Tensor) -> None:
        self.change = dW if self.change is None else self.change + dW


class _Changed:
    """A layer with D in its weight; all else is the layer's own."""

    def __init__(self, base: BaseLayer, change: Tensor) -> None:
        self._base, self._change = base, change

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._base, attribute)

    def __call__(self, x: Tensor) -> Tensor:
        return self._base(x) + self._base.apply(self._change.to(x.dtype), x)

    def weight(self) -> Tensor:
        return self._base.plus(self._base.weight(), self._change)  # type: ignore[attr-defined]
