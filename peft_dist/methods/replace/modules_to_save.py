"""Modules trained whole beside an adapter: each adapter has a copy of the module's tensors, started at the
base's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from peft_dist import starts
from peft_dist.contract import BaseLayer, Param, Params, ReplaceMethod, Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModulesToSave(ReplaceMethod):
    """One copy of every tensor of the module.

    Args:
        buffers: (name, shape, whether it counts in int64) of what the module keeps beside its parameters, such as the
            running means of a batch norm: not trained, but each adapter's own, and saved with it.
    """

    prefix: ClassVar[str] = "modules_to_save"
    is_beside: ClassVar[bool] = True
    buffers: tuple[tuple[str, tuple[int, ...], bool], ...] = ()

    def params(self, site: Site) -> dict[str, Param]:
        trained = {name: _copy(name, shape) for name, shape in site.tensors}
        kept = {
            name: replace(_copy(name, shape), trainable=False, is_index=i) for name, shape, i in self.buffers
        }
        return {**trained, **kept}

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        for name, tensor in p.items():
            tensor.copy_(base.tensor(name))


def _copy(name: str, shape: tuple[int, ...]) -> Param:
    dims = tuple(f"{name}_{axis}" for axis in range(len(shape)))
    return Param(f"modules_to_save.{name}", dims, shape, starts.inherit, saved=name)


@dataclass(frozen=True)
class SameModule(ReplaceMethod):
    """On a module that shares the weight of one that is trained whole: the same copy."""

    prefix: ClassVar[str] = ""
    is_beside: ClassVar[bool] = True

    def params(self, site: Site) -> dict[str, Param]:
        return {}

    def export(self, p: Params, site: Site) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in p.items()}

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        # Saved here too, as HF PEFT does; read where it is the other's.
        return {}
