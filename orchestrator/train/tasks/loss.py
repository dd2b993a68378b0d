"""The loss of a batch as a sum over its target tokens, so that it can be divided by all tokens of a step."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..rows.outline import IGNORED


def num_targets(labels: Tensor) -> int:
    """Tokens of `labels` (B, T) that are predicted: the first of a row has nothing before it and never
    counts."""
    return int((labels[:, 1:] != IGNORED).sum())


def target_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of the cross entropy over the target tokens of a batch, float32 scalar.

    Args:
        logits: (B, P + T, V), of which P positions before the row's own are virtual tokens of a prompt
        method; or (N, V), of the targets alone (`head.for_targets`). labels: (B, T), `IGNORED` where a token is no
        target. weights: (B, T), of each target's loss.

    Only the targets' logits are cast to float32. A batch without targets gives a zero that still has a
    gradient, so that its rank takes part in every collective of the backward.
    """
    is_target = labels[:, 1:] != IGNORED
    if not is_target.any():
        return logits[:, :1].float().sum() * 0.0
    chosen = (logits if logits.ndim == 2 else logits[:, -labels.shape[1] : -1][is_target]).float()
    if weights is None:
        return F.cross_entropy(chosen, labels[:, 1:][is_target], reduction="sum")
    losses = F.cross_entropy(chosen, labels[:, 1:][is_target], reduction="none")
    return (losses * weights[:, 1:][is_target]).sum()


class LossScale:
    """Dynamic scale of an fp16 loss (Micikevicius et al., arXiv 1710.03740): halved when a gradient
    overflows, doubled after `growth_interval` steps without; constantly 1 for other precisions."""

    def __init__(self, enabled: bool, value: float = 2.0**16, growth_interval: int = 200) -> None:
        self.enabled, self.growth_interval = enabled, growth_interval
        self.value = value if enabled else 1.0
        self.good_steps = 0

    def update(self, overflowed: bool) -> None:
        """Takes note of one step."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value /= 2
        elif self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0

    @property
    def is_exhausted(self) -> bool:
        """Whether halving has not helped: gradients overflow without any scaling."""
        return self.enabled and self.value < 1.0
