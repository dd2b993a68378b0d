"""The head of a language model, run for the tokens whose next one is a target and for no others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from peft_dist.bins import Bins

from ..rows.outline import IGNORED


@contextlib.contextmanager
def for_targets(model: nn.Module, labels: Tensor, bins: Bins | None = None) -> Iterator[None]:
    """Within the context a forward of `model` gives logits (N, V): of the positions before the N targets, in their
    order. The loss is the same, without the products and the memory of those that nothing is compared with.

    They are whole, (B, P + T, V), where the head is no plain linear layer (it may have an adapter) or the base is not
    one of transformers', whose forward might count on their shape, or where virtual tokens stand between rows that
    share a sequence.

    Args:
        labels: (B, T), `IGNORED` where a token is no target. bins: where rows share sequences.
    """
    head = _plain_head(model)
    if head is None:
        yield
        return
    is_before = F.pad(labels[:, 1:] != IGNORED, (0, 1))

    def pick(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0]
        if hidden.ndim != 3 or len(hidden) != len(labels):
            return None
        more = hidden.shape[1] - labels.shape[1]
        if more < 0 or (more and bins is not None):
            return None
        return (hidden[:, -labels.shape[1] :][is_before], *inputs[1:])

    hook = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()


def _plain_head(model: Any) -> nn.Linear | None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not type(base).__module__.startswith("transformers."):
        return None
    head = base.get_output_embeddings()
    return head if type(head) is nn.Linear else None
