"""Rows and stateless dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_dist import inject
from peft_dist.contract import Site
from peft_dist.errors import RowsError
from peft_dist.methods.weight.lora import LoraConfig
from peft_dist.rows import BASE, Rows, Segment, drop, keep_mask, stream

SITE = Site("layer", 6, 6, "linear")


def test_segments_are_sorted_and_stable() -> None:
    rows = Rows(adapters=("b", "a", None, "b", BASE, "a"))
    assert rows.segments == (
        Segment("b", 0, 2),
        Segment("a", 2, 4),
        Segment(None, 4, 5),
        Segment(BASE, 5, 6),
    )
    assert rows.order == [0, 3, 1, 5, 2, 4]
    split = rows.of(SITE, torch.arange(6.0)[:, None], None)
    assert torch.equal(split.unsorted(split.sorted(split.x)), split.x)
    assert Rows(adapters=("a", "a", "b")).order is None


def test_shapes_that_rows_can_divide() -> None:
    rows = Rows(adapters=("a", "b"))
    assert rows.of(SITE, torch.zeros(2, 5, 6), 5).x.shape == (2, 5, 6)
    assert rows.of(SITE, torch.zeros(1, 5, 6), 5).x.shape == (2, 5, 6)
    flat = rows.of(SITE, torch.zeros(10, 6), 5)
    assert flat.x.shape == (2, 5, 6)
    assert flat.restored(flat.x).shape == (10, 6)
    assert Rows().of(SITE, torch.zeros(7, 6), None).x.shape == (7, 6)


def test_shapes_that_rows_cannot_divide_name_the_site() -> None:
    with pytest.raises(RowsError) as raised:
        Rows(adapters=("a", "b")).of(SITE, torch.zeros(7, 6), 5)
    assert str(raised.value) == (
        "layer: its input has 7 rows, but the batch has 2 sequences of 5 positions. Rows cannot tell "
        "which adapter "
        "serves which part of it; run one adapter at a time."
    )


def test_lengths_must_agree() -> None:
    with pytest.raises(RowsError) as raised:
        Rows(adapters=("a",), samples=torch.arange(2))
    assert str(raised.value) == "Rows: 1 adapters for 2 samples. Give one of each per sequence."


def test_share_kept_and_independence() -> None:
    """400,000 draws: the share kept is within five standard deviations of 1 - p, in total, by channel and by
    position; masks of other samples, steps, sites and seeds agree as often as independent ones would."""
    samples = torch.arange(50)
    for p in (0.05, 0.1, 0.5, 0.9):
        mask = keep_mask((50, 80, 100), p, samples, stream(1, 2, "layer")).double()
        deviation = math.sqrt(p * (1 - p))
        assert abs(mask.mean().item() - (1 - p)) < 5 * deviation / math.sqrt(mask.numel())
        for dims in ((0, 1), (0, 2), (1, 2)):
            means = mask.mean(dims)
            size = mask.numel() / means.numel()
            # Of at most 100 means each, the furthest lies within 5 deviations.
            assert (means - (1 - p)).abs().max() < 5 * deviation / math.sqrt(size)
        alike = p * p + (1 - p) ** 2
        width = 5 * math.sqrt(alike * (1 - alike) / (49 * 80 * 100))
        for other in (
            mask.roll(1, 0),
            mask.roll(1, 1),
            mask.roll(1, 2),
            keep_mask((50, 80, 100), p, samples, stream(1, 3, "layer")).double(),
            keep_mask((50, 80, 100), p, samples, stream(2, 2, "layer")).double(),
            keep_mask((50, 80, 100), p, samples, stream(1, 2, "layer.other")).double(),
            keep_mask((50, 80, 100), p, samples + 50, stream(1, 2, "layer")).double(),
        ):
            assert abs((mask == other).double().mean().item() - alike) < width


def test_pairs_of_elements_are_independent() -> None:
    """Correlations between channels over 20,000 positions stay within five standard deviations."""
    mask = keep_mask((20, 1000, 40), 0.3, torch.arange(20), stream(0, 0, "layer")).double().flatten(0, 1)
    correlation = torch.corrcoef(mask.T) - torch.eye(40)
    assert correlation.abs().max() < 5 / math.sqrt(len(mask))


def test_expectation_is_kept() -> None:
    x = torch.ones(40, 50, 60)
    y = drop(x, 0.25, torch.arange(40), stream(0, 0, "layer"))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # 120,000 draws: five standard deviations of their mean.
    assert abs(y.mean().item() - 1) < 5 * math.sqrt(0.25 / 0.75 / y.numel())


def test_mask_depends_on_sample_and_place_alone() -> None:
    key = stream(3, 4, "layer")
    samples = torch.tensor([11, 5, 2**31 + 7, 9])
    whole = keep_mask((4, 10, 6), 0.5, samples, key)
    assert torch.equal(keep_mask((2, 10, 6), 0.5, samples[2:], key), whole[2:])  # how the batch is split
    assert torch.equal(keep_mask((4, 10, 6), 0.5, samples.flip(0), key), whole.flip(0))  # order in it
    assert torch.equal(keep_mask((4, 7, 6), 0.5, samples, key), whole[:, :7])  # padding to the right
    assert torch.equal(keep_mask((4, 10, 6), 0.5, samples, stream(3, 4, "layer")), whole)  # again


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_mask_does_not_depend_on_the_device() -> None:
    samples, key = torch.arange(8) * 3, stream(3, 4, "layer")
    there = keep_mask((8, 33, 65), 0.3, samples.cuda(), key)
    assert torch.equal(there.cpu(), keep_mask((8, 33, 65), 0.3, samples, key))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 4)
        self.recompute = False

    def body(self, x):
        return self.two(self.one(x).tanh())

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)


def model(*names: str) -> tuple[Base, inject.Adapters]:
    torch.manual_seed(0)
    base, shared = Base().double(), inject.Adapters()
    for name in names:
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
        inject.inject(base, config, name, shared)
    inject.activate(base, [names[0]])
    return base, shared


def gradients(base: Base, x: torch.Tensor, name: str = "a") -> list[torch.Tensor]:
    base.zero_grad()
    base(x).square().sum().backward()
    return [
        p.grad.clone() for _, module in inject.adapter_modules(base) for p in module.tensors(name).values()
    ]


def test_training_does_not_depend_on_how_the_batch_is_split() -> None:
    base, shared = model("a")
    x, samples = torch.randn(6, 5, 6, dtype=torch.double), torch.tensor([4, 9, 1, 30, 2, 7])
    shared.current.rows = Rows(samples=samples, seed=1, step=2)
    whole, out = gradients(base, x), base(x)
    parts = []
    for lo, hi in ((0, 1), (1, 4), (4, 6)):
        shared.current.rows = Rows(samples=samples[lo:hi], seed=1, step=2)
        torch.testing.assert_close(base(x[lo:hi]), out[lo:hi])
        parts.append(gradients(base, x[lo:hi]))
    for together, *apart in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(apart), together)
    shared.current.rows = Rows(samples=samples, seed=1, step=3)
    assert not torch.allclose(base(x), out)


def test_recomputation_draws_the_same_mask() -> None:
    base, shared = model("a")
    x = torch.randn(3, 5, 6, dtype=torch.double)
    shared.current.rows = Rows(samples=torch.arange(3), seed=1, step=2)
    plain = gradients(base, x)
    base.recompute = True
    for recomputed, wanted in zip(gradients(base, x), plain, strict=True):
        assert torch.equal(recomputed, wanted)


def test_packed_adapters_get_the_masks_they_get_alone() -> None:
    base, shared = model("a", "b")
    x, samples = torch.randn(4, 5, 6, dtype=torch.double), torch.tensor([3, 8, 5, 6])
    choices = ("b", "a", BASE, "b")
    shared.current.rows = Rows(adapters=choices, samples=samples, seed=1, step=2)
    packed = base(x)
    for row, name in enumerate(choices):
        inject.activate(base, [] if name == BASE else [name])
        shared.current.rows = Rows(samples=samples[row : row + 1], seed=1, step=2)
        torch.testing.assert_close(base(x[row : row + 1]), packed[row : row + 1])


def test_evaluation_drops_nothing() -> None:
    base, shared = model("a")
    base.eval()
    x = torch.randn(3, 5, 6, dtype=torch.double)
    plain = base(x)
    shared.current.rows = Rows(samples=torch.arange(3), seed=1, step=2)
    assert torch.equal(base(x), plain)


def test_without_rows_torch_draws() -> None:
    base, _ = model("a")
    x = torch.randn(3, 5, 6, dtype=torch.double)
    torch.manual_seed(1)
    first = base(x)
    assert not torch.equal(base(x), first)
    torch.manual_seed(1)
    assert torch.equal(base(x), first)


def test_flattened_inputs_get_the_masks_of_their_positions() -> None:
    base, shared = model("a")
    x = torch.randn(3, 5, 6, dtype=torch.double)
    shared.current.rows, shared.current.length = Rows(samples=torch.arange(3)), 5
    torch.testing.assert_close(base(x.flatten(0, 1)).view(3, 5, 4), base(x))
