"""Labels beside virtual tokens, and losses that methods count themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_dist.loss import weighted_loss
from peft_dist.prompts.base import has_decoder
from peft_dist.prompts.block import Block
from peft_dist.prompts.rows import PromptRows, distinct


def labelled(labels: Tensor, block: Block, task_type: str | None) -> Tensor:
    """Labels with those of virtual tokens, of which there are none; (B, longest + T)."""
    labels = F.pad(labels, (block.longest, 0), value=-100)
    if task_type == "CAUSAL_LM" and 0 in block.numbers:
        # Nothing stands before a row's first token where it has no virtual ones, so nothing predicts it.
        first = torch.arange(labels.shape[1], device=labels.device) == block.longest
        labels = labels.masked_fill((block.counts.to(labels.device) == 0)[:, None] & first, -100)
    return labels


def are_of_tokens(labels: Any, shape: tuple[int, ...], task_type: str | None) -> bool:
    """Whether there is a label for each position of rows of that shape."""
    return (
        isinstance(labels, Tensor)
        and task_type != "SEQ_CLS"
        and tuple(labels.shape) == shape
        and not labels.is_floating_point()
    )


def counted(rows: PromptRows, inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(labels, weights of their losses), each (B, virtual + T), where a row's method has a loss of its own;
    else None."""
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or has_decoder(rows.base):
        return None
    names = rows.names(len(labels))
    own = {}
    for name in distinct(names):
        mine = [row for row, other in enumerate(names) if other == name]
        counted = rows.model.methods[name].targets(labels[mine], rows.given(name, names))
        if counted is not None:
            own[name] = counted, mine
    if not own:
        return None
    whole = labelled(labels, rows.counts(names, labels.device)[0], rows.model.task_type)
    longest = whole.shape[1] - labels.shape[1]
    weights = torch.ones(whole.shape, device=labels.device)
    for (theirs, weight), mine in own.values():
        fewer = longest + labels.shape[1] - theirs.shape[1]
        whole[mine] = F.pad(theirs, (fewer, 0), value=-100)
        weights[mine] = F.pad(weight, (fewer, 0))
    return whole, weights


def with_loss(outputs: Any, labels: Tensor, weights: Tensor, items: Any) -> Any:
    """`outputs` with the mean of the next tokens' losses, each times its weight."""
    logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    loss = weighted_loss(logits, labels, weights, items)
    if not hasattr(outputs, "logits"):
        return (loss, *outputs)
    outputs.loss = loss
    return outputs
