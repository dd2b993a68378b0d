"""PeftMixedModel: adapters of several methods on one base, active together, in the order they were set."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_dist.config import PeftConfig
from peft_dist.errors import ConfigError
from peft_dist.model import MIXED, TASK_CLASSES, PeftModel


class PeftMixedModel(PeftModel):
    """As `PeftModel`, where every adapter sits on layers."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig | None, *args: Any, **kwargs: Any) -> None:
        _refuse_prompts(peft_config)
        super().__init__(model, peft_config, *args, **kwargs)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        _refuse_prompts(peft_config)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)


def _refuse_prompts(config: PeftConfig | None) -> None:
    if config is not None and config.is_prompt_learning:
        raise ConfigError(
            f"{type(config).__name__}: a prompt method sits on no layer, so it cannot be mixed."
        )


TASK_CLASSES[MIXED] = PeftMixedModel
