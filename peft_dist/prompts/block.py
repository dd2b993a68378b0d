"""The virtual tokens of a batch, rows with fewer padded on the left, and rows moved along their positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_dist.contract import PromptMethod

# Which part of a method's tokens a stack of the base gets.
Pick = Callable[[PromptMethod, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class Block:
    """The virtual tokens of a batch in one stack of the base.

    Args:
        tokens: (B, longest, width), rows with fewer padded on the left; None where no row has any, or they are not
            at hand.
        numbers: how many each row has.
        device: where the base's inputs are.
    """

    tokens: Tensor | None
    numbers: tuple[int, ...]
    device: Any

    @property
    def longest(self) -> int:
        """The largest number."""
        return max(self.numbers, default=0)

    @property
    def is_uneven(self) -> bool:
        """Whether rows differ in number."""
        return min(self.numbers, default=0) < self.longest

    @property
    def counts(self) -> Tensor:
        """(B,) the numbers."""
        return torch.tensor(self.numbers, device=self.device, dtype=torch.long)

    @property
    def shown(self) -> Tensor:
        """(B, longest) which of them are some."""
        places = torch.arange(self.longest, device=self.device)
        return places >= self.longest - self.counts[:, None]


def is_in_decoder(method: Any) -> bool:
    """Whether a method has tokens in a decoder beside those of the encoder."""
    return method.in_decoder and method.num_transformer_submodules == 2


def encoders_part(method: PromptMethod, tokens: Tensor) -> Tensor:
    """What stands before the encoder's input."""
    return tokens[..., : method.num_tokens, :]


def decoders_part(method: PromptMethod, tokens: Tensor) -> Tensor | None:
    """What stands before the decoder's input."""
    return tokens[..., method.num_tokens :, :] if is_in_decoder(method) else None


def rolled(t: Tensor, left: Tensor) -> Tensor:
    """t (B, positions, ...) with each row moved by `left` (B,) positions, around the end."""
    places = torch.arange(t.shape[1], device=t.device)
    index = (places + left[:, None].to(t.device)) % t.shape[1]
    t = t.expand(len(left), *t.shape[1:])
    return t[torch.arange(len(left), device=t.device)[:, None], index]


def in_line(outputs: Any, left: Tensor, length: int) -> Any:
    """A base's outputs with the positions of rows that were moved by `left` where they were before."""

    def back(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == (len(left), length):
            return rolled(value, -left)
        return tuple(map(back, value)) if isinstance(value, tuple) else value

    if isinstance(outputs, tuple):
        return back(outputs)
    for key, value in list(outputs.items()):
        is_of_a_row = key == "logits" and value.ndim == 2
        if not is_of_a_row and not key.startswith("encoder_") and "attentions" not in key:
            outputs[key] = back(value)
    return outputs
