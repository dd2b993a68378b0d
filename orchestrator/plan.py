"""Spec + cluster -> Plan: pure arithmetic, printed by `raypeft plan`, the same that the driver runs by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Estimated bytes at the peak of a step on one worker, by part."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    framework: int

    @property
    def total(self) -> int:
        """The sum of all parts, bytes."""
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations + self.framework


@dataclass(frozen=True)
class Plan:
    """How a job will run. `global_batch_size = num_workers * micro_batch_size * gradient_accumulation_steps`."""

    num_workers: int
    bundle: dict[str, float]
    """Ray resources of one worker: `{"CPU": 1}` or `{"CPU": 1, "GPU": 1}`."""
    placement: str
    labels: dict[str, str]
    zero_stage: int
    deepspeed: dict[str, Any]
    """The DeepSpeed config that the workers use."""
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    memory: Memory | None
    """None where the architecture is unknown; `notes` then says so."""
    fits: bool | None
    """None where the cluster or the memory is not known."""
    notes: tuple[str, ...] = field(default=())
    """What the plan does not know, and what it chose by itself."""

    @property
    def use_gpu(self) -> bool:
        """Whether each worker is given (part of) a GPU."""
        return self.bundle.get("GPU", 0) > 0
