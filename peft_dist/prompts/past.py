"""Keys and values of virtual tokens, which stand in the base's cache before its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from peft_dist.contract import PastMethod
from peft_dist.errors import ConfigError
from peft_dist.prompts.base import has_decoder, kv_shapes, refuse_recomputation
from peft_dist.prompts.block import Block
from peft_dist.prompts.rows import PromptRows, distinct


def put_past(rows: PromptRows, names: Sequence[str | None], inputs: dict[str, Any], device: Any) -> Block:
    """Puts the rows' keys and values into the cache of the base's arguments; how many each row has."""
    behind, layers = past(rows, names, device)
    if layers:
        if rows.model.training:
            refuse_recomputation(rows.base, "a prefix")
        inputs["past_key_values"] = filled(rows.base, inputs.get("past_key_values"), layers)
    return behind


def past(rows: PromptRows, names: Sequence[str | None], device: torch.device) -> tuple[Block, list]:
    """(how many virtual tokens the rows have in the past, for each layer keys and values (B, heads,
    longest, width))."""
    made: dict[str | None, Sequence[tuple[Tensor, Tensor]]] = {}
    for name in distinct(names):
        method = rows.model.methods[name]
        if isinstance(method, PastMethod):
            made[name] = method.past(rows.given(name, names), rows.model.training)
    numbers = tuple(made[name][0][0].shape[1] if name in made else 0 for name in names)
    block = Block(None, numbers, device)
    if not made:
        return block, []
    first = next(iter(made.values()))
    empty = first[0][0].new_zeros(first[0][0].shape[0], 0, first[0][0].shape[2])
    dtype = rows.model.base.dtype

    def stacked(layer: int, which: int) -> Tensor:
        parts = [made[name][layer][which] if name in made else empty for name in names]
        if all(name == names[0] for name in names):
            return parts[0].to(dtype).expand(len(names), -1, -1, -1)
        padded = [F.pad(part, (0, 0, block.longest - part.shape[1], 0)) for part in parts]
        return torch.stack(padded).to(dtype)

    return block, [(stacked(layer, 0), stacked(layer, 1)) for layer in range(len(first))]


def filled(base: Any, given: Any, layers: list[tuple[Tensor, Tensor]]) -> Any:
    """A cache of the base with keys and values in it: `given`, or a new one."""
    if getattr(given, "is_compileable", False):
        raise ConfigError("a prefix adapter needs a cache that grows. Leave cache_implementation out.")
    # A decoder may have another number of layers than the base's config says.
    facts = base.get_decoder().config if has_decoder(base) else base.config
    if given is None and has_decoder(base):
        given = EncoderDecoderCache(DynamicCache(config=facts), DynamicCache(config=facts))
    elif given is None:
        given = DynamicCache(config=facts)
    own = given.self_attention_cache if isinstance(given, EncoderDecoderCache) else given
    keeps = facts.get_text_config(decoder=True)
    # The last ones may read what others keep.
    layers = layers[: len(layers) - (getattr(keeps, "num_kv_shared_layers", None) or 0)]
    shapes = kv_shapes(keeps)
    shapes = shapes * len(layers) if len(shapes) == 1 else shapes
    without = []
    for number, (keys, values) in enumerate(layers):
        heads, width = shapes[number]
        if heads > keys.shape[1] or width > keys.shape[3]:
            without.append(number)
        else:
            own.update(keys[:, :heads, :, :width], values[:, :heads, :, :width], number)
    if without:
        _tell(without, len(layers))
    return given


def _tell(without: list[int], num_layers: int) -> None:
    says = (
        f"a prefix: layers {', '.join(map(str, without))} keep more or wider heads than its tokens have, so that "
        "none stand there. Set token_dim and num_attention_heads of its config to those of the layers that should."
    )
    if len(without) == num_layers:
        raise ConfigError(says)
    warnings.warn(says, stacklevel=3)
