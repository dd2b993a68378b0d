"""A DeepSpeed engine that a user has built around a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from peft_dist.errors import ShardingError
from peft_dist.sharding import is_partitioned_base


def can_be() -> bool:
    """Whether there can be one: not where its library was never imported."""
    return "deepspeed" in sys.modules


def trained_by_engine(around: Sequence[nn.Module], tensors: Iterable[Tensor]) -> list[Parameter]:
    """Those of the tensors that a user's own engine trains, in their order.

    Args:
        around: what it may have been built around; asked at stage 0 alone, where no parameter tells.
    """
    if not can_be():
        return []
    trained = [t for t in tensors if isinstance(t, Parameter) and t.requires_grad]
    if found := [p for p in trained if _is_in_engine(p)]:
        return found
    among_ranks = dist.is_initialized() and dist.get_world_size() > 1
    return trained if among_ranks and _stands_in_engine(around) else []


def _is_in_engine(parameter: Any) -> bool:
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def refuse_foreign_engine(model: Any, wish: str) -> None:
    """Raises if a user's own DeepSpeed engine trains parameters of this model: it would not train any more.

    Raises:
        ShardingError: such an engine is there; `wish` says what it cannot do.
    """
    if not can_be():
        return
    trained = (repr(name) for name, parameter in model.named_parameters() if _is_in_engine(parameter))
    around = (model, model.base_model, model.get_base_model())
    what = next(trained, "the parameters" if _stands_in_engine(around) else None)
    if what is not None:
        raise ShardingError(
            f"{wish}: a DeepSpeed engine trains {what} of this model, and an engine's parameters are fixed when it is "
            "built. Do this before deepspeed.initialize, or train with peft_dist.optim.AdapterOptimizer, which takes "
            "adapters at any time."
        )


def _stands_in_engine(modules: Sequence[nn.Module]) -> bool:
    """Whether an engine other than our own partition was built around one of these, of whatever stage: at 0 no
    parameter tells."""
    if any(map(is_partitioned_base, modules)):
        return False
    hooks = (hook for module in modules for hook in module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") == "deepspeed.runtime.engine" for hook in hooks)
