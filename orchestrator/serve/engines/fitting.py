"""The fitting of a base: how large its batches and its cache are to be, and whether it runs in packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from orchestrator.machine import free_bytes

from .continuous import ContinuousBatches, Sizes, UnfitBase

_TRIED, _READ, _BEGUN = 12, 9, 3
"""Tokens of a text that a base is tried with, those of them that one sequence reads, and those that another does."""


def batches_of(model: Any, sizes: Sizes, *, one_by_one: bool) -> ContinuousBatches:
    """The batches of a base, once two sequences gave in packed rows what each gives by itself: read part by part, then
    written token by token behind what the cache has of them.

    Args:
        model: of a decoder; its attention is the packed one from then on.
        one_by_one: see `Packed`.

    Raises:
        UnfitBase: it does not run so, or gives other numbers; the base is as it was.
    """
    before = model.config._attn_implementation
    ids = [place % model.get_input_embeddings().weight.shape[0] for place in range(1, _TRIED + 1)]
    try:
        with torch.no_grad():
            alone = (
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
            )
            batches = ContinuousBatches(model, sizes, one_by_one=one_by_one)
            allowed = (1e-3 if _is_exact(model) else 0.1) * alone.abs().max()
            tried = list(_tried(model, batches, ids))
            worst = torch.stack([(scores - alone[place]).abs().max() for place, scores in tried]).max()
        if not worst <= allowed:
            raise UnfitBase(f"{type(model).__name__} gives other numbers in a packed row, by {worst:.3g}")
    except Exception as error:
        model.set_attn_implementation(before)
        if isinstance(error, UnfitBase):
            raise
        raise UnfitBase(f"{type(model).__name__} does not run in a packed row: {error!r}") from error
    return batches


def _is_exact(model: Any) -> bool:
    """Whether a product's last bits are all that the size of a batch changes: 8-bit layers round activations, too."""
    return model.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None


def _tried(model: Any, batches: ContinuousBatches, ids: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(place, scores in fp32) of each token's successor, of the same tokens in two sequences."""
    left = {"whole": ids[_READ:], "begun": ids[_BEGUN:]}
    for name, later in left.items():
        batches.add(name, ids[: len(ids) - len(later)], name)
    while (step := batches.next_step(str, late=lambda _: True, spare=_READ // 2)) is not None:
        last = [part for part in step.parts if part.is_last]
        scores = model(**step.inputs).logits[0].float()
        batches.take(step, {part.sequence: next(iter(left[part.sequence]), 0) for part in last})
        for part, row in zip(last, scores, strict=True):
            yield part.start + part.length - 1, row
            if not left[part.sequence]:
                batches.finish(part.sequence)
            left[part.sequence] = left[part.sequence][1:]


def sizes_for(
    model: Any, max_context: int, max_sequences: int, max_batch_tokens: int | None, cache_bytes: int | None
) -> Sizes:
    """How large batches and cache are to be: each sequence may fill the context, as far as memory allows.

    Args:
        cache_bytes: of keys and values together; at most a quarter of the device's free memory where None.
    """
    layers = model.config.get_text_config().per_layer_config
    token_bytes = 2 * model.dtype.itemsize * sum(_key_width(layer) for layer in layers)
    page = 16
    if cache_bytes is None:
        cache_bytes = _memory_of(model.device) // 4
    tokens = min(max_sequences * (max_context + 1), max(cache_bytes // token_bytes, 2 * page))
    return Sizes(
        num_blocks=-(-tokens // page),
        page_size=page,
        max_batch_tokens=max_batch_tokens or max(256, max_sequences),
        max_sequences=max_sequences,
    )


def _key_width(layer: Any) -> int:
    """Numbers in the keys of one position, by the configuration of a layer."""
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    width = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return int(heads * width)


def _memory_of(device: torch.device) -> int:
    """Bytes that are free on the device."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_bytes()
