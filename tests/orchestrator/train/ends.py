"""What a run ended with, and how far the ends of two runs are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def adapter_of(end: Any) -> dict[str, torch.Tensor]:
    """The tensors of the adapter that a run's end, or an outcome, names."""
    return load_file(Path(end.adapter_dir) / "adapter_model.safetensors")


def difference(one: Any, other: Any) -> float:
    """The largest difference of two runs' adapters, which have the same tensors."""
    ours, theirs = adapter_of(one), adapter_of(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
