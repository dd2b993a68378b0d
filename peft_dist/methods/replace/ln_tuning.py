"""LN tuning: the norms' own weights and biases are trained, one copy for each adapter.

Zhao et al. 2023, arXiv:2312.11420. Any module with parameters may be a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Param, Params, ReplaceMethod, Site
from peft_dist.errors import TargetError


@dataclass
class LNTuningConfig(TargetedConfig, ReplaceMethod):
    """HF PEFT's LNTuningConfig; it has the common fields alone."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    prefix: ClassVar[str] = "ln_tuning_"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LN_TUNING"

    def params(self, site: Site) -> dict[str, Param]:
        if not site.tensors:
            raise TargetError(
                f"targets: {site.name!r} has no parameters that LN_TUNING could train. Leave it out."
            )
        return {
            name: Param(
                f"ln_tuning_layers.{name}",
                tuple(f"{name}_{axis}" for axis in range(len(shape))),
                shape,
                starts.inherit,
            )
            for name, shape in site.tensors
        }

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        for name, tensor in p.items():
            tensor.copy_(base.tensor(name))
