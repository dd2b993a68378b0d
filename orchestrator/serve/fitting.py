"""The fitting of a base: how large its batches and its cache are to be, and whether it runs in packed rows."""

from __future__ import annotations

from typing import Any

import torch

from ..machine import free_bytes
from .continuous import ContinuousBatches, Packed, Part, Sizes, UnfitBase


def batches_of(model: Any, sizes: Sizes, *, one_by_one: bool) -> ContinuousBatches:
    """The batches of a base, once a packed row of two sequences gave what each gives by itself.

    Args:
        model: of a decoder; its attention is the packed one from then on.
        one_by_one: see `Packed`.

    Raises:
        UnfitBase: it does not run so, or gives other numbers; the base is as it was.
    """
    before = model.config._attn_implementation
    ids = torch.arange(1, 9, device=model.device) % model.get_input_embeddings().weight.shape[0]
    try:
        with torch.no_grad():
            wanted = model(input_ids=ids[None], use_cache=False).logits[0].float()
            batches = ContinuousBatches(model, sizes, one_by_one=one_by_one)
            given = model(
                input_ids=torch.cat([ids, ids[:4]])[None],
                position_ids=torch.tensor([[*range(8), *range(4)]], device=model.device),
                logits_to_keep=torch.tensor([7, 11], device=model.device),
                use_cache=False,
                packed=Packed((Part("whole", 0, 8, True), Part("begun", 0, 4, True))),
            ).logits[0]
            allowed = (1e-3 if model.dtype == torch.float32 else 0.1) * wanted.abs().max()
            worst = (given.float() - wanted[[7, 3]]).abs().max()
        if not worst <= allowed:
            raise UnfitBase(f"{type(model).__name__} gives other numbers in a packed row, by {worst:.3g}")
    except Exception as error:
        model.set_attn_implementation(before)
        if isinstance(error, UnfitBase):
            raise
        raise UnfitBase(f"{type(model).__name__} does not run in a packed row: {error!r}") from error
    return batches


def sizes_for(
    model: Any, max_context: int, max_sequences: int, max_batch_tokens: int | None, cache_bytes: int | None
) -> Sizes:
    """How large batches and cache are to be: each sequence may fill the context, as far as memory allows.

    Args:
        cache_bytes: of keys and values together; at most a quarter of the device's free memory where None.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
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


def _memory_of(device: torch.device) -> int:
    """Bytes that are free on the device."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_bytes()
