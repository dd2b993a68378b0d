"""The pool: slots, growth, and no stale copy whoever moves a Parameter."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from peft_dist import inject
from peft_dist.methods.weight.lora import LoraConfig
from peft_dist.pool import AdapterPool
from peft_dist.rows import Rows

NAMES = ("a", "b", "c", "d", "e")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.two(self.one(x).tanh())


def model(names=NAMES, r=2) -> tuple[Base, inject.Adapters]:
    torch.manual_seed(0)
    base, shared = Base().double(), inject.Adapters()
    for name in names:
        inject.inject(
            base, LoraConfig(r=r, target_modules="all-linear", init_lora_weights=False), name, shared
        )
    return base, shared


def mixed_and_alone(base: Base, names=NAMES) -> None:
    """The stacked path over the arrays gives what each adapter's own Parameters give."""
    x = torch.randn(len(names), 3, 6, dtype=next(base.parameters()).dtype)
    wanted = []
    for row, name in enumerate(names):
        inject.activate(base, [name])
        wanted.append(base(x[row : row + 1]))
    current = next(inject.adapter_modules(base))[1]._current
    current.rows = Rows(adapters=names)
    try:
        torch.testing.assert_close(base(x), torch.cat(wanted))
    finally:
        current.rows = None


def is_home(base: Base, shared: inject.Adapters) -> bool:
    """Whether every Parameter is a view of its slot."""
    return all(
        bucket._is_view(slot, p, name)
        for bucket in shared.pool.buckets.values()
        for slot, held in enumerate(bucket.held)
        for name, p in held.items()
    )


def test_parameters_are_views_and_arrays_double() -> None:
    base, shared = model()
    assert is_home(base, shared)
    assert {len(bucket.owners) for bucket in shared.pool.buckets.values()} == {8}
    assert len(shared.pool.buckets) == 2
    # 8 slots of r 2 on (6, 6) and (4, 6), 8 bytes each.
    assert shared.pool.num_bytes == 8 * 8 * (2 * 12 + 2 * 10)
    mixed_and_alone(base)


def test_growth_keeps_values_and_parameters() -> None:
    base, shared = model(("a",))
    tensors = base.one.tensors("a")
    before = {key: (p, p.detach().clone()) for key, p in tensors.items()}
    inject.inject(base, LoraConfig(r=2, target_modules="all-linear"), "b", shared)
    for key, p in base.one.tensors("a").items():
        assert p is before[key][0]
        assert torch.equal(p, before[key][1])
    assert is_home(base, shared)


def test_slots_are_used_again() -> None:
    base, shared = model()
    size = shared.pool.num_bytes
    inject.delete(base, "b")
    inject.inject(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "f", shared)
    assert shared.pool.num_bytes == size
    mixed_and_alone(base, ("a", "f", "c", "d", "e"))


def test_other_ranks_lie_apart() -> None:
    base, shared = model(("a", "b"))
    inject.inject(base, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False), "c", shared)
    assert len(shared.pool.buckets) == 4
    mixed_and_alone(base, ("a", "c", "b"))


def test_an_empty_bucket_goes() -> None:
    base, shared = model(("a",))
    inject.delete(base, "a")
    assert shared.pool.num_bytes == 0
    assert type(base.one) is nn.Linear


def test_stacked_reads_neighbours_without_a_copy_and_gives_each_its_gradient() -> None:
    base, shared = model(("a", "b", "c"))
    bucket = shared.pool.bucket("one", "a")
    stacked = bucket.stacked(["a", "b", "c"])["A"]
    assert stacked.data_ptr() == bucket.arrays["A"].data_ptr()
    weight = torch.randn_like(stacked)
    (stacked * weight).sum().backward()
    for row, name in enumerate("abc"):
        assert torch.equal(base.one.tensors(name)["A"].grad, weight[row])
    apart = bucket.stacked(["c", "a"])["A"]
    assert torch.equal(apart, torch.stack([base.one.tensors(name)["A"] for name in "ca"]))


def moved_by_to(base, shared):
    return base.to(torch.float32), True


def moved_by_half_and_back(base, shared):
    return base.half().double(), True


def moved_by_a_device(base, shared):
    return base.to("cpu"), True


def moved_by_deepcopy(base, shared):
    return copy.deepcopy(base), False


def moved_by_saving(base, shared):
    file = io.BytesIO()
    torch.save(base, file)
    file.seek(0)
    return torch.load(file, weights_only=False), None


def moved_by_new_data(base, shared):
    for p in base.parameters():
        p.data = p.data.clone() * 2
    return base, False


def moved_by_flattening(base, shared):
    """What DeepSpeed's ZeRO-1 and 2 do: every Parameter becomes a view of one buffer, which an optimizer
    writes."""
    trained = [p for p in base.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().flatten() for p in trained])
    at = 0
    for p in trained:
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()
    base.flat = [flat]
    flat.mul_(3)
    return base, False


MOVES = (
    moved_by_to,
    moved_by_half_and_back,
    moved_by_a_device,
    moved_by_deepcopy,
    moved_by_saving,
    moved_by_new_data,
    moved_by_flattening,
)


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_no_stale_copy(move) -> None:
    base, shared = model()
    base, comes_home = move(base, shared)
    mixed_and_alone(base)
    # The arrays are not what is read now: had they been, values changed through the Parameters would be lost.
    with torch.no_grad():
        for p in base.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    mixed_and_alone(base)
    if comes_home is not None:
        assert is_home(base, next(iter([shared]))) == (comes_home or move is moved_by_deepcopy)


@pytest.mark.parametrize("move", [moved_by_new_data, moved_by_flattening], ids=lambda move: move.__name__)
def test_moved_parameters_survive_growth_and_deletion(move) -> None:
    base, shared = model(("a", "b"))
    move(base, shared)
    values = {key: p.detach().clone() for key, p in base.one.tensors("a").items()}
    for name in ("c", "d", "e"):
        inject.inject(
            base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), name, shared
        )
    inject.delete(base, "b")
    for key, p in base.one.tensors("a").items():
        assert torch.equal(p, values[key])
    mixed_and_alone(base, ("a", "c", "d", "e"))


def test_a_flattened_buffer_stays_the_parameter() -> None:
    base, shared = model(("a", "b"))
    moved_by_flattening(base, shared)
    mixed_and_alone(base, ("a", "b"))
    base.flat[0].zero_()
    assert all(not p.any() for p in base.one.tensors("a").values())
    mixed_and_alone(base, ("a", "b"))


def test_meta_tensors_get_memory() -> None:
    base, shared = Base(), inject.Adapters()
    inject.inject(base, LoraConfig(r=2, target_modules="all-linear"), "a", shared, low_cpu_mem_usage=True)
    assert all(p.is_meta for p in base.one.tensors("a").values())
    for _, module in inject.adapter_modules(base):
        module.materialise("a", "cpu")
        for p in module.tensors("a").values():
            assert not p.is_meta
            p.data.normal_()
    assert is_home(base, shared)
    inject.inject(base, LoraConfig(r=2, target_modules="all-linear"), "b", shared)
    mixed_and_alone(base, ("a", "b"))


def test_gradients_do_not_leak_between_adapters() -> None:
    base, shared = model(("a", "b", "c"))
    shared.current.rows = Rows(adapters=("a", "c"))
    base(torch.randn(2, 3, 6, dtype=torch.double)).sum().backward()
    assert all(p.grad is None for p in base.one.tensors("b").values())
    assert all(p.grad.abs().sum() > 0 for name in "ac" for p in base.one.tensors(name).values())


def test_an_empty_pool() -> None:
    assert AdapterPool().num_bytes == 0
    assert AdapterPool().bucket("x", "a") is None


def test_interleaved_rows_stand_beside_their_own_tensors():
    """Rows that name adapters out of order, some twice: values and gradients of each adapter are its own."""
    base, _ = model()
    for parameter in base.parameters():
        parameter.requires_grad_(parameter.ndim == 2 and 2 in parameter.shape)
    names = ("c", "a", "e", "a", "c", "b")
    x = torch.randn(len(names), 3, 6, dtype=torch.float64)
    trained = [p for p in base.parameters() if p.requires_grad]
    wanted = []
    for row, name in enumerate(names):
        inject.activate(base, [name])
        wanted.append(base(x[row : row + 1]))
    alone = torch.autograd.grad(torch.cat(wanted).square().sum(), trained, allow_unused=True)
    current = next(inject.adapter_modules(base))[1]._current
    current.rows = Rows(adapters=names)
    given = base(x)
    torch.testing.assert_close(given, torch.cat(wanted))
    together = torch.autograd.grad(given.square().sum(), trained, allow_unused=True)
    assert [g is None for g in together] == [g is None for g in alone]
    torch.testing.assert_close([g for g in together if g is not None], [g for g in alone if g is not None])
    with torch.no_grad():
        torch.testing.assert_close(base(x), torch.cat(wanted))


def test_rows_are_asked_again_after_a_slot_changed_hands():
    base, shared = model()
    bucket = shared.pool.bucket("one", "a")
    before = bucket.by_row(("a", "b", "a"))
    assert before is not None and [len(p["A"]) for _, p in before] == [3]
    inject.delete(base, "b")
    assert bucket.by_row(("a", "b", "a")) is None
    wrapper = next(inject.adapter_modules(base))[1]
    wrapper.tensors("a")["A"].data = wrapper.tensors("a")["A"].data.clone()
    assert bucket.by_row(("a", "c", "a")) is None


def test_rows_whose_adapters_are_neighbours_read_the_arrays_as_they_are():
    base, shared = model()
    bucket = shared.pool.bucket("one", "a")
    names = (*NAMES[:4], *NAMES[:4], *NAMES[1:5])
    with torch.no_grad():
        parts = bucket.by_row(names)
        assert [rows for rows, _ in parts] == [slice(0, 4), slice(4, 8), slice(8, 12)]
        first = bucket.arrays["A"]
        assert [p["A"].data_ptr() for _, p in parts] == [first.data_ptr()] * 2 + [first[1].data_ptr()]
        mixed_and_alone(base, names)
        assert len(bucket.by_row(NAMES[::-1])) == 1
    assert len(bucket.by_row(names)) == 1, "of adapters that are trained gradients are gathered at once"
