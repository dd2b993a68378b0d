"""The loop of `lane_loop.cpp`: y += w (x A^T) B, each position with the lanes that serve it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_dist.compiled.library import function

# The loops, by the numbers that they add up.
_NAMES = {torch.float32: "add_float32", torch.bfloat16: "add_bfloat16"}
# Positions up to which one thread's loop is cheaper than a library's products, which share more of them out over
# theirs; and how many are cheaper whatever there are of threads.
_MOST, _LEAST = 256, 16
# What the loop takes of ranks, multiples of what, and the numbers of a vector.
_MOST_RANKS, _RANKS, _VECTOR = 256, 4, 16


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


def suits_rows(x: Tensor) -> bool:
    """As `suits`, for rows x (rows, ..., in) of which each is one adapter's: a library's batched products pay less for
    each of so many positions in half precision alone."""
    if x.device.type != "cpu" or x.dtype not in _NAMES or torch.get_num_threads() > 1:
        return False
    is_few = x.dtype == torch.float32 or x.shape[:-1].numel() <= _MOST
    return is_few and x.dtype in _loops()


@functools.lru_cache(maxsize=64)
def served_by_row(lanes: tuple[int, ...], weights: tuple[float, ...], num_positions: int) -> Served:
    """Each row of a batch by a lane, the rows of a lane next to one another."""
    length = num_positions // len(lanes)
    order = sorted(range(len(lanes)), key=lambda row: lanes[row])
    return Served(
        [(row * length, (row + 1) * length) for row in order], [[(lanes[row], weights[row])] for row in order]
    )


def takes(A: Tensor, B: Tensor, x: Tensor) -> bool:
    """Whether the loop runs over these tensors as they are, for A (lanes, rank, in) and B (lanes, out, rank)."""
    rank = A.shape[1]
    if rank % _RANKS or rank > _MOST_RANKS or not A.dtype == B.dtype == x.dtype:
        return False
    return A.is_contiguous() and B.is_contiguous() and x.is_contiguous()


def add(
    A: Tensor,
    B: Tensor,
    sizes: tuple[int, int, int],
    served: Served,
    x: Tensor,
    y: Tensor,
    across: bool = False,
) -> None:
    """Adds to y (positions, out), in place, what lanes A (lanes, rank, in) and B (lanes, rank, out) of the sizes
    (in, out, rank) make of x (positions, in). All are contiguous and of one dtype; the ranks of a position's lanes are
    at most 256 together, each a multiple of 4. `across`: B is (lanes, out, rank), and one lane serves a position; those
    that one lane serves cost least next to one another in `served`."""
    _, out, rank = sizes
    turned = x.new_empty(rank * (out + _VECTOR), dtype=torch.float32) if across else None
    addresses = (t.data_ptr() for t in (x, A, B, y))
    _loops()[x.dtype](*addresses, *sizes, *served.arguments, None if turned is None else turned.data_ptr())


@functools.cache
def _loops() -> dict[torch.dtype, Any]:
    """By what they add up; none where there is no compiler."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    arguments = [*[pointer] * 4, *[size] * 3, pointer, size, pointer, pointer, pointer]
    loops = {dtype: function("lane_loop", name, *arguments) for dtype, name in _NAMES.items()}
    return {dtype: loop for dtype, loop in loops.items() if loop is not None}
