"""Virtual tokens in a packed row: whoever packs leaves room for them at the first positions of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_dist.contract import PastMethod
from peft_dist.packed_rows import PackedRows
from peft_dist.prompts.adapters import PromptAdapters


@dataclass(frozen=True)
class Past:
    """Keys and values of virtual tokens for the positions start to stop of a packed row.

    Attributes:
        layers: for each layer keys and values (heads, stop - start, head width).
    """

    start: int
    stop: int
    layers: tuple[tuple[Tensor, Tensor], ...]


def num_virtual(model: PromptAdapters, adapter: str) -> int:
    """How many positions an adapter wants at the start of its sequences."""
    method: Any = model.methods.get(adapter)
    return 0 if method is None else int(method.num_tokens)


def packed_embeds(model: PromptAdapters, rows: PackedRows, input_ids: Tensor) -> Tensor | None:
    """The embeddings (1, T, width) of a packed row of ids (1, T) with virtual tokens in their places; None where the
    row has none. To be called while `rows` serve."""
    embeds = None
    for name, at, first, last in _places(model, rows):
        method = model.methods[name]
        if isinstance(method, PastMethod):
            continue
        if embeds is None:
            embeds = model.get_base_model().get_input_embeddings()(input_ids).clone()
        p = dict(model.tensors(name))
        embeds[0, at : at + last - first] = method.embeds(p)[first:last].to(embeds.dtype)
    return embeds


def packed_past(model: PromptAdapters, rows: PackedRows, dtype: torch.dtype) -> list[Past]:
    """The keys and values of virtual tokens that stand in this part of a packed row."""
    made: dict[str, Any] = {}
    found = []
    for name, at, first, last in _places(model, rows):
        method = model.methods[name]
        if not isinstance(method, PastMethod):
            continue
        if name not in made:
            made[name] = method.past(dict(model.tensors(name)))
        layers = tuple((k[:, first:last].to(dtype), v[:, first:last].to(dtype)) for k, v in made[name])
        found.append(Past(at, at + last - first, layers))
    return found


def _places(model: PromptAdapters, rows: PackedRows) -> Iterator[tuple[str, int, int, int]]:
    """(adapter, position in the row, first and last + 1 of its virtual tokens there)."""
    at = 0
    for choice, start, length in zip(rows.adapters or (), rows.starts, rows.lengths, strict=True):
        if isinstance(choice, str) and choice in model.adapters:
            last = min(start + length, num_virtual(model, choice))
            if start < last:
                model.check_filled(choice)
                yield choice, at, start, last
        at += length
