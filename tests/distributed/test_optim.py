"""AdapterOptimizer on several ranks equals one process that sees the sum of all gradients, at every stage."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from peft_dist.errors import OptimizerError
from peft_dist.optim import AdapterOptimizer, Hyper
from tests.ranks import RankFailed, run_on_ranks

SHAPES = {"a.weight": (30, 4), "b.weight": (5,), "c.weight": (2, 2, 2), "d.weight": (40,)}
HYPER = {
    "left": Hyper(1e-2, weight_decay=0.1, max_grad_norm=1.0),
    "right": Hyper(1e-3, max_grad_norm=0.0),
    "both": Hyper(1e-2, optimizer="sgd", max_grad_norm=0.5),
}
STEPS = 6
Adapters = dict[str, dict[str, Parameter]]


def adapters(seed: int = 0) -> Adapters:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {key: Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()}
        for name in HYPER
    }


def gradient(name: str, key: str, step: int, rank: int) -> Tensor | None:
    """Rank 0 uses `left`, rank 1 `right`, all ranks `both`; now and then one tensor or one adapter is not "
    "used."""
    if (name, rank) in {("left", 1), ("right", 0)} or (name == "right" and step == 2):
        return None
    if key == "b.weight" and step % 2 == 0:
        return None
    place = [*HYPER].index(name) * 1000 + [*SHAPES].index(key) * 100 + step * 10 + rank
    return torch.randn(SHAPES[key], generator=torch.Generator().manual_seed(place))


def train_on_rank(optimizer: AdapterOptimizer, trained: Adapters, steps: range) -> list[dict[str, float]]:
    norms = []
    for step in steps:
        optimizer.zero_grad()
        for name in optimizer.names:
            for key, parameter in trained[name].items():
                parameter.grad = gradient(name, key, step, dist.get_rank())
        optimizer.reduce()
        norms.append(optimizer.step())
    return norms


def train_alone(
    trained: Adapters, world: int, steps: range, optimizer: AdapterOptimizer | None = None
) -> list[dict[str, float]]:
    """The oracle: one process, the gradients of all ranks summed."""
    if optimizer is None:
        optimizer = AdapterOptimizer()
        for name, params in trained.items():
            optimizer.add(name, params, HYPER[name])
    norms = []
    for step in steps:
        optimizer.zero_grad()
        for name in optimizer.names:
            for key, parameter in trained[name].items():
                shares = [gradient(name, key, step, rank) for rank in range(world)]
                present = [share for share in shares if share is not None]
                parameter.grad = torch.stack(present).sum(0) if present else None
        norms.append(optimizer.step())
    return norms


def values(trained: Adapters) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": p.detach().clone() for name, params in trained.items() for key, p in params.items()
    }


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert list(one) == list(other)
    return max((one[key] - other[key]).abs().max().item() for key in one)


def without(collective: str) -> contextlib.AbstractContextManager[object]:
    """Within the context that collective leaves floating numbers as they are on each rank."""
    real = getattr(dist, collective)

    def call(tensor: Tensor, *args: object, **kwargs: object) -> None:
        if not tensor.is_floating_point():
            real(tensor, *args, **kwargs)

    return mock.patch.object(dist, collective, call)


def train_sharded(stage: int, broken: str | None = None) -> dict[str, object]:
    trained = adapters(seed=dist.get_rank())  # ranks start apart: `add` must bring them together
    optimizer = AdapterOptimizer(stage=stage)
    for name, params in trained.items():
        optimizer.add(name, params, HYPER[name])
    with without(broken) if broken else contextlib.nullcontext():
        norms = train_on_rank(optimizer, trained, range(STEPS))
    kept = sum(p.grad.nbytes for params in trained.values() for p in params.values() if p.grad is not None)
    return {
        "norms": norms,
        "values": values(trained),
        "state_bytes": optimizer.state_bytes(),
        "gradient_bytes": kept,
        "state": optimizer.whole_state(),
    }


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_equals_one_process(stage: int, world: int) -> None:
    alone = adapters(seed=0)
    norms = train_alone(alone, world, range(STEPS))
    ranks = run_on_ranks(train_sharded, world, stage)
    for result in ranks:
        # Two addends sum to the same bits in either order; three may differ by a rounding, which AdamW's
        # division by the root of the second moment can carry to 1e-6 of an update of 1e-2.
        assert difference(result["values"], values(alone)) <= (0.0 if world == 2 else 1e-7)
        for ours, theirs in zip(result["norms"], norms, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        assert difference(result["values"], ranks[0]["values"]) == 0.0
    states = [result["state_bytes"] for result in ranks]
    gradients = [result["gradient_bytes"] for result in ranks]
    if stage == 0:
        assert len(set(states)) == 1
    else:
        whole = sum(states)
        largest = 2 * 4 * 30 * 4 + 4
        assert all(share <= whole / world + largest for share in states) and min(states) > 0
    if stage >= 2:
        assert sum(gradients) == max(sum(gradients), 1) and max(gradients) < sum(gradients)
    else:
        assert len(set(gradients)) == 1


@pytest.mark.parametrize(
    ("stage", "collective"),
    [(0, "all_reduce"), (1, "all_reduce"), (2, "reduce"), (1, "broadcast"), (2, "broadcast")],
)
def test_without_a_collective_it_does_not(stage: int, collective: str) -> None:
    alone = adapters(seed=0)
    train_alone(alone, 2, range(STEPS))
    ranks = run_on_ranks(train_sharded, 2, stage, collective)
    assert max(difference(result["values"], values(alone)) for result in ranks) > 1e-3


def save_at_two(stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trained = adapters()
    optimizer = AdapterOptimizer(stage=stage)
    for name, params in trained.items():
        optimizer.add(name, params, HYPER[name])
    train_on_rank(optimizer, trained, range(3))
    return values(trained), optimizer.whole_state()


def resume_at_two(stage: int, start: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {name: {key: Parameter(start[f"{name}/{key}"].clone()) for key in SHAPES} for name in HYPER}
    optimizer = AdapterOptimizer(stage=stage)
    for name, params in trained.items():
        optimizer.add(name, params, HYPER[name])
    optimizer.load_whole_state(state)
    train_on_rank(optimizer, trained, range(3, STEPS))
    return values(trained)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_state_saved_at_two_ranks_goes_on_exactly_at_one_and_at_two(stage: int) -> None:
    whole = adapters()
    train_alone(whole, 2, range(STEPS))
    (start, state), (_, same_state) = run_on_ranks(save_at_two, 2, stage)
    assert list(state) == list(same_state) and all(torch.equal(state[k], same_state[k]) for k in state)

    resumed = {name: {key: Parameter(start[f"{name}/{key}"].clone()) for key in SHAPES} for name in HYPER}
    optimizer = AdapterOptimizer()
    for name, params in resumed.items():
        optimizer.add(name, params, HYPER[name])
    optimizer.load_whole_state(state)
    train_alone(resumed, 2, range(3, STEPS), optimizer)
    assert difference(values(resumed), values(whole)) == 0.0

    other_stage = {0: 2, 1: 0, 2: 1}[stage]
    assert difference(run_on_ranks(resume_at_two, 2, other_stage, start, state)[1], values(whole)) == 0.0

    # Control: the moments matter.
    fresh = run_on_ranks(resume_at_two, 2, other_stage, start, {})[0]
    assert difference(fresh, values(whole)) > 1e-4


def add_and_remove(stage: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    trained = adapters()
    optimizer = AdapterOptimizer(stage=stage)
    optimizer.add("left", trained["left"], HYPER["left"])
    train_on_rank(optimizer, trained, range(2))
    optimizer.add("both", trained["both"], HYPER["both"])
    train_on_rank(optimizer, trained, range(2, 4))
    optimizer.remove("left")
    optimizer.add("right", trained["right"], HYPER["right"])
    train_on_rank(optimizer, trained, range(4, 6))
    return values(trained), optimizer.names


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_come_and_go_while_training(stage: int) -> None:
    alone = adapters()
    optimizer = AdapterOptimizer()
    optimizer.add("left", alone["left"], HYPER["left"])
    train_alone(alone, 2, range(2), optimizer)
    optimizer.add("both", alone["both"], HYPER["both"])
    train_alone(alone, 2, range(2, 4), optimizer)
    optimizer.remove("left")
    optimizer.add("right", alone["right"], HYPER["right"])
    train_alone(alone, 2, range(4, 6), optimizer)
    for result, names in run_on_ranks(add_and_remove, 2, stage):
        assert difference(result, values(alone)) == 0.0
        assert names == ("both", "right")


def nan_on_one_rank(stage: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    trained = adapters()
    optimizer = AdapterOptimizer(stage=stage)
    for name, params in trained.items():
        optimizer.add(name, params, HYPER[name])
    for name, params in trained.items():
        for parameter in params.values():
            parameter.grad = torch.ones_like(parameter)
            if name == "left" and dist.get_rank() == 1:
                parameter.grad.flatten()[0] = math.nan
    optimizer.reduce()
    return optimizer.step(), values(trained)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_nan_on_one_rank_skips_its_adapter_on_all(stage: int) -> None:
    start = values(adapters())
    for norms, after in run_on_ranks(nan_on_one_rank, 2, stage):
        assert math.isnan(norms["left"]) and math.isfinite(norms["right"]) and math.isfinite(norms["both"])
        for key, value in after.items():
            assert torch.equal(value, start[key]) == key.startswith("left/")


def count_collectives(stage: int) -> dict[str, int]:
    generator = torch.Generator().manual_seed(0)
    params = {f"{i}.weight": Parameter(torch.randn(8, 8, generator=generator)) for i in range(300)}
    optimizer = AdapterOptimizer(stage=stage)
    optimizer.add("x", params, Hyper(1e-3, max_grad_norm=1.0))
    for parameter in params.values():
        parameter.grad = torch.ones_like(parameter)
    counts: Counter[str] = Counter()
    real = {name: getattr(dist, name) for name in ("all_reduce", "reduce", "broadcast")}

    def counted(name: str) -> object:
        def call(*args: object, **kwargs: object) -> object:
            counts[name] += 1
            return real[name](*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: counted(name) for name in real}):
        optimizer.reduce()
        optimizer.step()
    return dict(counts)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, {"all_reduce": 2}),  # which tensors have gradients; the gradients
        (1, {"all_reduce": 2, "broadcast": 2}),  # and each owner's updates
        (2, {"all_reduce": 2, "reduce": 2, "broadcast": 2}),  # and the norms; gradients to each owner
    ],
)
def test_three_hundred_tensors_travel_together(stage: int, expected: dict[str, int]) -> None:
    assert run_on_ranks(count_collectives, 2, stage) == [expected, expected]


def add_apart() -> str:
    name = ("left", "right")[dist.get_rank()]
    optimizer = AdapterOptimizer(stage=2)
    with pytest.raises(OptimizerError) as caught:
        optimizer.add(name, adapters()[name], HYPER[name])
    return str(caught.value)


def test_ranks_that_add_other_adapters_are_told_so() -> None:
    expected = (
        "AdapterOptimizer.add: rank 0 adds 'left' and rank 1 adds 'right' with other tensors, "
        "hyperparameters or "
        "adapters before it. Every rank adds the same adapters in the same order, also those whose rows it "
        "does "
        "not see."
    )
    assert run_on_ranks(add_apart) == [expected, expected]


def step_before_reduce() -> str:
    optimizer = AdapterOptimizer(stage=0)
    optimizer.add("left", adapters()["left"], HYPER["left"])
    with pytest.raises(OptimizerError) as caught:
        optimizer.step()
    return str(caught.value)


def test_a_step_on_gradients_of_one_rank_is_refused() -> None:
    message = "AdapterOptimizer.step: call reduce() first; gradients are not sums yet."
    assert run_on_ranks(step_before_reduce) == [message, message]


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a word from rank 1")
    dist.barrier()


def test_a_rank_that_raises_ends_all_and_is_heard() -> None:
    with pytest.raises(RankFailed, match="a word from rank 1"):
        run_on_ranks(fail_on_rank_one, 2)
