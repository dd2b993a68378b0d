"""Virtual tokens in a packed row: whoever packs leaves room for them at the first positions of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_dist.contract import PastMethod
from peft_dist.packed_rows import PackedRows, Reads, Stretch
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
    for name, at, first, last, reads in _places(model, rows):
        method = model.methods[name]
        if isinstance(method, PastMethod):
            continue
        if embeds is None:
            embeds = model.get_base_model().get_input_embeddings()(input_ids).clone()
        tokens = method.embeds(_given(model, name, reads))
        # A method that reads of sequences makes each its own.
        tokens = tokens[0] if tokens.ndim == 3 else tokens
        embeds[0, at : at + last - first] = tokens[first:last].to(embeds.dtype)
    return embeds


def packed_past(model: PromptAdapters, rows: PackedRows, dtype: torch.dtype) -> list[Past]:
    """The keys and values of virtual tokens that stand in this part of a packed row."""
    made: dict[str, Any] = {}
    found = []
    for name, at, first, last, _ in _places(model, rows):
        method = model.methods[name]
        if not isinstance(method, PastMethod):
            continue
        if name not in made:
            made[name] = method.past(dict(model.tensors(name)))
        layers = tuple((k[:, first:last].to(dtype), v[:, first:last].to(dtype)) for k, v in made[name])
        found.append(Past(at, at + last - first, layers))
    return found


def _given(model: PromptAdapters, adapter: str, reads: Reads) -> dict[str, Any]:
    """What the adapter's method finds in `p`: its tensors, and what it reads of the one sequence."""
    p: dict[str, Any] = dict(model.tensors(adapter))
    whole = Stretch(adapter, 0, 0, reads).given(model.base.device)
    return p | {name: whole[name] for name in model.methods[adapter].reads if name in whole}


def _places(model: PromptAdapters, rows: PackedRows) -> Iterator[tuple[str, int, int, int, Reads]]:
    """(adapter, position in the row, first and last + 1 of its virtual tokens there, what is read of the sequence)."""
    at = 0
    whole = zip(rows.adapters or (), rows.starts, rows.lengths, rows.reads, strict=True)
    for choice, start, length, reads in whole:
        if isinstance(choice, str) and choice in model.adapters:
            last = min(start + length, num_virtual(model, choice))
            if start < last:
                model.check_filled(choice)
                yield choice, at, start, last, reads
        at += length
