"""Ways to put several tensors of one shape together: task arithmetic (arXiv:2212.04089), TIES (arXiv:2306.01708),
DARE (arXiv:2311.03099). Names and arguments are those of HF PEFT's `peft.utils.merge_utils`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from peft_dist.errors import ConfigError


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """`weights` (k,) as it broadcasts over `task_tensors` (k, ...)."""
    return weights.view(*weights.shape, *(1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The share `density` of entries that are largest; the others zero."""
    kept = torch.zeros_like(tensor).flatten()
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view_as(tensor)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Each entry with probability `density`, divided by it where `rescale`; the others zero."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def prune(
    tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> Tensor:
    """The entries that `method` leaves.

    Raises:
        ConfigError: a negative density, or no such method.
    """
    if density >= 1:
        warnings.warn(f"density {density}: nothing is pruned at 1 or above.", stacklevel=2)
        return tensor
    if density < 0:
        raise ConfigError(f"density: {density!r}; it lies in [0, 1].")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale)
    raise ConfigError(f"prune: method {method!r} is not one of magnitude, random.")


def calculate_majority_sign_mask(tensor: Tensor, method: Literal["total", "frequency"] = "total") -> Tensor:
    """Where an entry of `tensor` (k, ...) has the sign that prevails among the k: by their sum, or by number.

    Raises:
        ConfigError: no such method.
    """
    if method not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method: {method!r} is not one of total, frequency.")
    sign = tensor.sign()
    votes = (tensor if method == "total" else sign).sum(0)
    return sign == torch.where(votes >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean of the entries of (k, ...) that the mask keeps."""
    kept = (task_tensors * majority_sign_mask).sum(0)
    return kept / majority_sign_mask.sum(0).clamp(min=1.0)


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Their weighted sum."""
    stacked = torch.stack(list(task_tensors))
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of their largest entries."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of random entries, scaled so that its mean is that of all."""
    return task_arithmetic([prune(t, density, "random", rescale=True) for t in task_tensors], weights)


def ties(
    task_tensors: Sequence[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Tensor:
    """The weighted mean of those of their largest entries that agree with the prevailing sign."""
    return _agreeing([prune(t, density, "magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_ties(
    task_tensors: Sequence[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Tensor:
    """The weighted mean of those random entries, scaled, that agree with the prevailing sign."""
    pruned = [prune(t, density, "random", rescale=True) for t in task_tensors]
    return _agreeing(pruned, weights, majority_sign_method)


def _agreeing(tensors: list[Tensor], weights: Tensor, method: Literal["total", "frequency"]) -> Tensor:
    stacked = torch.stack(tensors)
    agrees = calculate_majority_sign_mask(stacked, method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), agrees)
