"""Ranks that do one thing together: what one of them meets, all hear of, so that none waits for one that is gone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peft_dist.sharding import piece_of


class Ranks:
    """The ranks that do a thing together, or this process alone.

    Args:
        refusal: makes the error of those that met none, of who met one ("rank 1 of 2") and what it said.
        alone: the other ranks, if there are any, do not take part.

    Attributes:
        rank, world: this one's number, and how many there are.
    """

    def __init__(self, refusal: Callable[[str, str], Exception], *, alone: bool) -> None:
        self._refusal = refusal
        self.rank, self.world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())

    def agree(self, mine: bool) -> bool:
        """Whether every rank says so; a collective."""
        return all(self._all(mine))

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """What fails within on one rank fails on all of them, when it ends; a collective.

        Raises:
            Exception: its own on a rank that failed; on the others the refusal of the first of those.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # whatever it is: the others wait
            failure = error
        said = self._all(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, why in enumerate(said):
            if why is not None:
                raise self._refusal(f"rank {rank} of {self.world}", why)

    def gathered(self, piece: Tensor, total: int) -> Tensor:
        """The pieces of all ranks (each ceil(total / world) long, but for the last) as one; a collective."""
        if self.world == 1:
            return piece
        mine = piece_of(piece, -(-total // self.world), 0)
        whole = mine.new_empty(mine.numel() * self.world)
        dist.all_gather(list(whole.chunk(self.world)), mine)
        return whole[:total]

    def bounds(self, total: int) -> tuple[int, int]:
        """This rank's flat range of `total` values; it may be empty."""
        size = -(-total // self.world)
        return min(self.rank * size, total), min((self.rank + 1) * size, total)

    def _all(self, mine: Any) -> list[Any]:
        if self.world == 1:
            return [mine]
        said: list[Any] = [None] * self.world
        dist.all_gather_object(said, mine)
        return said


def is_writer(is_main_process: bool | None) -> bool:
    """Whether this process writes what all ranks have: as it is told, else rank 0 of the default group does."""
    if is_main_process is not None:
        return is_main_process
    return not dist.is_initialized() or dist.get_rank() == 0


def on_any_rank(mine: Collection[str], names: Iterable[str], device: torch.device) -> set[str]:
    """Those of the names, the same on every rank, that are any rank's own; a collective where there are several."""
    names = list(names)
    flags = torch.tensor([name in mine for name in names], dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return {name for name, flag in zip(names, flags.tolist(), strict=True) if flag}
