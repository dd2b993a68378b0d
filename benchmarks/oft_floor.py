"""What OFT's definition costs at least: the frozen base's step with nothing but its products, in floors.

    python benchmarks/oft_floor.py [--rounds 15]

Each of the seven linears turns its input, or its weight, by given blocks of 32, and its backward makes the
gradients of the input and of the blocks: two products with the blocks' size more than the floor has where the
weight is turned, three where the input is. Nothing makes the blocks out of trained entries, no optimizer steps,
no adapter is looked up. `benchmarks/adapters.py --only OFT` has all of these beside it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import adapters
import torch
from torch import Tensor, nn
from torch.autograd import Function

SIZE = 32


def blocks(rows: Tensor) -> Tensor:
    """rows (n, channels) as (blocks, n, SIZE)."""
    return rows.view(len(rows), -1, SIZE).transpose(0, 1)


def turn(rows: Tensor, R: Tensor) -> Tensor:
    """rows (n, channels) times the diagonal of blocks R."""
    given = torch.empty_like(rows)
    torch.bmm(blocks(rows), R, out=blocks(given))
    return given


class TurnedInput(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, R)
        return torch.mm(turn(x.flatten(0, -2), R), W.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, R = ctx.saved_tensors
        g = torch.mm(g.flatten(0, -2), W)
        torch.bmm(blocks(x.flatten(0, -2)).mT, blocks(g))
        return turn(g, R.mT).view_as(x), None, None


class TurnedWeight(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, R: Tensor) -> Tensor:
        V = turn(W, R.mT)
        ctx.save_for_backward(x, V)
        return torch.mm(x.flatten(0, -2), V.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, V = ctx.saved_tensors
        g = torch.mm(g.flatten(0, -2), V)
        torch.bmm(blocks(x.flatten(0, -2)).mT, blocks(g))
        return g.view_as(x), None, None


def turning(model: nn.Module, node: Callable[..., Tensor]) -> nn.Module:
    """The model, whose seven linears run by `node`."""
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in adapters.ALL:
            R = torch.eye(SIZE).repeat(layer.in_features // SIZE, 1, 1)
            layer.forward = functools.partial(lambda x, W, R: node(x, W, R), W=layer.weight, R=R)
    return model


def main() -> None:
    """Measures and prints both forms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    adapters.keep_heap()
    place = adapters.Place(torch.device("cpu"), adapters.CPU_SHAPE, torch.float32)
    embeds = torch.randn(4, 128, place.shape["hidden_size"]).requires_grad_(True)
    labels = torch.randint(0, place.shape["vocab_size"], (4, 128))

    def step(model: Any) -> float:
        began = place.clock()
        model(inputs_embeds=embeds, labels=labels, use_cache=False).loss.backward()
        embeds.grad = None
        return place.clock() - began

    models = [
        place.base(),
        turning(place.base(), TurnedInput.apply),
        turning(place.base(), TurnedWeight.apply),
    ]
    floor, *forms = adapters.alternated([functools.partial(step, m.train()) for m in models], rounds)
    for name, taken in zip(("input turned", "weight turned"), forms, strict=True):
        ratio = statistics.median(own / one for own, one in zip(taken, floor, strict=True))
        print(f"{name:<14} {ratio:.3f} x floor")


if __name__ == "__main__":
    main()
