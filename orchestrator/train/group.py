"""The workers of one run as a group: small collectives that are no-ops for a single process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Group:
    """Rank, size and the few collectives of the loop, over the default process group where there is one.

    Numbers travel as float64 on `device` (nccl takes no CPU tensors); integers up to 2**53 are exact.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.is_distributed else 0
        self.size = dist.get_world_size() if self.is_distributed else 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes and reports."""
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Each rank's `values`, by rank; all ranks give equally many."""
        if self.size == 1:
            return [list(map(float, values))]
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return [one.tolist() for one in everyone]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum over ranks, entry by entry."""
        if self.size == 1:
            return list(map(float, values))
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather_plain(self, value: Any) -> list[Any]:
        """Each rank's plain value, by rank: strings, numbers, lists of them."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone

    def gather_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Each rank's (n, ...) tensor, by rank; n may differ, the rest may not."""
        if self.size == 1:
            return [rows]
        counts = [int(count) for (count,) in self.gather([len(rows)])]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyone, padded.contiguous())
        return [one[:count] for one, count in zip(everyone, counts, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks get the same answer."""
        return self.sum([float(flag)])[0] > 0

    def first(self, value: float) -> float:
        """Rank 0's number, on every rank."""
        return self.gather([value])[0][0]
