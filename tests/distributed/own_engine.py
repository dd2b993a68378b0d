"""A DeepSpeed engine of the user's own around a model, with an optimizer of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed

# Every engine asks for it, and it takes seconds to import: once, before any fork.
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
from torch import nn


def config_of(zero: Mapping[str, Any], micro_batch_size: int) -> dict[str, Any]:
    """What the engine is built with; `zero` is its section of that name."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_clipping": 0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": dict(zero),
    }


def own_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, zero: Mapping[str, Any], micro_batch_size: int
) -> Any:
    """`deepspeed.initialize` over the model's trainable tensors."""
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        optimizer=optimizer,
        config=config_of(zero, micro_batch_size),
    )
    return engine
