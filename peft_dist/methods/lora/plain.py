"""A LoRA that starts from the base's own directions, as a plain LoRA of twice the rank on the same base:
s (B A - B0 A0) = s [B, -B0] [A; A0]."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")

_START = "lora_start_"


def as_plain(
    config: Any, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """(config, tensors) of the plain LoRA, by their names in a checkpoint.

    Args:
        tensors: of the adapter. initial: of the adapter as it started; the start factors among `tensors` where
            None.

    Raises:
        ConfigError: it is no LoRA, or nothing says how it started.
    """
    if config.peft_type != "LORA":
        raise ConfigError(
            f"path_initial_model_for_weight_conversion: converts adapters of LORA, not of {config.peft_type}. "
            "Leave it out."
        )
    made = {}
    for key, tensor in tensors.items():
        if _START in key:
            continue
        for factor, axis, sign in (("lora_A", 0, 1), ("lora_B", 1, -1)):
            if key.endswith(f"{factor}.weight"):
                tensor = torch.cat([tensor, sign * _start_of(key, factor, tensors, initial).to(tensor)], axis)
        for factor, axis in (("lora_embedding_A", 0), ("lora_embedding_B", 1)):
            if key.endswith(factor):
                # It started as usual, so its start adds nothing; its rank doubles with the others'.
                tensor = torch.cat([tensor, torch.zeros_like(tensor)], axis)
        made[key] = tensor
    plain = copy.copy(config)
    plain.init_lora_weights = True
    plain.r = 2 * config.r
    wider = 2**0.5 if config.use_rslora else 2
    plain.lora_alpha = config.lora_alpha * wider
    plain.rank_pattern = {key: 2 * r for key, r in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: alpha * wider for key, alpha in (config.alpha_pattern or {}).items()}
    plain.eva_config = plain.corda_config = None
    return plain, made


def _start_of(
    key: str, factor: str, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor] | None
) -> Tensor:
    if initial is not None:
        if key not in initial or initial[key].shape != tensors[key].shape:
            raise ConfigError(
                f"path_initial_model_for_weight_conversion: the adapter there has no {key!r} of shape "
                f"{tuple(tensors[key].shape)}. Name the one that this training started from."
            )
        return initial[key]
    start = key.replace(f"{factor}.weight", f"{_START}{factor[-1]}")
    if start not in tensors:
        raise ConfigError(
            f"init_lora_weights: {key!r} has no start that could be taken out of it; the adapter is a plain LoRA "
            "already."
        )
    return tensors[start]
