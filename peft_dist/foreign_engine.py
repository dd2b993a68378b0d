"""A DeepSpeed engine that a user has built around a model."""

from __future__ import annotations

import sys
from typing import Any

from peft_dist.errors import ShardingError
from peft_dist.sharding import is_partitioned_base


def refuse_foreign_engine(model: Any, wish: str) -> None:
    """Raises if a user's own DeepSpeed engine trains parameters of this model: it would not train any more.

    Raises:
        ShardingError: such an engine is there; `wish` says what it cannot do.
    """
    # Such an engine cannot be where its library was never imported.
    if "deepspeed" not in sys.modules:
        return
    trained = (
        repr(name)
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")
    )
    what = next(trained, "the parameters" if _was_built_around(model) else None)
    if what is not None:
        raise ShardingError(
            f"{wish}: a DeepSpeed engine trains {what} of this model, and an engine's parameters are fixed when it is "
            "built. Do this before deepspeed.initialize, or train with peft_dist.optim.AdapterOptimizer, which takes "
            "adapters at any time."
        )


def _was_built_around(model: Any) -> bool:
    """Whether an engine other than our own partition was, of whatever stage: at 0 no parameter tells."""
    if is_partitioned_base(model):
        return False
    around = (model, model.base_model, model.get_base_model())
    hooks = (hook for module in around for hook in module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") == "deepspeed.runtime.engine" for hook in hooks)
