"""Virtual tokens of sequences that share rows: each sequence's own, at its beginning, within the row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_dist.bins import Bins, bins_of
from peft_dist.contract import PastMethod
from peft_dist.errors import RowsError
from peft_dist.prompts.rows import PromptRows, distinct


def forward_between(rows: PromptRows, inputs: dict[str, Any], bins: Bins) -> Any:
    """The base's outputs for rows in which sequences share (bins, width), virtual tokens before each of them; of
    their own positions alone.

    Raises:
        RowsError: a method keeps its tokens in the cache, where those of all sequences of a row would be seen by all;
            or the loss is to be counted here.
    """
    names = rows.names(bins.num)
    for name in distinct(names):
        if isinstance(rows.model.methods[name], PastMethod):
            raise RowsError(
                f"adapter {name!r}: its keys and values stand before a row, and several sequences share one. Turn "
                "sample packing off."
            )
    if inputs.get("labels") is not None or inputs.get("attention_mask") is not None:
        raise RowsError("sequences that share a row: neither labels nor attention_mask can be given.")
    inputs = dict(inputs)
    ids, embeds = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
    embeds = rows.model.word_embeddings(ids) if embeds is None else embeds
    block = rows.block(names, lambda _, tokens: tokens, embeds)
    counts = block.numbers
    every = [length for row in bins.lengths for length in row]
    wide = _widened(bins, counts)
    device = embeds.device
    index, own = _index(bins, wide, every, counts, block.longest)
    source = embeds.flatten(0, 1)
    if block.tokens is not None:
        source = torch.cat([block.tokens.flatten(0, 1), source])
    inputs["inputs_embeds"] = source[index.to(device)]
    inputs["position_ids"] = wide.positions().to(device)
    outputs = rows.base(**{**inputs, "use_cache": False})
    return _of_own(outputs, wide.shape, own.to(device))


def _widened(bins: Bins, counts: tuple[int, ...]) -> Bins:
    left = iter(counts)
    return bins_of([[length + next(left) for length in row] for row in bins.lengths])


def _index(
    bins: Bins, wide: Bins, every: list[int], counts: tuple[int, ...], longest: int
) -> tuple[Tensor, Tensor]:
    """(where each position of the wide rows comes from: the virtual tokens (sequences x longest), then the rows'
    own; where each of the rows' own positions went)."""
    index, own = torch.zeros(wide.shape, dtype=torch.long), torch.zeros(bins.shape, dtype=torch.long)
    number, virtual = 0, len(every) * longest
    for row, lengths in enumerate(bins.lengths):
        at, to = 0, 0
        for length in lengths:
            count = counts[number]
            index[row, to : to + count] = (number + 1) * longest - count + torch.arange(count)
            own[row, at : at + length] = to + count + torch.arange(length)
            to += count
            index[row, to : to + length] = virtual + row * bins.width + at + torch.arange(length)
            to, at, number = to + length, at + length, number + 1
    return index, own


def _of_own(outputs: Any, shape: tuple[int, int], own: Tensor) -> Any:
    def kept(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 2 and tuple(value.shape[:2]) == shape:
            return value[torch.arange(shape[0], device=own.device)[:, None], own]
        return tuple(map(kept, value)) if isinstance(value, tuple) else value

    if isinstance(outputs, tuple):
        return kept(outputs)
    for key, value in list(outputs.items()):
        if "attentions" not in key:
            outputs[key] = kept(value)
    return outputs
