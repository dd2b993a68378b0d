"""The loop of `scaled_loop.cpp`: a gradient through a scale and the scale's own, in one pass."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from peft_dist.compiled.library import function


def suits(*tensors: Tensor) -> bool:
    """Whether the loop takes these tensors, and nothing is cheaper: several threads share a library's passes."""
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and torch.get_num_threads() == 1
        and _loop() is not None
    )


def scale(g: Tensor, y: Tensor, by: Tensor, given: Tensor) -> Tensor:
    """Puts g * by into the contiguous `given`, which may be g, for g and y (rows, columns) and by (columns,); gives the
    sum over rows of g * y."""
    g, y, by = g.contiguous(), y.contiguous(), by.contiguous()
    sums = torch.empty_like(by)
    addresses = (t.data_ptr() for t in (g, y, by, given, sums))
    _loop()(*addresses, *g.shape)  # type: ignore[misc]
    return sums


@functools.cache
def _loop() -> Any | None:
    return function("scaled_loop", "scale_float32", *[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 2)
