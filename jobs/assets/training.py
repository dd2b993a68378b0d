"""How the embedded bases are trained from scratch: pieces of a text, steps in a shuffled order, and a folder that is
there once what is in it is good enough."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def pieces(ids: list[int], length: int, held_out_every: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held-out) int64 pieces of `length` tokens of a text; what is left at its end is not used."""
    whole = len(ids) // length
    data = torch.tensor(ids[: whole * length]).view(whole, length)
    held_out = torch.arange(whole) % held_out_every == 0
    return data[~held_out], data[held_out]


def train(
    model: torch.nn.Module,
    data: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    steps: int,
    batch_size: int,
    seed: int,
    rate: Callable[[int], float],
    loss_of: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
    say_every: int,
) -> None:
    """Steps over shuffled pieces. Deterministic for one number of threads.

    Args:
        rate: step -> learning rate. loss_of: of a batch of pieces; the generator is for what it draws.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    began, average = time.monotonic(), None
    model.train()
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(data), generator=generator)])
        batch, order = data[order[:batch_size]], order[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = loss_of(batch, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % say_every == say_every - 1:
            seconds = time.monotonic() - began
            print(f"{name}: step {step + 1}/{steps} loss {average:.3f} {seconds:.0f} s", flush=True)


@contextlib.contextmanager
def built(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to build in; what is in it is put there at the end, unless that raises."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    yield aside
    folder.mkdir(parents=True, exist_ok=True)
    for path in aside.iterdir():
        path.replace(folder / path.name)
    aside.rmdir()


def check(reached: float, worst: float, aside: Path) -> None:
    """Raises SystemExit where a base reached less than it must."""
    if not reached <= worst:
        raise SystemExit(f"The base is worse than it must be; it is kept in {aside} to look at.")
