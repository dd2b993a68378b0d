"""Virtual tokens before the input of a base of one stack, with all that has an entry for each position.

A base that reads one way has shorter rows padded on the left; one that reads both ways at the end, so that each
token has the place it has when its row is alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_dist.errors import RowsError
from peft_dist.prompts.base import BY_DISTANCE, arguments, backbone, plain_mask
from peft_dist.prompts.block import Block, rolled
from peft_dist.prompts.labels import are_of_tokens, labelled
from peft_dist.prompts.past import put_past
from peft_dist.prompts.rows import PromptRows


def place(rows: PromptRows, inputs: dict[str, Any]) -> tuple[dict[str, Any], tuple[Tensor, int] | None]:
    """(the arguments of a base of one stack with the virtual tokens of their rows, how to put its outputs back
    in line)."""
    inputs = dict(inputs)
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    like: Any = ids if embeds is None else embeds
    names = rows.names(like.shape[0])
    past = inputs.get("past_key_values")
    if past is not None and past.get_seq_length():
        return _continued(rows, names, inputs), None
    if rows.others_may_prompt() or rows.have_tokens(names):
        inputs.pop("input_ids", None)
        inputs["inputs_embeds"] = rows.model.word_embeddings(ids) if embeds is None else embeds
        block = rows.block(names, lambda _, tokens: tokens, inputs["inputs_embeds"])
    else:
        block = Block(None, (0,) * len(names), like.device)
    behind = put_past(rows, names, inputs, like.device)
    if not block.longest and not behind.longest:
        return inputs, None
    _put(rows, inputs, ids, block, behind, like.shape[1])
    back = _moved(rows, inputs, block, behind)
    rows.current.length = block.longest + like.shape[1]
    rows.current.padding = block.longest - block.counts if block.is_uneven and back is None else None
    return inputs, back


def _put(
    rows: PromptRows, inputs: dict[str, Any], ids: Tensor | None, block: Block, behind: Block, own: int
) -> None:
    """Puts virtual tokens before a batch's own, and all that has an entry for each position with them."""
    num_rows, longest = len(block.numbers), block.longest
    device = block.device
    uneven = block.is_uneven or behind.is_uneven
    mask = plain_mask(inputs, "attention_mask")
    if mask is None and uneven:
        mask = torch.ones(num_rows, own, dtype=torch.long, device=device)
    if mask is not None:
        inputs["attention_mask"] = torch.cat([block.shown.to(mask), mask], dim=1)
    given = inputs.get("position_ids")
    if given is None and uneven:
        given = _positions_by_padding(rows.base, ids, block, behind, own)
    if given is not None or (uneven and _needs_positions(rows, behind)):
        first = torch.arange(own, device=device)[None] if given is None else given
        counts = (block.counts + behind.counts)[:, None]
        places = torch.arange(longest, device=device) - (longest - block.counts[:, None])
        virtual = places.clamp(min=0) + behind.counts[:, None] + first[:, :1]
        inputs["position_ids"] = torch.cat([virtual, (first + counts).expand(num_rows, own)], dim=1)
    if block.tokens is None:
        return
    embeds = inputs["inputs_embeds"]
    inputs["inputs_embeds"] = torch.cat([block.tokens, embeds], dim=1)
    if inputs.get("token_type_ids") is not None:
        inputs["token_type_ids"] = F.pad(inputs["token_type_ids"], (longest, 0))
    if are_of_tokens(inputs.get("labels"), (num_rows, own), rows.model.task_type):
        inputs["labels"] = labelled(inputs["labels"], block, rows.model.task_type)
    for name in ("start_positions", "end_positions"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name] + longest


def _moved(
    rows: PromptRows, inputs: dict[str, Any], block: Block, behind: Block
) -> tuple[Tensor, int] | None:
    """Moves rows along their positions to where the base wants them, and puts the mask of the past before;
    (how far to the left (B,), positions in all), or None."""
    mask, left = inputs.get("attention_mask"), None
    if block.tokens is not None and not rows.model._reads_one_way():
        left = block.longest - block.counts if block.is_uneven else None
    elif block.tokens is not None and mask is not None and rows.model.task_type == "SEQ_CLS":
        # Such a base takes the last position for the row's last token where it is given no ids.
        behind_text = (mask.flip(1).cumsum(1) == 0).sum(1)
        if behind_text.any():
            left = -behind_text
            if "position_ids" not in inputs:
                inputs["position_ids"] = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    if left is not None:
        for name in ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids"):
            if inputs.get(name) is not None:
                inputs[name] = rolled(inputs[name], left)
        if are_of_tokens(
            inputs.get("labels"), tuple(inputs["inputs_embeds"].shape[:2]), rows.model.task_type
        ):
            inputs["labels"] = rolled(inputs["labels"], left)
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name] - left
    if mask is not None and behind.longest:
        inputs["attention_mask"] = torch.cat([behind.shown.to(mask), inputs["attention_mask"]], dim=1)
    return None if left is None else (left, inputs["inputs_embeds"].shape[1])


def _continued(rows: PromptRows, names: list[str | None], inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a step whose cache holds the rows' virtual tokens already."""
    like = inputs.get("inputs_embeds")
    like = inputs["input_ids"] if like is None else like
    block, behind = rows.counts(names, like.device)
    mask = plain_mask(inputs, "attention_mask")
    uneven = block.is_uneven or behind.is_uneven
    own = inputs["past_key_values"].get_seq_length() - block.longest - behind.longest + like.shape[1]
    if mask is None and uneven:
        mask = torch.ones(len(names), own, dtype=torch.long, device=like.device)
    if mask is not None:
        inputs["attention_mask"] = torch.cat([behind.shown.to(mask), block.shown.to(mask), mask], dim=1)
    given = inputs.get("position_ids")
    if given is not None or (uneven and _needs_positions(rows, behind)):
        first = torch.arange(own - like.shape[1], own, device=like.device)[None] if given is None else given
        inputs["position_ids"] = first + (block.counts + behind.counts)[:, None]
    return inputs


def _needs_positions(rows: PromptRows, behind: Block) -> bool:
    """Whether rows of different numbers need their positions said.

    Raises:
        RowsError: they do, and the base cannot be told.
    """
    base = rows.base
    if not rows.model._reads_one_way() and not behind.longest:
        return False
    if "position_ids" in arguments(base) or "position_ids" in arguments(backbone(base)):
        return True
    if getattr(base.config, "model_type", None) in BY_DISTANCE:
        return False
    raise RowsError(
        f"{type(base).__name__} takes no position_ids, so rows of one batch cannot have different numbers of "
        "virtual tokens. Run one prompt adapter at a time."
    )


def _positions_by_padding(
    base: Any, ids: Tensor | None, block: Block, behind: Block, own: int
) -> Tensor | None:
    """(B, own) the positions that RoBERTa and its like give each row by itself, less its virtual tokens: counted
    from the padding's number, and over tokens alone where it sees ids; None for other bases."""
    module = getattr(backbone(base), "embeddings", None)
    if not hasattr(module, "create_position_ids_from_inputs_embeds"):
        return None
    padding: Any = module.padding_idx  # type: ignore[union-attr]
    places = padding + 1 + torch.arange(own, device=block.counts.device)
    if ids is None:
        return places.expand(len(block.counts), own)
    is_token = (ids != padding).long()
    past = behind.counts[:, None]
    by_tokens = padding + (is_token.cumsum(1) + past) * is_token - past
    return torch.where((block.counts > 0)[:, None], places, by_tokens)
