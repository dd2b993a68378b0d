"""Weights that a checkpoint holds as bitsandbytes' codes, each with the statistics that belong to it.

In memory they are kept as they are stored, each part read by itself. Where a whole number is wanted, as for a merge,
such a weight is a tensor like any other: what its codes stand for, dequantised a chunk at a time. What the files hold
is what bitsandbytes' layers put into their state dicts
(LLM.int8(): arXiv 2208.07339; QLoRA: arXiv 2305.14314).

    8-bit   X.weight (out, in) int8, X.SCB (out,) fp32, X.weight_format
    4-bit   X.weight (n, 1), X.weight.absmax, .quant_map, .nested_absmax, .nested_quant_map, and in
            X.weight.quant_state.bitsandbytes__nf4 the rest, as JSON
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_dist.errors import BaseModelError
from peft_dist.lazy import lazy
from peft_dist.loading.keys import Keys
from peft_dist.loading.pending import InMemory, Pending
from peft_dist.loading.skeleton import quantised_weights
from peft_dist.loading.stored import chunks
from peft_dist.packed import NESTED_BLOCK

bitsandbytes = lazy("bitsandbytes")

_STATE = ".quant_state.bitsandbytes__"
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Codes(Pending):
    """A quantised weight (out, in); as a tensor it has the numbers that its codes stand for.

    Attributes:
        parts: the codes and statistics by the names that they have as parameters of a layer
            (`packed.make_partitionable`), unread. stands_for: the dtype that they are dequantised to.
    """

    def __init__(self, shape: tuple[int, ...], stands_for: torch.dtype, parts: dict[str, Pending]) -> None:
        super().__init__(shape, stands_for)
        self.stands_for, self.parts = stands_for, parts

    def tell_levels(self, layer: Any) -> None:
        """Has a partitionable layer read its codes by the levels that the file says, where they are others than
        bitsandbytes' of now."""

    def to(self, *args: Any, **kwargs: Any) -> Pending:
        """The same codes; what is read of it as numbers comes in another dtype."""
        asked = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.dtype)]
        made = copy.copy(self)
        made.dtype = asked[0] if asked else self.dtype
        return made

    def t(self) -> Pending:
        """The other way round. A column of codes is no column of blocks, so each part takes the whole."""
        return _Turned(self)

    def _fill(self, start: int, out: Tensor) -> None:
        step = self._step()
        first, stop = start // step * step, start + out.numel()
        for low, high in chunks(first, stop, 4, step=step):
            numbers = self._numbers(low, min(-(-high // step) * step, self.numel()))
            begin = max(start, low)
            out[begin - start : high - start] = numbers[begin - low : high - low]

    def _step(self) -> int:
        """How many numbers are dequantised together."""
        raise NotImplementedError

    def _numbers(self, low: int, high: int) -> Tensor:
        """The numbers [low, high), both multiples of a step, or the end."""
        raise NotImplementedError


class _Turned(Pending):
    def __init__(self, of: Codes) -> None:
        super().__init__(reversed(of.shape), of.dtype)
        self.of = of

    def _fill(self, start: int, out: Tensor) -> None:
        out.copy_(self.of.whole().T.reshape(-1)[start : start + out.numel()])


class Codes8bit(Codes):
    """int8 codes (out, in), and of each row the largest number."""

    def __init__(self, codes: Pending, scales: Pending) -> None:
        super().__init__(tuple(codes.shape), torch.float32, {"weight": codes, "SCB": scales})

    def _step(self) -> int:
        return self.shape[1]

    def _numbers(self, low: int, high: int) -> Tensor:
        width = self.shape[1]
        codes = self.parts["weight"].part(low, high).view(-1, width)
        scales = self.parts["SCB"].part(low // width, high // width)
        return bitsandbytes.functional.int8_vectorwise_dequant(codes, scales).view(-1)


class Codes4bit(Codes):
    """Packed 4-bit codes, and of each block its largest number, quantised once more or not.

    Attributes:
        block, quant_type: as bitsandbytes' QuantState has them. levels (16,): what the codes stand for, as
            shares of the largest; nested_levels (256,): the same for codes of statistics, or None.
    """

    def __init__(
        self, parts: dict[str, Pending], facts: Mapping[str, Any], levels: Tensor, nested: Tensor | None
    ) -> None:
        super().__init__(tuple(facts["shape"]), _FLOATS[facts["dtype"]], parts)
        self.block, self.quant_type = int(facts["blocksize"]), str(facts["quant_type"])
        self.levels, self.nested_levels = levels, nested

    def tell_levels(self, layer: Any) -> None:
        """See `Codes`."""
        state = layer.weight.quant_state
        for where, own in ((state, self.levels), (state.state2, self.nested_levels)):
            if own is not None and not torch.equal(where.code.cpu(), own):
                where.code = own.to(where.code.device)

    def state(self, parts: Mapping[str, Tensor], shape: Any) -> Any:
        """bitsandbytes' QuantState of the whole weight, or a part of it, with statistics that were read."""
        functional, device = bitsandbytes.functional, parts["absmax"].device
        outer = None
        if self.nested_levels is not None:
            outer = functional.QuantState(
                absmax=parts["nested_absmax"],
                code=self.nested_levels.to(device),
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        return functional.QuantState(
            absmax=parts["absmax"],
            shape=torch.Size(shape),
            code=self.levels.to(device),
            blocksize=self.block,
            quant_type=self.quant_type,
            dtype=self.stands_for,
            offset=None if outer is None else parts["nested_offset"].reshape(()),
            state2=outer,
        )

    def _step(self) -> int:
        if self.shape[-1] % self.block:
            # On CPUs bitsandbytes gives other numbers for rows that blocks do not fill, by the shape that it is told.
            return self.numel()
        return self.block * (NESTED_BLOCK if self.nested_levels is not None else 1)

    def _numbers(self, low: int, high: int) -> Tensor:
        size = 2 * self.parts["weight"].dtype.itemsize
        blocks = (low // self.block, -(-high // self.block))
        read = {"absmax": self.parts["absmax"].part(*blocks)}
        if self.nested_levels is not None:
            outer = (blocks[0] // NESTED_BLOCK, -(-blocks[1] // NESTED_BLOCK))
            read["nested_absmax"] = self.parts["nested_absmax"].part(*outer)
            read["nested_offset"] = self.parts["nested_offset"].whole()
        codes = self.parts["weight"].part(low // size, -(-high // size)).view(-1, 1)
        is_whole = high - low == self.numel()
        state = self.state(read, self.shape if is_whole else (1, high - low))
        return bitsandbytes.functional.dequantize_4bit(codes, state).view(-1)


def with_codes(tensors: Mapping[str, Any]) -> dict[str, Pending]:
    """A checkpoint's tensors, those of a quantised weight as one, under the weight's key.

    Raises:
        BaseModelError: codes lack their statistics, or both do not fit.
    """
    found: dict[str, Pending] = dict(tensors)
    for key in tensors:
        weight, is_state, quant_type = key.partition(_STATE)
        if is_state:
            found[weight] = _four_bit(weight, tensors, key, quant_type)
            for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
                found.pop(f"{weight}.{part}", None)
            del found[key]
    for key, stored in tensors.items():
        layer, _, leaf = key.rpartition(".")
        if leaf == "weight" and stored.dtype == torch.int8:
            found[key] = _eight_bit(key, layer, tensors)
            for other in (f"{layer}.SCB", f"{layer}.weight_format"):
                found.pop(other, None)
    return found


def as_stored(model: Any, keys: Keys) -> dict[str, torch.dtype]:
    """Prepares the empty quantised layers whose codes are stored for what the files hold: their blocks, and whether
    statistics are quantised once more.

    Returns:
        the dtype that each 4-bit weight stands for, by its name.
    """
    found = {}
    layers = quantised_weights(model)
    for group in keys.groups:
        codes = group.only_source
        if isinstance(codes, Codes4bit) and (layer := layers.get(group.first)) is not None:
            weight: Any = layer.weight
            weight.blocksize, weight.quant_type = codes.block, codes.quant_type
            weight.compress_statistics = codes.nested_levels is not None
            weight.quant_storage = codes.parts["weight"].dtype
            found[group.first] = codes.stands_for
    return found


def _eight_bit(key: str, layer: str, tensors: Mapping[str, Any]) -> Codes8bit:
    codes, scales = tensors[key], tensors.get(f"{layer}.SCB")
    if scales is None:
        raise _damaged(key, f"lacks {layer}.SCB, the scale of each row")
    layout = tensors.get(f"{layer}.weight_format")
    if layout is not None and int(layout.whole()) != 0:
        raise BaseModelError(
            f"base model: the codes of {key!r} are laid out for one kind of GPU ({layer}.weight_format is "
            f"{int(layout.whole())}, and not 0). Load it with the bitsandbytes that saved it, and save it with 0.45 "
            "or later."
        )
    if codes.dim() != 2 or scales.numel() != codes.shape[0]:
        raise _damaged(key, f"is {list(codes.shape)}, and has {scales.numel()} scales of rows")
    return Codes8bit(codes, scales.reshape(-1).to(torch.float32))


def _four_bit(weight: str, tensors: Mapping[str, Any], state: str, quant_type: str) -> Codes4bit:
    try:
        facts = json.loads(bytes(tensors[state].whole().tolist()))
        facts.setdefault("quant_type", quant_type)
        codes, absmax = tensors[weight], tensors[f"{weight}.absmax"]
        levels = tensors[f"{weight}.quant_map"].whole()
        parts: dict[str, Pending] = {"weight": codes, "absmax": absmax}
        nested, values = None, math.prod(facts["shape"])
        blocks = -(-values // facts["blocksize"])
        if f"{weight}.nested_absmax" in tensors:
            nested = tensors[f"{weight}.nested_quant_map"].whole()
            parts["nested_absmax"] = tensors[f"{weight}.nested_absmax"]
            parts["nested_offset"] = InMemory(torch.tensor([float(facts["nested_offset"])]))
            if facts["nested_blocksize"] != NESTED_BLOCK:
                raise _damaged(
                    weight, f"has nested blocks of {facts['nested_blocksize']}, not {NESTED_BLOCK}"
                )
            if parts["nested_absmax"].numel() != -(-blocks // NESTED_BLOCK):
                raise _damaged(
                    weight, f"has {parts['nested_absmax'].numel()} nested scales for {blocks} blocks"
                )
        made = Codes4bit(parts, facts, levels, nested)
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(weight, f"lacks what belongs to its codes ({error})") from error
    size, bytes_needed = codes.dtype.itemsize, (values + 1) // 2
    if codes.numel() * size != -(-bytes_needed // size) * size or absmax.numel() != blocks:
        raise _damaged(
            weight,
            f"has {codes.numel() * size} bytes of codes and {absmax.numel()} scales, its shape {facts['shape']} "
            f"takes {bytes_needed} and {blocks}",
        )
    return made


def _damaged(key: str, what: str) -> BaseModelError:
    return BaseModelError(
        f"base model: the quantised weight {key!r} {what}. Its files belong to several models, or are incomplete: copy "
        "all of them again."
    )
