"""A DeepSpeed engine that a user has built around a model."""

from __future__ import annotations

import sys
from typing import Any

from peft_dist.sharding import is_partitioned_base


def has_foreign_engine(model: Any) -> bool:
    """Whether an engine other than our own partition was built around this model, of whatever stage."""
    # Such an engine cannot be where its library was never imported.
    if "deepspeed" not in sys.modules or is_partitioned_base(model):
        return False
    around = (model, model.base_model, model.get_base_model())
    hooks = (hook for module in around for hook in module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") == "deepspeed.runtime.engine" for hook in hooks)
