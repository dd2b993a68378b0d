"""bitsandbytes' codes and statistics of a part of a weight, a chunk at a time, equal to those of the whole at once.

In 8-bit each row has codes and one statistic of its own; in 4-bit each block of 64 values has, flat, row by row. A
part is therefore read up to the borders of its rows or blocks. Where statistics are quantised once more, that
takes all of a weight's, which `nested` is given (LLM.int8(): arXiv 2208.07339; QLoRA: arXiv 2305.14314).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_dist.errors import BaseModelError
from peft_dist.lazy import lazy
from peft_dist.loading.pending import Pending
from peft_dist.loading.stored import chunks
from peft_dist.packed import BLOCK, NESTED_BLOCK, int8

bitsandbytes = lazy("bitsandbytes")


def int8_rows(weight: Pending, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes (last - first, in) int8 and statistics (last - first,) fp32 of the rows [first, last) of W (out, in)."""
    width = weight.shape[1]
    codes = torch.empty(last - first, width, dtype=torch.int8, device=device)
    scales = torch.empty(last - first, dtype=torch.float32, device=device)
    for low, high in chunks(first * width, last * width, 4, step=width):
        rows = slice(low // width - first, high // width - first)
        codes[rows], scales[rows] = int8(weight.part(low, high).view(-1, width).to(device))
    return codes, scales


def four_bit_blocks(
    weight: Pending, first: int, last: int, quant_type: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Packed codes (bytes,) uint8 and statistics (last - first,) fp32 of the blocks [first, last) of a weight."""
    start, stop = first * BLOCK, min(last * BLOCK, weight.numel())
    codes = torch.empty(-(-(stop - start) // 2), dtype=torch.uint8, device=device)
    scales = torch.empty(last - first, dtype=torch.float32, device=device)
    for low, high in chunks(start, stop, 4, step=BLOCK):
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight.part(low, high).to(device),
            blocksize=BLOCK,
            quant_type=quant_type,
            compress_statistics=False,
        )
        codes[(low - start) // 2 : (low - start) // 2 + packed.numel()] = packed.view(-1)
        scales[low // BLOCK - first : low // BLOCK - first + state.absmax.numel()] = state.absmax
    return codes, scales


def nested(scales: Tensor) -> tuple[Tensor, Any, Tensor]:
    """All of a weight's 4-bit statistics, quantised once more: codes uint8, their QuantState, the offset ()."""
    offset = scales.mean()
    codes, state = bitsandbytes.functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    return codes, state, offset


def num_blocks(weight: Pending) -> int:
    """How many 4-bit blocks a weight has."""
    return -(-weight.numel() // BLOCK)


def as_storage(codes: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Packed codes (bytes,) as (k, 1) of the dtype that they are kept in.

    Raises:
        BaseModelError: they do not fill a whole number of it.
    """
    if codes.numel() % dtype.itemsize:
        raise BaseModelError(
            f"base model: {name} has {codes.numel()} bytes of 4-bit codes, which {dtype} cannot hold. Set "
            "bnb_4bit_quant_storage to uint8."
        )
    return codes.view(dtype).view(-1, 1)


def params_8bit(weight: Pending, old: Any, device: torch.device) -> Any:
    """A whole weight as bitsandbytes' Int8Params, made like `old`."""
    return kept_8bit(*int8_rows(weight, 0, weight.shape[0], device), old)


def kept_8bit(codes: Tensor, scales: Tensor, old: Any) -> Any:
    """Codes (out, in) and scales (out,) as bitsandbytes' Int8Params, made like `old`."""
    made = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=old.has_fp16_weights)
    made.CB, made.SCB = made.data, scales
    return made


def params_4bit(weight: Pending, old: Any, name: str, device: torch.device) -> Any:
    """A whole weight as bitsandbytes' Params4bit, made like `old`, which is on meta."""
    codes, scales = four_bit_blocks(weight, 0, num_blocks(weight), old.quant_type, device)
    functional = bitsandbytes.functional
    state = functional.QuantState(
        absmax=scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=functional.get_4bit_type(old.quant_type, device=device),
        quant_type=old.quant_type,
    )
    if old.compress_statistics:
        state.absmax, state.state2, state.offset = nested(scales)
        state.nested = True
    return kept_4bit(as_storage(codes, old.quant_storage, name), state, old)


def kept_4bit(codes: Tensor, state: Any, old: Any) -> Any:
    """Packed codes (k, 1) and their QuantState as bitsandbytes' Params4bit, made like `old`."""
    made = bitsandbytes.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=codes.dtype,
        module=old.module,
        bnb_quantized=True,
    )
    if old.module is not None:
        old.module.quant_state = state
    return made
