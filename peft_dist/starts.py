"""Named initialisers: each fills a tensor in place. Imports torch when first called."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


def zeros(t: Tensor) -> Tensor:
    """All zeros."""
    return t.zero_()


def ones(t: Tensor) -> Tensor:
    """All ones."""
    return t.fill_(1.0)


def normal(t: Tensor) -> Tensor:
    """The standard normal distribution."""
    return t.normal_()


def gaussian(r: int):
    """Normal with standard deviation 1/r, as LoRA's `gaussian` start has it."""
    return lambda t: t.normal_(std=1 / r)


def kaiming_uniform(t: Tensor) -> Tensor:
    """Kaiming uniform with a = sqrt(5), which is torch's own start of a linear layer."""
    return torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def inherit(t: Tensor) -> Tensor:
    """Nothing: `start_from_base` fills it."""
    return t


def constant(value: float):
    """All `value`."""
    return lambda t: t.fill_(value)


def uniform(bound: float):
    """Uniform between minus `bound` and `bound`."""
    return lambda t: t.uniform_(-bound, bound)


def gauss(std: float):
    """Normal with this standard deviation."""
    return lambda t: t.normal_(std=std)


def transposed(start: Callable[[Tensor], object]):
    """Matrices (..., columns, rows), each of which `start` fills as (rows, columns)."""

    def fill(t: Tensor) -> Tensor:
        for matrix in t.flatten(0, -3):
            one = torch.empty_like(matrix.mT, memory_format=torch.contiguous_format)
            start(one)
            matrix.copy_(one.mT)
        return t

    return fill


@functools.lru_cache(maxsize=64)
def places(size: int, n: int, seed: int | None) -> Tensor:
    """n different numbers below `size` (n,) int64, in the order that HF PEFT draws them; None is a seed too, that
    of a new generator. Layers of one size share theirs, since a permutation of a large one takes its time."""
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:n].clone()
