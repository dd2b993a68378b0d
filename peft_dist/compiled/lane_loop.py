"""The loop of `lane_loop.cpp`: y += w (x A^T) B, each position with the lanes that serve it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_dist.compiled.library import library

# The loops, by the numbers that they add up.
_NAMES = {torch.float32: "add_float32", torch.bfloat16: "add_bfloat16"}
# Positions up to which one thread's loop is cheaper than a library's products, which share more of them out over
# theirs; and how many are cheaper whatever there are of threads.
_MOST, _LEAST = 256, 16


class Served:
    """Which lanes serve which positions, as the loop reads it.

    Args:
        spans: (first position, the one behind the last), side by side in any order.
        lanes: for each span the lanes that serve it, each with its weight.
    """

    def __init__(
        self, spans: Sequence[tuple[int, int]], lanes: Sequence[Sequence[tuple[int, float]]]
    ) -> None:
        stretches: list[tuple[int, int, int, int]] = []
        own: list[tuple[int, float]] = []
        for span, here in zip(spans, lanes, strict=True):
            if here:
                stretches.append((*span, len(own), len(own) + len(here)))
                own += here
        kept = (
            torch.tensor(stretches, dtype=torch.int32, device="cpu"),
            torch.tensor([lane for lane, _ in own], dtype=torch.int32, device="cpu"),
            torch.tensor([weight for _, weight in own], dtype=torch.float32, device="cpu"),
        )
        self._kept = kept  # as long as their addresses
        self.arguments = kept[0].data_ptr(), len(stretches), kept[1].data_ptr(), kept[2].data_ptr()


def suits(num_positions: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a loop for so many positions, and nothing is cheaper."""
    if device.type != "cpu" or dtype not in _NAMES:
        return False
    return num_positions <= max(_LEAST, _MOST // torch.get_num_threads()) and dtype in _loops()


def add(A: Tensor, B: Tensor, sizes: tuple[int, int, int], served: Served, x: Tensor, y: Tensor) -> None:
    """Adds to y (positions, out), in place, what lanes A (lanes, rank, in) and B (lanes, rank, out) of the sizes
    (in, out, rank) make of x (positions, in). All are contiguous and of one dtype; the ranks of a position's lanes are
    at most 256 together, each a multiple of 4."""
    _loops()[x.dtype](x.data_ptr(), A.data_ptr(), B.data_ptr(), y.data_ptr(), *sizes, *served.arguments)


@functools.cache
def _loops() -> dict[torch.dtype, Any]:
    """By what they add up; none where there is no compiler."""
    compiled = library("lane_loop")
    if compiled is None:
        return {}
    loops = {dtype: getattr(compiled, name) for dtype, name in _NAMES.items()}
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for loop in loops.values():
        loop.argtypes, loop.restype = [*[pointer] * 4, *[size] * 3, pointer, size, pointer, pointer], None
    return loops
