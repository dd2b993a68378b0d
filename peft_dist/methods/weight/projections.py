"""Pairs of random matrices that follow from a key alone, drawn as HF PEFT draws them: the same tensors, so that
a checkpoint without them means the same in both libraries. On the CPU, wherever the base is.

Each function returns what makes a start of the first (0) or the second (1) of its pair.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from peft_dist.errors import CheckpointError, ConfigError
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")

Starts: TypeAlias = "Callable[[int], Callable[[Tensor], Tensor]]"


def kaiming(key: int, first: tuple[int, int], second: tuple[int, int]) -> Starts:
    """Two matrices of these shapes, Kaiming uniform by their columns: VeRA's."""
    return _starts(key, functools.partial(_kaiming, shapes=(first, second)))


def _kaiming(generator: Any, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    bounds = (math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1])) for shape in shapes)
    return [
        torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for shape, bound in zip(shapes, bounds, strict=True)
    ]


def normalised(key: int, r: int, smaller: int, larger: int, num: int) -> Starts:
    """(r, 1, smaller) and (larger, num, r), uniform, over their standard deviations: RandLoRA's. Drawn and
    divided in bf16."""
    return _starts(key, functools.partial(_normalised, first=(r, 1, smaller), second=(larger, 1, r), num=num))


def _normalised(generator: Any, first: tuple[int, ...], second: tuple[int, ...], num: int) -> list[Tensor]:
    drawn = _uniform(generator, first), torch.cat([_uniform(generator, second) for _ in range(num)], dim=1)
    return [t / t.std() for t in drawn]


def _uniform(generator: Any, shape: tuple[int, ...]) -> Tensor:
    t = torch.empty(shape, dtype=torch.bfloat16)
    return torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)


def ternary(key: int, r: int, smaller: int, larger: int, num: int, sparsity: float) -> Starts:
    """The same shapes of -1, 0 and 1, of which a share 1 / sparsity is not 0, over their standard deviations:
    RandLoRA's sparse ones (Li et al. 2006, very sparse random projections)."""
    shapes = ((r, 1, smaller), (larger, num, r))
    return _starts(key, functools.partial(_ternary, shapes=shapes, tail=1 / (2 * sparsity)))


def _ternary(generator: Any, shapes: Sequence[tuple[int, ...]], tail: float) -> list[Tensor]:
    drawn = [torch.rand(shape, generator=generator) for shape in shapes]
    signs = [(t > 1 - tail).float() - (t < tail).float() for t in drawn]
    return [t / t.std() for t in signs]


def warn_unsaved(config: Any, names: str) -> None:
    """Says what it means that a config does not save its projections."""
    if not config.save_projection:
        warnings.warn(
            f"{type(config).__name__}.save_projection is False: {names} are not in checkpoints and are drawn "
            f"again from projection_prng_key={config.projection_prng_key}, which another machine or version of "
            "torch may do differently. Consider save_projection=True.",
            stacklevel=4,
        )


def check_beside(config: Any, others: Sequence[Any]) -> None:
    """Refuses another key, or another choice of what is saved, than that of adapters of the same method: HF PEFT
    does, and its users' checkpoints rely on one pair of projections to a model."""
    for name in ("projection_prng_key", "save_projection"):
        for other in others:
            if getattr(other, name) != getattr(config, name):
                raise ConfigError(
                    f"{type(config).__name__}.{name}: {getattr(config, name)!r}; it must be the same for all "
                    f"adapters of a model, and one that is there has {getattr(other, name)!r}."
                )


def check_saved(config: Any, saved: Mapping[str, Tensor], keys: tuple[str, str]) -> Mapping[str, Tensor]:
    """What is saved of the projections, where the config says whether they are.

    Raises:
        CheckpointError: they are absent but should be there.
    """
    absent = [key for key in keys if key not in saved]
    if config.save_projection and absent:
        raise CheckpointError(
            f"the checkpoint lacks {absent[0]!r}, though its config has save_projection=True. Use the whole "
            "checkpoint, or set save_projection to False to draw it again from projection_prng_key."
        )
    if not config.save_projection and len(absent) < len(keys):
        warnings.warn(
            f"the checkpoint holds {keys[0]!r}, but its config has save_projection=False: it is drawn again from "
            "projection_prng_key. Set save_projection=True to use what is there.",
            stacklevel=4,
        )
        return {key: t for key, t in saved.items() if key not in keys}
    return saved


def _starts(key: int, draw: Callable[[Any], list[Tensor]]) -> Starts:
    return functools.partial(_start, key, draw)


def _start(key: int, draw: Callable[[Any], list[Tensor]], which: int) -> Callable[[Tensor], Tensor]:
    return functools.partial(_fill, key=key, draw=draw, which=which)


def _fill(t: Tensor, key: int, draw: Callable[[Any], list[Tensor]], which: int) -> Tensor:
    return t.copy_(draw(torch.Generator(device="cpu").manual_seed(key))[which])
