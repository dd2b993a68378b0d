"""The loops of `block_loop.cpp`: products with square blocks that stand side by side in the columns of a matrix."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from peft_dist.compiled.library import function

_VECTOR, _WIDEST = 16, 256


def suits(b: int, *tensors: Tensor) -> bool:
    """Whether the loops take blocks of b rows in these tensors, and nothing is cheaper: of several threads each takes
    its share of a library's product."""
    return (
        b % _VECTOR == 0
        and b <= _WIDEST
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and torch.get_num_threads() == 1
        and _loops() is not None
    )


def turn(rows: Tensor, R: Tensor, to: Tensor, adds: bool = False) -> None:
    """Each row of `rows` (n, blocks * b) times diag(R), for R (blocks, b, b), into the contiguous `to`, or added to
    it."""
    rows, R = rows.contiguous(), R.contiguous()
    turn_them, _ = _loops()  # type: ignore[misc]
    turn_them(rows.data_ptr(), R.data_ptr(), to.data_ptr(), len(rows), len(R), R.shape[1], adds)


def cross(x: Tensor, g: Tensor, b: int) -> Tensor:
    """(blocks, b, b): the blocks on the diagonal of x^T g, for x and g (n, blocks * b)."""
    x, g = x.contiguous(), g.contiguous()
    to = x.new_empty(x.shape[1] // b, b, b)
    _, cross_them = _loops()  # type: ignore[misc]
    cross_them(x.data_ptr(), g.data_ptr(), to.data_ptr(), len(x), len(to), b)
    return to


@functools.cache
def _loops() -> tuple[Any, Any] | None:
    """None where there is no compiler."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    turn_them = function("block_loop", "turn_float32", *[pointer] * 3, *[size] * 4)
    cross_them = function("block_loop", "cross_float32", *[pointer] * 3, *[size] * 3)
    return None if turn_them is None or cross_them is None else (turn_them, cross_them)
