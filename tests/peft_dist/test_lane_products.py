"""Every formulation of what lanes add, against the dense formula."""

import pytest
import torch

from peft_dist import lane_products
from peft_dist.compiled import lane_loop
from peft_dist.lanes import Lanes, join
from peft_dist.packed_rows import PackedRows, interned

RANKS = {"a": 3, "b": 8, "c": 5}
CHOICES = {
    "one each": ("a", "__base__", "c", "b"),
    "blended": ((("a", 0.7), ("b", -0.3)), "c", "__base__", "a"),
}


def pairs(generator, in_, out):
    return {
        name: (
            torch.randn(r, in_, generator=generator) * 0.2,
            torch.randn(out, r, generator=generator) * 0.2,
            0.5 * r,
        )
        for name, r in RANKS.items()
    }


def blend(choice):
    return choice if isinstance(choice, tuple) else () if choice == "__base__" else ((choice, 1.0),)


@pytest.mark.parametrize("looped", [True, False])
@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("lengths", [(1, 1, 1, 2), (30, 7, 1, 20), (300, 9, 20, 1)])
def test_lanes_add_what_their_adapters_would(monkeypatch, looped, choices, dtype, tolerance, lengths):
    if not looped:
        monkeypatch.setattr(lane_loop, "suits", lambda *_: False)
    generator = torch.Generator().manual_seed(5)
    run = PackedRows(adapters=CHOICES[choices], lengths=lengths).tokens
    # Two layers that take one input, as a block's query and key do.
    made = [pairs(generator, 40, 24), pairs(generator, 40, 24)]
    stacked = [Lanes(8, 40, 24, torch.empty(0, dtype=dtype)) for _ in made]
    for lanes, own in zip(stacked, made, strict=True):
        lanes.place(list(RANKS), lambda name, own=own: tuple(own[name]))
    join(*stacked)
    lane_of = stacked[0].lane_of
    where = interned(tuple(tuple((lane_of[n], w) for n, w in blend(c)) for c in CHOICES[choices]))
    x = torch.randn(1, sum(lengths), 40, generator=generator).to(dtype)
    for lanes, own in zip(stacked, made, strict=True):
        y = torch.randn(1, sum(lengths), 24, generator=generator).to(dtype)
        want = y[0].double()
        for stretch, choice in zip(run.stretches, CHOICES[choices], strict=True):
            for name, weight in blend(choice):
                A, B, scale = (t.to(dtype).double() if torch.is_tensor(t) else t for t in own[name])
                part = slice(stretch.start, stretch.stop)
                want[part] += weight * scale * x[0, part].double() @ A.mT @ B.mT
        lane_products.add(lanes, where, run, x, y)
        torch.testing.assert_close(y[0].double(), want, rtol=tolerance, atol=tolerance)


def test_an_input_that_lies_apart_is_served_too():
    generator = torch.Generator().manual_seed(5)
    own = pairs(generator, 40, 24)
    lanes = Lanes(8, 40, 24, torch.empty(0))
    lanes.place(["a"], lambda name: tuple(own[name]))
    run = PackedRows(adapters=("a",), lengths=(6,)).tokens
    x, y = torch.randn(1, 6, 80, generator=generator)[..., ::2], torch.zeros(1, 6, 24)
    lane_products.add(lanes, interned((((lanes.lane_of["a"], 1.0),),)), run, x, y)
    A, B, scale = own["a"]
    torch.testing.assert_close(y, scale * x @ A.mT @ B.mT)
