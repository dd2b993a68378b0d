"""Virtual tokens of a base with an encoder and a decoder, each of which has its own.

The encoder's rows with fewer are padded at the end; so are the decoder's, unless more tokens follow one by one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_dist.errors import ConfigError
from peft_dist.prompts.base import num_rows, plain_mask
from peft_dist.prompts.block import Block, decoders_part, encoders_part, rolled
from peft_dist.prompts.past import put_past
from peft_dist.prompts.rows import PromptRows


def place_in_both(
    rows: PromptRows, inputs: dict[str, Any]
) -> tuple[dict[str, Any], tuple[Tensor, int] | None]:
    """(the arguments of an encoder with a decoder with the virtual tokens of their rows, how to put its outputs
    back in line)."""
    inputs = dict(inputs)
    begun = inputs.get("past_key_values")
    names = rows.names(num_rows(inputs))
    if begun is not None and begun.get_seq_length():
        return continue_decoder(rows, names, inputs), None
    place_in_encoder(rows, names, inputs)
    return place_in_decoder(rows, names, inputs)


def place_in_encoder(rows: PromptRows, names: list[str | None], inputs: dict[str, Any]) -> None:
    """Puts the encoder's virtual tokens before its input, rows with fewer padded at the end."""
    takes = rows.have_tokens(names)
    if inputs.get("encoder_outputs") is not None:
        if takes:
            raise ConfigError(
                "encoder_outputs: virtual tokens stand before the encoder's input. Give input_ids instead."
            )
        return
    if not takes and not rows.others_may_prompt():
        return
    ids, embeds = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
    embeds = rows.model.word_embeddings(ids) if embeds is None else embeds
    inputs["inputs_embeds"] = embeds
    block = rows.block(names, encoders_part, embeds)
    if block.tokens is None:
        return
    inputs["inputs_embeds"] = torch.cat([block.tokens, embeds], dim=1)
    mask = plain_mask(inputs, "attention_mask")
    if mask is None and block.is_uneven:
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    if mask is not None:
        inputs["attention_mask"] = torch.cat([block.shown.to(mask), mask], dim=1)
    if block.is_uneven:
        for name in ("inputs_embeds", "attention_mask"):
            inputs[name] = rolled(inputs[name], block.longest - block.counts)


def place_in_decoder(
    rows: PromptRows, names: list[str | None], inputs: dict[str, Any], steps: bool = False
) -> tuple[dict[str, Any], tuple[Tensor, int] | None]:
    """Puts the decoder's virtual tokens before its input, and keys and values before its own.

    Args:
        steps: more tokens will follow one by one.
    """
    device = rows.model.base.device
    behind = put_past(rows, names, inputs, device)
    block = Block(None, (0,) * len(names), device)
    if any(name is not None and rows.model.methods[name].in_decoder for name in names):
        block = rows.block(names, decoders_part, _decoders_own(rows, inputs))
    uneven = behind.is_uneven or (steps and block.is_uneven)
    rows.positions.count(behind, block if steps else None)
    if not behind.longest and not block.longest:
        return inputs, None
    mask = plain_mask(inputs, "decoder_attention_mask")
    if mask is None and uneven:
        own = _decoders_length(inputs)
        mask = torch.ones(len(names), own, dtype=torch.long, device=device)
    left = None
    if block.tokens is not None:
        inputs["decoder_inputs_embeds"] = torch.cat([block.tokens, inputs["decoder_inputs_embeds"]], dim=1)
        labels = inputs.get("labels")
        if isinstance(labels, Tensor):
            inputs["labels"] = labels = F.pad(labels, (block.longest, 0), value=-100)
        mask = None if mask is None else torch.cat([block.shown.to(mask), mask], dim=1)
        if block.is_uneven and not steps:
            left = block.longest - block.counts
            for name in ("decoder_inputs_embeds", "labels"):
                if inputs.get(name) is not None:
                    inputs[name] = rolled(inputs[name], left)
            mask = None if mask is None else rolled(mask, left)
    if mask is not None:
        inputs["decoder_attention_mask"] = torch.cat([behind.shown.to(mask), mask], dim=1)
    return inputs, None if left is None else (left, inputs["decoder_inputs_embeds"].shape[1])


def continue_decoder(rows: PromptRows, names: list[str | None], inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a decoder's step whose cache holds the rows' virtual tokens already."""
    block, behind = rows.counts(names, rows.model.base.device, decoder=True)
    rows.positions.count(behind, block)
    mask = plain_mask(inputs, "decoder_attention_mask")
    if mask is None and (block.is_uneven or behind.is_uneven):
        virtual = block.longest + behind.longest
        own = inputs["past_key_values"].get_seq_length() - virtual + _decoders_length(inputs)
        mask = torch.ones(len(names), own, dtype=torch.long, device=block.device)
    if mask is not None:
        parts = [behind.shown.to(mask), block.shown.to(mask), mask]
        inputs["decoder_attention_mask"] = torch.cat(parts, dim=1)
    return inputs


def _decoders_own(rows: PromptRows, inputs: dict[str, Any]) -> Tensor:
    """The embeddings of the decoder's own input, which then stand in `inputs`."""
    embeds = inputs.get("decoder_inputs_embeds")
    if embeds is None:
        ids = inputs.pop("decoder_input_ids", None)
        if ids is None:
            labels = inputs.get("labels")
            if labels is None:
                raise ConfigError("the decoder has no input. Give labels, or decoder_input_ids.")
            ids = _shifted(labels, rows.base.config)
        embeds = inputs["decoder_inputs_embeds"] = rows.model.word_embeddings(ids)
    return embeds


def _decoders_length(inputs: dict[str, Any]) -> int:
    for name in ("decoder_inputs_embeds", "decoder_input_ids", "labels"):
        if inputs.get(name) is not None:
            return inputs[name].shape[1]
    raise ConfigError("the decoder has no input. Give labels, or decoder_input_ids.")


def _shifted(labels: Tensor, facts: Any) -> Tensor:
    """The decoder's input for `labels`: its start, and all labels but the last."""
    start = torch.full_like(labels[:, :1], facts.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1]], dim=1).masked_fill(
        torch.cat([start, labels[:, :-1]], dim=1) == -100, facts.pad_token_id
    )
