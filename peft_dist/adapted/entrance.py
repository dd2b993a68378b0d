"""How x enters an adapter's branch of a layer, and leaves a layer behind adapters of another dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_dist.base_layer import Layer
from peft_dist.contract import Params, SiteMethod
from peft_dist.rows import drop, drop_in_bins


class Entrance:
    """How x enters an adapter's branch of a module: in the adapter's dtype, dropped out while training."""

    def __init__(self, module: Any, samples: Tensor | None = None, adapter: str | None = None) -> None:
        self.module, self.samples, self.adapter = module, samples, adapter

    def drops(self, method: SiteMethod) -> bool:
        return self.module.training and method.dropout > 0

    def of(self, method: SiteMethod, p: Params) -> Callable[[Tensor], Tensor]:
        dtype = dtype_of(p)
        casts = self.module.casts

        def enter(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            x = x.to(dtype) if casts else x
            if not self.drops(method):
                return x
            if self.samples is None:
                return F.dropout(x, method.dropout)
            rows = self.module._current.rows
            assert rows is not None
            key = rows.stream_of(self.adapter, self.module._site_name)
            padding = self.module._current.padding_of(self.samples, self.adapter)
            if rows.bins is None:
                return drop(x, method.dropout, self.samples, key, padding)
            if x.ndim == 3 and tuple(x.shape[:2]) == rows.bins.shape:
                return drop_in_bins(x, method.dropout, self.samples, key, rows.bins)
            split = rows.of(self.module.base.site, x, None)
            return split.restored(drop(split.x, method.dropout, self.samples, key, padding))

        return enter


def unchanged(x: Tensor) -> Tensor:
    """x as the branch of an adapter of its dtype takes it where nothing is dropped."""
    return x


def dtype_of(p: Params, x: Tensor | None = None) -> torch.dtype:
    """The dtype that an adapter computes in."""
    for t in p.values():
        if t.is_floating_point():
            return t.dtype
    return torch.float32 if x is None else x.dtype


class Framed:
    """A layer behind adapters of another dtype: takes what it is given in its own, and remembers what it
    gives."""

    def __init__(self, base: Layer, taken: torch.dtype) -> None:
        self._base, self._taken = base, taken
        self.given = taken

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._base, attribute)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._base(x.to(self._taken))
        self.given = y.dtype
        return y


def as_given(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)
