"""Greedy answers of a model that writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .task import Answering, pad_id


def continuations(
    model: nn.Module, prompts: Sequence[Sequence[int]], how: Answering, extra: dict[str, Tensor]
) -> list[str]:
    """What a decoder writes after each prompt, which are padded on the left; stripped text.

    Args:
        extra: further arguments of `generate`, one entry a prompt.
    """
    width, pad = max(map(len, prompts)), pad_id(how.tokenizer)
    room = getattr(model.config, "max_position_embeddings", None)
    longest = how.max_new_tokens if room is None else min(how.max_new_tokens, room - width)
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **extra}
    written = _generate(model, inputs, max(1, longest), how)[:, width:].tolist()
    return _texts(model, written, how)


def written(model: nn.Module, inputs: dict[str, Tensor], how: Answering) -> list[str]:
    """What an encoder-decoder writes to each input; stripped text."""
    return _texts(model, _generate(model, inputs, how.max_new_tokens, how)[:, 1:].tolist(), how)


def _generate(model: Any, inputs: dict[str, Tensor], longest: int, how: Answering) -> Tensor:
    with torch.no_grad():
        return model.generate(
            **{name: tensor.to(how.device) for name, tensor in inputs.items()},
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_id(how.tokenizer),
            eos_token_id=sorted(ends(model, how.tokenizer)) or None,
            use_cache=getattr(model.config, "use_cache", None) is not False,
            synced_gpus=how.is_sharded,
        )


def ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a text."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return {end for end in [*listed, tokenizer.eos_token_id] if end is not None}


def _texts(model: nn.Module, rows: list[list[int]], how: Answering) -> list[str]:
    stops = ends(model, how.tokenizer)
    return [how.tokenizer.decode(_until(row, stops), skip_special_tokens=True).strip() for row in rows]


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens before the first end."""
    for position, token in enumerate(tokens):
        if token in stops:
            return tokens[:position]
    return tokens
