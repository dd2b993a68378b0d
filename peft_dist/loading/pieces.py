"""A base's values for ZeRO-3: of each tensor the slice that a rank keeps, read from its part of the files.

Each parameter is cut flat into as many pieces as there are ranks, codes and statistics of a quantised layer each on
their own, so the two meet at different borders: rows and blocks are read until both are covered. Statistics that are
quantised once more need all of a layer's, which the ranks gather, a 64th of a layer, and let go of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist import packed
from peft_dist.errors import BaseModelError
from peft_dist.loading.codes import Codes, as_stored
from peft_dist.loading.filling import Places, as_matrix, move_started
from peft_dist.loading.keys import Group, Keys
from peft_dist.loading.pending import Pending
from peft_dist.loading.quantising import four_bit_blocks, int8_rows, nested
from peft_dist.loading.skeleton import quantised_weights
from peft_dist.packed import BLOCK
from peft_dist.ranks import Ranks
from peft_dist.sharding import partition_base


def fill_pieces(
    model: nn.Module,
    base: Any,
    keys: Keys,
    config: Mapping[str, Any],
    ranks: Ranks,
    dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[Group], None],
) -> None:
    """Partitions the base over the ranks, each reading its own slices.

    Args:
        model: the base, or what has adapters on it. base: as its bare layers.
        dtype: that quantised weights count as.
        device: where pieces come to.
    """
    stored = as_stored(base, keys)
    for name, layer in quantised_weights(base).items():
        packed.make_partitionable(layer, dtype=stored.get(name, dtype))
    move_started(base, device)
    pieces = _Pieces(base, keys, ranks, device, advance)
    pieces.read_buffers(base)
    partition_base(model, config, pieces=pieces)
    with ranks.failing_together():
        if pieces.failure is not None:
            raise pieces.failure


class _Pieces:
    """Gives this rank's piece of each parameter; after a failure zeros, so that every rank goes on to the end."""

    def __init__(
        self,
        base: nn.Module,
        keys: Keys,
        ranks: Ranks,
        device: torch.device,
        advance: Callable[[Group], None],
    ) -> None:
        places, quantised = Places(base), quantised_weights(base)
        self.ranks, self.device, self.advance = ranks, device, advance
        self.failure: Exception | None = None
        self._groups = {id(places[name]): (group, name) for group in keys.groups for name in group.targets}
        self._layers: dict[int, tuple[Any, Any]] = {}
        for name, layer in quantised.items():
            for parameter in (layer.weight, *packed.statistics(layer).values()):
                self._layers[id(parameter)] = (layer, self._groups.get(id(places[name])))
        self._outline, self._ready = keys.outline, dict[int, Tensor]()
        self._values: tuple[Group | None, dict[str, Pending]] = (None, {})

    @torch.no_grad()
    def __call__(self, name: str, parameter: Any) -> Tensor:
        if id(parameter) in self._layers and id(parameter) not in self._ready:
            self._quantise(*self._layers[id(parameter)])
        if id(parameter) in self._ready:
            return self._ready.pop(id(parameter))
        start, stop = self.ranks.bounds(parameter.numel())
        out = torch.empty(stop - start, dtype=parameter.dtype, device=self.device)
        group, target = self._groups[id(parameter)]
        self._try(lambda: self._value(group, target).read(start, out))
        self.advance(group)
        return out

    @torch.no_grad()
    def read_buffers(self, base: nn.Module) -> None:
        """Reads the buffers that the files hold whole: small, and on every rank, since an engine partitions none."""
        places = Places(base)
        for name, buffer in base.named_buffers():
            if id(buffer) not in self._groups:
                continue
            group, target = self._groups[id(buffer)]
            out = torch.empty(buffer.shape, dtype=buffer.dtype, device=self.device)
            self._try(functools.partial(self._read_whole, group, target, out))
            places.put(name, out)
            self.advance(group)

    def _read_whole(self, group: Group, target: str, out: Tensor) -> None:
        self._value(group, target).read(0, out.view(-1))

    def _value(self, group: Group, target: str) -> Pending:
        # What one conversion gives is asked for one after the other.
        if self._values[0] is not group:
            self._values = (group, group.converted(self._outline))
        return self._values[1][target]

    def _try(self, read: Callable[[], Any]) -> Any:
        if self.failure is not None:
            return None
        try:
            return read()
        except (BaseModelError, RuntimeError, ValueError, OSError, MemoryError) as error:
            self.failure = error
            return None

    def _quantise(self, layer: Any, found: tuple[Group, str]) -> None:
        group, name = found

        def value() -> Pending:
            return as_matrix(self._value(group, name), layer)

        if isinstance(group.only_source, Codes):
            self._stored(layer, group.only_source)
        elif packed.is_4bit(type(layer)):
            self._four_bit(layer, value)
        else:
            self._int8(layer, value)
        self.advance(group)

    def _stored(self, layer: Any, codes: Codes) -> None:
        codes.tell_levels(layer)
        for key, parameter in {"weight": layer.weight, **packed.statistics(layer)}.items():
            start, stop = self.ranks.bounds(parameter.numel())
            mine = torch.empty(stop - start, dtype=parameter.dtype, device=self.device)
            self._try(functools.partial(codes.parts[key].read, start, mine))
            self._ready[id(parameter)] = mine

    def _int8(self, layer: Any, value: Callable[[], Pending]) -> None:
        rows, width = layer.weight.shape
        start, stop = self.ranks.bounds(rows * width)
        first, last = self.ranks.bounds(rows)
        low, high = _covering((start // width, -(-stop // width)), (first, last))
        codes = torch.zeros(stop - start, dtype=torch.int8, device=self.device)
        scales = torch.zeros(last - first, dtype=torch.float32, device=self.device)
        made = self._try(lambda: int8_rows(value(), low, high, self.device))
        if made is not None:
            codes.copy_(made[0].view(-1)[start - low * width : stop - low * width])
            scales.copy_(made[1][first - low : last - low])
        self._ready[id(layer.weight)] = codes
        self._ready[id(layer.SCB)] = scales

    def _four_bit(self, layer: Any, value: Callable[[], Pending]) -> None:
        weight, state = layer.weight, layer.weight.quant_state
        blocks = -(-state.shape.numel() // BLOCK)
        half = weight.dtype.itemsize
        start, stop = (bound * half for bound in self.ranks.bounds(weight.numel()))
        first, last = self.ranks.bounds(blocks)
        per_block = BLOCK // 2
        low, high = _covering((start // per_block, -(-stop // per_block)), (first, last))
        codes = torch.zeros(stop - start, dtype=torch.uint8, device=self.device)
        scales = torch.zeros(last - first, dtype=torch.float32, device=self.device)
        made = self._try(lambda: four_bit_blocks(value(), low, high, state.quant_type, self.device))
        if made is not None:
            codes.copy_(made[0][start - low * per_block : stop - low * per_block])
            scales.copy_(made[1][first - low : last - low])
        self._ready[id(weight)] = codes.view(weight.dtype)
        statistics = {"absmax": scales}
        if "nested_absmax" in packed.statistics(layer):
            inner, outer, offset = nested(self.ranks.gathered(scales, blocks))
            statistics = {"absmax": inner, "nested_absmax": outer.absmax, "nested_offset": offset.view(1)}
            statistics = {key: self._mine(tensor) for key, tensor in statistics.items()}
        for key, parameter in packed.statistics(layer).items():
            self._ready[id(parameter)] = statistics[key]

    def _mine(self, whole: Tensor) -> Tensor:
        start, stop = self.ranks.bounds(whole.numel())
        return whole[start:stop].clone()


def _covering(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The range that holds both, where an empty one needs nothing."""
    ranges = [both for both in (one, other) if both[0] < both[1]]
    if not ranges:
        return 0, 0
    return min(low for low, _ in ranges), max(high for _, high in ranges)
