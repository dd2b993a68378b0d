"""What autograd keeps for the backward."""

from __future__ import annotations

import torch
from torch import Tensor


def are_hooked() -> bool:
    """Whether they are now computed anew in the backward, as gradient checkpointing does, or lie elsewhere until
    then."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def version(t: Tensor) -> int:
    """How often a tensor was changed in place, where that is counted."""
    return 0 if t.is_inference() else t._version
