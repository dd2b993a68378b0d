"""Modules trained whole beside an adapter: each adapter has a copy of the module's tensors, started at the
base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_dist import starts
from peft_dist.contract import BaseLayer, Param, Params, ReplaceMethod, Site


@dataclass(frozen=True)
class ModulesToSave(ReplaceMethod):
    """One copy of every tensor of the module."""

    prefix: ClassVar[str] = "modules_to_save"

    def params(self, site: Site) -> dict[str, Param]:
        return {
            name: Param(
                f"modules_to_save.{name}",
                tuple(f"{name}_{axis}" for axis in range(len(shape))),
                shape,
                starts.inherit,
                saved=name,
            )
            for name, shape in site.tensors
        }

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        for name, tensor in p.items():
            tensor.copy_(base.tensor(name))
