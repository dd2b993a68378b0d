"""Named initialisers: each fills a tensor in place, and can be pickled with the model that holds it. Imports torch when
first called."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
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
    return gauss(1 / r)


def kaiming_uniform(t: Tensor) -> Tensor:
    """Kaiming uniform with a = sqrt(5), which is torch's own start of a linear layer."""
    return torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def inherit(t: Tensor) -> Tensor:
    """Nothing: `start_from_base` fills it."""
    return t


def constant(value: float):
    """All `value`."""
    return functools.partial(_constant, value=value)


def _constant(t: Tensor, value: float) -> Tensor:
    return t.fill_(value)


def uniform(bound: float):
    """Uniform between minus `bound` and `bound`."""
    return functools.partial(_uniform, bound=bound)


def _uniform(t: Tensor, bound: float) -> Tensor:
    return t.uniform_(-bound, bound)


def gauss(std: float, mean: float = 0.0):
    """Normal with this standard deviation and mean."""
    return functools.partial(_gauss, mean=mean, std=std)


def _gauss(t: Tensor, mean: float, std: float) -> Tensor:
    return t.normal_(mean, std)


def given(values: Sequence[int]):
    """These numbers."""
    return functools.partial(_given, values=tuple(values))


def _given(t: Tensor, values: Sequence[int]) -> Tensor:
    return t.copy_(torch.tensor(values))


def transposed(start: Callable[[Tensor], object]):
    """Matrices (..., columns, rows), each of which `start` fills as (rows, columns)."""
    return functools.partial(_transposed, start=start)


def _transposed(t: Tensor, start: Callable[[Tensor], object]) -> Tensor:
    for matrix in t.flatten(0, -3):
        one = torch.empty_like(matrix.mT, memory_format=torch.contiguous_format)
        start(one)
        matrix.copy_(one.mT)
    return t


def some_places(size: int, n: int, seed: int | None):
    """`places` of these."""
    return functools.partial(_some_places, size=size, n=n, seed=seed)


def _some_places(t: Tensor, size: int, n: int, seed: int | None) -> Tensor:
    return t.copy_(places(size, n, seed))


@functools.lru_cache(maxsize=64)
def places(size: int, n: int, seed: int | None) -> Tensor:
    """n different numbers below `size` (n,) int64, in the order that HF PEFT draws them; None is a seed too, that
    of a new generator. Layers of one size share theirs, since a permutation of a large one takes its time."""
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:n].clone()
