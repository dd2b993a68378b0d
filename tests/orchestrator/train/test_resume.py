"""A checkpoint is whole: it goes on with another number of ranks, at another stage, over a quantised base, and ends
where the run that nobody stopped ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.plan import Plan
from orchestrator.train.worker.checkpoint import newest_good, steps_in
from orchestrator.train.worker.loop import Training
from orchestrator.train.worker.run import train
from peft_dist.optim import AdapterOptimizer
from tests.ranks import run_on_ranks

from .ends import difference
from .tiny import job, plan, request

HALF, STEPS, BATCH = 6, 12, 8
"""The run is stopped after half of its steps, in the middle of an epoch: 18 rows in batches of 8, the last short."""

LORA = {"type": "lora", "r": 4, "lora_dropout": 0.2}
ADALORA = {"type": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1}


class Stopper:
    """A reporter that asks to stop after so many steps."""

    def __init__(self, after: int | None) -> None:
        self.after, self.steps, self.losses = after, 0, []

    @property
    def stop_requested(self) -> bool:
        return self.after is not None and self.steps >= self.after

    def emit(self, kind: str, **fields) -> None:
        if kind == "progress":
            self.steps += 1
            self.losses.append(fields["loss"])


def on_rank(folder: Path, spec, made: Plan, run: str, after: int | None = None):
    torch.set_num_threads(1)
    stopper = Stopper(after)
    return train(request(folder, spec, made, run=run), reporter=stopper), stopper.losses


def over(workers: int, stage: int) -> Plan:
    """The same global batch over so many workers."""
    return plan(workers=1, accumulation=BATCH // 2, stage=stage).at(workers)


def spec_of(folder: Path, adapter=LORA, precision: str = "fp32", **model):
    base = {"base_model": str(folder / "base"), **model}
    made = job(
        folder,
        adapter=adapter,
        # the rates at which whole runs are claimed to be equal
        training={"num_epochs": 4, "learning_rate": 1e-3, "precision": precision, "saves_per_epoch": 2},
        storage={"keep_latest": 3},
    )
    return made.model_copy(update={"model": type(made.model)(**base)})


def run(folder, spec, made: Plan, name: str, after: int | None = None):
    """Rank 0's end and the losses that it told."""
    return run_on_ranks(on_rank, made.num_workers, folder, spec, made, name, after)[0]


def in_two_parts(folder, spec, first: Plan, second: Plan, name: str):
    """The end of a run that was stopped half-way under one plan and went on under another, and its losses."""
    stopped, losses = run(folder, spec, first, name, HALF)
    assert stopped.is_stopped and stopped.steps == HALF
    end, more = run(folder, spec, second, name)
    assert end.steps == STEPS and len(losses) == len(more) == HALF
    return end, losses + more


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with a base and rows, and the run of one process that nobody stopped, by adapter and base."""
    folder = tmp_path_factory.mktemp("resume")
    whole: dict[str, tuple] = {}

    def uninterrupted(name: str, spec):
        if name not in whole:
            whole[name] = run(folder, spec, over(1, 0), f"whole-{name}")
        return whole[name]

    return folder, uninterrupted


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, 2), (1, 2)),
        ((1, 2), (2, 2)),
        ((2, 2), (2, 3)),
        ((2, 3), (2, 2)),
        ((2, 3), (1, 0)),
        ((1, 0), (3, 1)),  # three ranks share eight rows unevenly
    ],
    ids=lambda each: f"{each[0]}-ranks-zero{each[1]}",
)
def test_another_number_of_ranks_and_another_stage_end_alike(house, first, second):
    folder, uninterrupted = house
    spec = spec_of(folder)
    whole, told = uninterrupted("lora", spec)
    end, losses = in_two_parts(folder, spec, over(*first), over(*second), f"{first}{second}")
    # fp32, twelve steps of AdamW at 1e-3: what the architecture claims of whole runs
    assert difference(end, whole) < 1e-5
    assert losses == pytest.approx(told, rel=1e-5)
    assert end.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_where_nothing_changed_not_a_bit_does(house, stage):
    folder, _ = house
    spec = spec_of(folder)
    whole, told = run(folder, spec, over(2, stage), f"both-{stage}")
    end, losses = in_two_parts(folder, spec, over(2, stage), over(2, stage), f"halves-{stage}")
    assert difference(end, whole) == 0 and losses == told
    assert end.metrics == whole.metrics


def test_layers_that_take_one_input_sum_alike_from_the_first_step_on(house, monkeypatch):
    """Without dropout they are computed together once a forward has shown which they are."""
    folder, _ = house
    spec = spec_of(folder, {"type": "lora", "r": 4})
    whole, told = run(folder, spec, over(1, 0), "together")
    end, losses = in_two_parts(folder, spec, over(1, 0), over(1, 0), "together-halves")
    assert difference(end, whole) == 0 and losses == told
    # The negative control: the process that goes on has yet to learn it in its first step.
    monkeypatch.setattr(Training, "rehearse", lambda self: None)
    end, _ = in_two_parts(folder, spec, over(1, 0), over(1, 0), "unrehearsed-halves")
    assert difference(end, whole) > 0


def test_what_acts_on_the_adapter_as_a_whole_goes_on_too(house):
    folder, uninterrupted = house
    spec = spec_of(folder, ADALORA)
    whole, told = uninterrupted("adalora", spec)
    end, losses = in_two_parts(folder, spec, over(2, 2), over(1, 2), "adalora")
    assert difference(end, whole) < 1e-5 and losses == pytest.approx(told, rel=1e-5)


@pytest.mark.matrix  # bases of 4 and 8 bits take seconds a step on a CPU
@pytest.mark.parametrize(
    ("model", "first", "second"),
    [
        ({"load_in_4bit": True}, (2, 2), (1, 2)),
        ({"load_in_4bit": True}, (2, 2), (2, 3)),
        ({"load_in_8bit": True}, (1, 2), (2, 2)),
        ({"load_in_8bit": True}, (2, 3), (2, 2)),
    ],
    ids=["nf4-ranks", "nf4-stages", "int8-ranks", "int8-stages"],
)
def test_a_quantised_base_goes_on_too(house, model, first, second):
    folder, _ = house
    spec = spec_of(folder, **model)
    name = f"{'-'.join(model)}-{first}-{second}"
    whole, told = run(folder, spec, over(*second), f"whole-{name}")
    end, losses = in_two_parts(folder, spec, over(*first), over(*second), name)
    # the rows of a forward are padded in other groups, and 8 bits quantise activations by what stands beside them
    assert losses == pytest.approx(told, rel=1e-3)
    assert end.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], rel=1e-3)


def test_a_checkpoint_tells_nothing_of_ranks_and_stages(house):
    folder, _ = house
    spec = spec_of(folder)
    found = {}
    for workers, stage in ((1, 0), (2, 2), (2, 3)):
        name = f"whole-{workers}-{stage}"
        run(folder, spec, over(workers, stage), name, HALF)
        assert HALF in steps_in(str(folder / name))
        checkpoint = newest_good(str(folder / name), folder / "scratch")
        state = checkpoint.optimizer_state()
        saved = load_file(checkpoint.adapter_dir / "adapter_model.safetensors")
        assert checkpoint.position.step == HALF and min(t.numel() for t in saved.values()) > 0
        found[name] = (
            {name: tuple(tensor.shape) for name, tensor in (state | saved).items()},
            {path.relative_to(checkpoint.path) for path in checkpoint.path.rglob("*")},
        )
    assert len({str(sorted(shapes.items())) for shapes, _ in found.values()}) == 1
    assert len({frozenset(files) for _, files in found.values()}) == 1


def forget_the_states(folder: Path, spec, made: Plan, run: str):
    AdapterOptimizer.load_whole_state = lambda self, state, names=None: None  # type: ignore[method-assign]
    return on_rank(folder, spec, made, run)


def test_negative_control_an_optimizer_that_begins_anew(house):
    folder, uninterrupted = house
    spec = spec_of(folder)
    whole, _ = uninterrupted("lora", spec)
    run(folder, spec, over(2, 2), "anew", HALF)
    end, _ = run_on_ranks(forget_the_states, 1, folder, spec, over(1, 2), "anew")[0]
    assert difference(end, whole) > 1e-4
