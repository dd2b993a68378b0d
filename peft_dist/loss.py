"""The loss of next tokens, where each has a weight of its own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, num_items: Any = None) -> Tensor:
    """The cross entropy of each next token times its weight, over their number; fp32 scalar.

    Args:
        logits: (B, S, vocabulary), of which the last T positions are those of labels and weights (B, T).
        labels: -100 where nothing is counted.
        num_items: what to divide by; the number of counted labels by default.
    """
    labels, weights = labels[:, 1:].to(logits.device), weights[:, 1:].to(logits.device)
    before = logits[:, -labels.shape[1] - 1 : -1].float()
    losses = F.cross_entropy(before.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    is_counted = labels != IGNORED
    total = (losses.view_as(weights) * weights)[is_counted].sum()
    return total / (is_counted.sum() if num_items is None else num_items)
