"""The positions of a decoder that counts them by itself, where rows have different numbers of virtual tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.errors import RowsError
from peft_dist.prompts.base import BY_DISTANCE, positions_of
from peft_dist.prompts.block import Block


class DecoderPositions:
    """What a base's decoder is told of its positions.

    Attributes:
        not_counted: (B,) positions of each row that are padding; None where none are.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self.not_counted: Tensor | None = None

    def count(self, behind: Block, block: Block | None) -> None:
        """Lets padding before a row's decoder tokens not count as positions.

        Raises:
            RowsError: rows have different numbers of virtual tokens, and the decoder cannot be told.
        """
        base = self.base
        blocks = [each for each in (behind, block) if each is not None and each.is_uneven]
        self.not_counted = None
        if not blocks or getattr(base.config, "model_type", None) in BY_DISTANCE:
            return
        if positions_of(base) is None:
            raise RowsError(
                f"{type(base).__name__} counts its decoder's positions by itself, so rows of one batch cannot have "
                "different numbers of virtual tokens there. Run one such adapter at a time."
            )
        self.not_counted = torch.stack([each.longest - each.counts for each in blocks]).sum(0)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Within the context a decoder's positions are those that `count` has said."""

        def places(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if self.not_counted is None:
                return args, kwargs
            own = kwargs["position_ids"] - self.not_counted[:, None].to(kwargs["position_ids"].device)
            return args, {**kwargs, "position_ids": own.clamp(min=0).flatten()}

        def by_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any], made: Tensor) -> Tensor:
            # Of one row of positions a decoder makes one row of embeddings.
            rows = self.not_counted
            return made.view(len(rows), -1, made.shape[-1]) if rows is not None else made

        embedding = positions_of(self.base)
        hooks = []
        if embedding is not None:
            hooks.append(embedding.register_forward_pre_hook(places, with_kwargs=True))
            hooks.append(embedding.register_forward_hook(by_rows, with_kwargs=True))
        try:
            yield
        finally:
            self.not_counted = None
            for hook in hooks:
                hook.remove()
