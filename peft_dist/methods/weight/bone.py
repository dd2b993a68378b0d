"""Bone: MiSS under the name that HF PEFT gave it before it was renamed; loads the checkpoints of that time.

Kang 2024, arXiv:2409.15371. HF PEFT has it no longer; its tensors are MiSS's with another prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_dist.config import TargetedConfig
from peft_dist.errors import ConfigError
from peft_dist.methods.weight.miss import ShardSharing


@dataclass
class BoneConfig(TargetedConfig, ShardSharing):
    """HF PEFT's BoneConfig, as versions 0.14 to 0.18 had it.

    Args:
        r: rows of D, from 1 to in; with `bat` it divides in and out.
        init_weights: True: D starts at 0, which changes nothing; False: at random; "bat": W is changed by
            products with itself.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
        bias: which biases are trained too: none, all, or those of the targets (bone_only).
    """

    r: int = 64
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    prefix: ClassVar[str] = "bone_"
    own_biases: ClassVar[str] = "bone_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BONE"
        self.miss_dropout, self.mini_r = 0.0, 1
        self.check_layers(alone=False)
        self.check_bias()
        if self.init_weights not in (True, False, "bat"):
            raise ConfigError(
                f"BoneConfig.init_weights: {self.init_weights!r} is not one of True, False, 'bat'."
            )
