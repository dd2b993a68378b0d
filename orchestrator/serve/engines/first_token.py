"""The first token of an adapter, before it serves: it must run, and give numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_dist.errors import RowsError
from peft_dist.packed_rows import PackedRows, Reads
from peft_dist.pauses import pausing
from peft_dist.rows import BASE

from .apart import ApartLane
from .continuous import Packed, Part
from .engine import AdapterRefused
from .packed_base import PackedBase


def runs_apart(
    base: PackedBase, lane: ApartLane, adapter: str, virtual: int, reads: Reads, *, is_apart: bool
) -> bool:
    """Runs a token of an adapter that was put on the base, without the cache.

    Args:
        adapter: its name on the base. virtual: tokens that it puts before a prompt.
        reads: what its methods read of a sequence.
        is_apart: whether no packed row is to be tried.

    Returns:
        Whether no packed row can hold its sequences beside others': theirs cannot be told from its own.

    Raises:
        AdapterRefused: what comes of it are no numbers.
        Exception: whatever the base raises with it.
    """
    with torch.inference_mode():
        if not is_apart:
            try:
                logits = _beside_base(base, adapter, virtual, reads)
            except RowsError:
                if virtual:
                    raise
                is_apart = True
        if is_apart:
            with pausing(at_once):
                logits = lane.try_one(adapter, reads, base.outputs)
    if not torch.isfinite(logits).all():
        raise AdapterRefused("what the base gives with it are numbers that are not finite.")
    return is_apart


def at_once() -> None:
    """Stops nowhere."""


def _beside_base(base: PackedBase, adapter: str, virtual: int, reads: Reads) -> Tensor:
    """The scores of a row of the base and the adapter."""
    parts = (Part("base", 0, 1, True), Part("adapter", 0, virtual + 1, True))
    rows = PackedRows(
        adapters=(BASE, adapter),
        lengths=(1, virtual + 1),
        reads=((), reads),
        kept=(0, 1),
        alone=base.deterministic,
    )
    at = torch.tensor([[0, *range(virtual + 1)]], device=base.device)
    inputs = {
        "input_ids": torch.zeros_like(at),
        "position_ids": at,
        "logits_to_keep": torch.tensor([0, virtual + 1], device=at.device),
        "use_cache": False,
        "packed": Packed(parts),
    }
    return base.scores(rows, inputs)
