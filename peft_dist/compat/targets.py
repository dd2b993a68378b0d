"""HF PEFT's tables of usual targets, by the names of methods."""

from __future__ import annotations

from typing import Any

from peft_dist.catalog import PeftType
from peft_dist.targets import DEFAULT_FEEDFORWARD, usual_targets

TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = DEFAULT_FEEDFORWARD


def __getattr__(name: str) -> Any:
    if name in PeftType.__members__:
        return usual_targets(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
