"""Whether a base keeps sequences apart that share a row: tried on it before it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orchestrator.errors import ModelError
from peft_dist.bins import bins_of

_TOKENS = 12
"""Of each sequence that is tried."""


@torch.no_grad()
def check_apart(base: nn.Module, rows: Sequence[Sequence[int]], device: str) -> None:
    """Runs two sequences side by side and each by itself; a collective where the base is sharded.

    Args:
        base: bare, on its device. rows: token ids of some of the job's rows.

    Raises:
        ModelError: what the second one gives depends on the first.
    """
    first, second = _two(rows)
    bins = bins_of([[len(first), len(second)]])
    training = base.training
    base.eval()
    try:
        alone = _logits(base, second, torch.arange(len(second)), device)
        beside = _logits(base, first + second, bins.positions()[0], device)[-len(second) :]
        after = _logits(base, first + second, torch.arange(len(first + second)), device)[-len(second) :]
    finally:
        base.train(training)
    noise, reach = float((beside - alone).abs().max()), float((after - alone).abs().max())
    if not noise <= _rounding(base, reach, float(alone.abs().max())):
        raise ModelError(
            f"{type(base).__name__} lets sequences that share a row see each other: its outputs change by "
            f"{noise:.2g}, where the row before it changes them by {reach:.2g}.",
            where="data.sample_packing",
            hint="Set it to false for this base.",
        )


def _rounding(base: nn.Module, reach: float, largest: float) -> float:
    """What sums in another order may change of logits up to `largest`; in low precision also a part of what the
    sequence before does to them, which is then of the same size."""
    dtype: torch.dtype = base.dtype  # type: ignore[assignment]
    if getattr(
        base, "is_quantized", False
    ):  # which columns are kept in full depends on all rows of a product
        return max(reach / 5, 8 * torch.finfo(torch.bfloat16).eps * largest)
    if dtype == torch.float32:
        return 32 * torch.finfo(dtype).eps * largest
    return max(reach / 20, 2 * torch.finfo(dtype).eps * largest)


def _two(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The beginnings of the first row and of one that begins otherwise; of the same one where there is none."""
    first = list(rows[0][:_TOKENS])
    other = next((list(row[:_TOKENS]) for row in rows[1:] if list(row[:_TOKENS]) != first), first[::-1])
    return first, other


def _logits(base: nn.Module, ids: list[int], positions: Tensor, device: str) -> Tensor:
    given = torch.tensor([ids], device=device)
    places = positions[None].to(device)
    return base(input_ids=given, position_ids=places, use_cache=False).logits[0]
