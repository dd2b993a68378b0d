"""The order of samples: one step is one global batch, and its samples are a function of (seed, epoch, step)
alone.

Ranks take contiguous shares of a global batch, and a share is cut into micro-batches, so that another number
of workers or another accumulation changes who computes a sample, never which samples make a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .bins import balanced
from .render import IGNORED, Example


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one optimizer step."""

    step: int
    """From 0."""
    epoch: int
    micro: list[list[int]]
    """Indices into the training examples, one list per forward. Every rank has equally many lists; a rank
    with less to do has shorter or empty ones at the end."""
    samples: list[list[int]]
    """For each index in `micro`, its place in the global batch, from 0: the sample id of the stateless
    dropout."""
    bins: list[list[int]] | None = None
    """Where rows share sequences: for each forward how many, one number a sequence, in the order of `micro`."""


def num_steps(num_examples: int, *, epochs: int, max_steps: int | None, global_batch_size: int) -> int:
    """Optimizer steps of the whole job; the last, short batch of an epoch is a step."""
    whole = epochs * math.ceil(num_examples / global_batch_size)
    return whole if max_steps is None else min(whole, max_steps)


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(num_examples), int64 (num_examples,); a function of its arguments alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_examples)


def steps(
    num_examples: int,
    *,
    epochs: int,
    max_steps: int | None,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    rank: int,
    seed: int,
    start_step: int = 0,
    lengths: Sequence[int] | None = None,
    capacity: int = 0,
) -> Iterator[StepBatch]:
    """Yields this rank's part of each step from `start_step` on; a resumed run goes on exactly as the first
    would have.

    Every rank is given the same number of micro-batches in a step, so that all take part in each collective.

    Args:
        lengths: of all examples in tokens, where several share a sequence of at most `capacity` tokens; a
            micro-batch is then so many sequences. The rows of a step stay the same, a rank's share of them is no
            longer contiguous.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size}")
    if num_examples < 1:
        raise ValueError("there are no examples")
    per_epoch = math.ceil(num_examples / global_batch_size)
    order, ordered_epoch = np.empty(0, dtype=np.int64), -1
    total = num_steps(num_examples, epochs=epochs, max_steps=max_steps, global_batch_size=global_batch_size)
    for step in range(start_step, total):
        epoch, within = divmod(step, per_epoch)
        if epoch != ordered_epoch:
            order, ordered_epoch = epoch_order(num_examples, seed=seed, epoch=epoch), epoch
        first = within * global_batch_size
        last = min(first + global_batch_size, num_examples)
        if lengths is not None:
            rows = [int(row) for row in order[first:last]]
            bins = balanced([lengths[row] for row in rows], capacity, world_size)[rank::world_size]
            yield _binned(step, epoch, rows, bins, micro_batch_size)
            continue
        begin, end = share(last - first, world_size, rank)
        places = list(range(begin, end))
        largest = math.ceil((last - first) / world_size)
        cut = range(0, largest, micro_batch_size)
        yield StepBatch(
            step=step,
            epoch=epoch,
            micro=[[int(order[first + place]) for place in places[i : i + micro_batch_size]] for i in cut],
            samples=[places[i : i + micro_batch_size] for i in cut],
        )


def _binned(
    step: int, epoch: int, rows: Sequence[int], bins: Sequence[Sequence[int]], micro_batch_size: int
) -> StepBatch:
    """One rank's bins of a global batch of `rows`, so many to a forward."""
    forwards = [bins[at : at + micro_batch_size] for at in range(0, len(bins), micro_batch_size)]
    places = [[place for one in forward for place in one] for forward in forwards]
    return StepBatch(
        step=step,
        epoch=epoch,
        micro=[[rows[place] for place in forward] for forward in places],
        samples=places,
        bins=[[len(one) for one in forward if one] for forward in forwards],
    )


def share(count: int, world_size: int, rank: int) -> tuple[int, int]:
    """(first, last + 1) of the contiguous share of `count` things that falls to `rank`; sizes differ by at
    most one."""
    small, more = divmod(count, world_size)
    begin = rank * small + min(rank, more)
    return begin, begin + small + (rank < more)


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, int64 (B, longest); (0, 1) without
    examples."""
    length = max((len(example.input_ids) for example in examples), default=1)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    for i, example in enumerate(examples):
        n = len(example.input_ids)
        ids[i, :n] = torch.tensor(example.input_ids)
        labels[i, :n] = torch.tensor(example.labels)
        mask[i, :n] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
