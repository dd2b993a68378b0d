"""Starts of an adapter that look at the job's rows: EVA's and CorDA's directions of what the layers take in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import peft_dist
from peft_dist.calibration.corda import preprocess_corda
from peft_dist.calibration.eva import initialize_lora_eva_weights

from ..tasks import Batch

ROWS = 256
"""Training rows that are looked at, the first in their order: the same on every rank."""

Samples = Callable[[], Sequence[Batch]]
"""The rows as batches on the base's device; made only where a start asks for them."""


def prepare_base(base: nn.Module, config: Any, samples: Samples) -> None:
    """Before the adapter is added."""
    if getattr(config, "init_lora_weights", None) != "corda":
        return
    if config.corda_config is None:
        config.corda_config = peft_dist.CordaConfig()

    def run() -> None:
        with torch.no_grad():
            for batch in samples():
                base(**batch.inputs)

    preprocess_corda(base, config, run)


def start_adapter(model: nn.Module, config: Any, samples: Samples, adapter: str) -> None:
    """Once the adapter is there and the active one, before it is trained."""
    if getattr(config, "init_lora_weights", None) != "eva":
        return
    batches = [batch.inputs for batch in samples()]
    initialize_lora_eva_weights(
        model, batches, adapter_name=adapter, gather_distributed_inputs=False, show_progress_bar=False
    )
