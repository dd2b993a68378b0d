"""The law of a pack: a run on a base that others stand on has the losses, norms, adapter and metrics that it has alone.

By turns to the bit, in one forward up to the rounding of sums in another order.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.plan import Plan
from orchestrator.runner import TrainRequest
from orchestrator.spec.sharing import base_key
from orchestrator.train.group import Group
from orchestrator.train.packing import Packing
from orchestrator.train.worker import joint
from orchestrator.train.worker.checkpoint import steps_in
from orchestrator.train.worker.ground import Ground
from orchestrator.train.worker.loop import Training
from orchestrator.train.worker.pack import Pack
from peft_dist.rows import Rows

from .packs import Heard, alone, apart, packed, tensors_of
from .test_methods import METHOD_NAMES, SMALL
from .tiny import job, plan, request, save_base

pytestmark = pytest.mark.usefixtures("one_thread")

CHEAP = ["lora", "adalora", "osf", "prefix_tuning"]
"""Of each way in which a method stands on a base one: pairs on weights, controlled, in a layer's place, before rows."""


def unlike(folder: Path, *adapters: dict[str, Any], **more: Any) -> dict[str, TrainRequest]:
    """Runs that differ in all that runs of a pack may differ in."""
    plans = [plan(micro=2), plan(micro=1), plan(micro=1, accumulation=3), plan(micro=3)]
    training = [
        {"learning_rate": 1e-3, "seed": 1, "num_epochs": 2},
        {"learning_rate": 5e-4, "seed": 2, "weight_decay": 0.1, "lr_scheduler": "linear"},
        {"learning_rate": 2e-4, "seed": 3, "max_steps": 3, "num_epochs": 2, "max_grad_norm": 0.1},
        {"learning_rate": 1e-3, "seed": 4, "optimizer": "sgd", "warmup_ratio": 0.5},
    ]
    return {
        f"run{i}": request(
            folder,
            job(folder, rows=9, adapter=adapter, **{**more, "training": training[i % 4]}),
            plans[i % 4],
            run=f"pack{i}",
        )
        for i, adapter in enumerate(adapters)
    }


def the_same_alone(requests: dict[str, TrainRequest]) -> dict[str, Heard]:
    return {
        name: alone(replace(each, run_dir=each.run_dir.replace("pack", "alone")))
        for name, each in requests.items()
    }


def check(heard: dict[str, Heard], wanted: dict[str, Heard], tolerance: float = 0.0) -> None:
    for name, lone in wanted.items():
        mine = heard[name]
        assert apart(mine, lone) <= 10 * tolerance, name
        for ours, theirs in zip(mine.steps, lone.steps, strict=True):
            assert ours == (pytest.approx(theirs, rel=tolerance, abs=1e-7) if tolerance else theirs), name
        metrics = [each.of("finished")[0]["end"]["metrics"] for each in (mine, lone)]
        assert metrics[0] == (pytest.approx(metrics[1], rel=tolerance) if tolerance else metrics[1]), name


def of(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **SMALL.get(kind, {}), **fields}


@pytest.mark.parametrize(
    "kind",
    [
        # every method of the catalog, and thrice the steps of one
        pytest.param(kind, marks=[] if kind in CHEAP else pytest.mark.matrix)
        for kind in METHOD_NAMES
    ],
)
@pytest.mark.parametrize("way", ["turns", "together"])
def test_runs_of_one_method(kind, way, tmp_path):
    told: list[dict[str, Any]] = []
    requests = unlike(tmp_path, of(kind), of(kind), of(kind))
    heard = packed(requests, way, tell=lambda kind, **fields: told.append(fields))
    assert all(each["mode"] == way and not each["reason"] for each in told)
    check(heard, the_same_alone(requests), 0.0 if way == "turns" else 5e-5)


@pytest.mark.parametrize("way", ["turns", "together"])
def test_runs_of_many_methods_ranks_and_targets_with_dropout(way, tmp_path):
    requests = unlike(
        tmp_path,
        of("lora", r=4, lora_alpha=4, lora_dropout=0.3),
        of(
            "lora",
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "down_proj"],
            lora_dropout=0.1,
            use_dora=True,
        ),
        of("prompt_tuning", num_virtual_tokens=3),
        of("oft", module_dropout=0.2),
        of("ia3"),
        of("lora", r=4, lora_dropout=0.3),
        of("vera", vera_dropout=0.2),
        of("adalora", init_r=4, target_r=2, lora_dropout=0.2),
    )
    check(packed(requests, way), the_same_alone(requests), 0.0 if way == "turns" else 5e-5)


def test_negative_control_a_seed_for_all_of_them(tmp_path, monkeypatch):
    """Runs whose dropout is drawn from one seed and step are not what they are alone."""
    requests = unlike(tmp_path, of("lora", lora_dropout=0.3), of("lora", lora_dropout=0.3))
    monkeypatch.setattr(
        joint, "Rows", lambda *given, **named: Rows(*given, seed=1, step=1, bins=named["bins"])
    )
    heard, wanted = packed(requests, "together"), the_same_alone(requests)
    assert apart(heard["run0"], wanted["run0"]) > 1e-2


def started(requests: dict[str, TrainRequest], way: Any = "turns") -> tuple[Pack, dict[str, Heard]]:
    first = next(iter(requests.values()))
    pack = Pack(Ground(first, Group(), "fp32", lambda kind, **fields: None), Packing(way))
    return pack, {name: Heard() for name in requests}


@pytest.mark.parametrize("way", ["turns", "together"])
def test_runs_enter_and_leave_and_go_on_alone(way, tmp_path):
    """One leaves after two steps and goes on by itself; one that began by itself goes on in the pack."""
    requests = unlike(tmp_path, of("lora", lora_dropout=0.2), of("lora"), of("ia3"), of("lora"))
    wanted = the_same_alone(requests)
    from orchestrator.train.worker.run import train

    train(requests["run2"], reporter=Heard(stop_after=1))
    pack, heard = started(requests, way)
    heard["run0"].stop_after = 2
    assert pack.enter("run0", requests["run0"], heard["run0"]) and pack.enter(
        "run1", requests["run1"], heard["run1"]
    )
    with pytest.raises(ValueError, match="already"):
        pack.enter("run1", requests["run1"], heard["run1"])
    rounds = 0
    while pack.trials:
        pack.round()
        rounds += 1
        if rounds == 1:
            assert pack.enter("run2", requests["run2"], heard["run2"])
        if rounds == 3:
            assert "run0" not in pack.trials
            assert pack.enter("run3", requests["run3"], heard["run3"])
    assert heard["run2"].of("entered")[0]["step"] == 1
    assert heard["run0"].of("left")[0]["step"] == 2 and steps_in(requests["run0"].run_dir) == [2]
    rest = alone(requests["run0"])
    assert [step for step, *_ in heard["run0"].steps + rest.steps] == [
        step for step, *_ in wanted["run0"].steps
    ]
    tolerance = 0.0 if way == "turns" else 5e-5
    assert (
        apart(rest, wanted["run0"]) <= 10 * tolerance
        and apart(heard["run2"], wanted["run2"]) <= 10 * tolerance
    )
    check({"run1": heard["run1"], "run3": heard["run3"]}, {n: wanted[n] for n in ("run1", "run3")}, tolerance)
    model: Any = pack.ground.model
    assert not model.peft_config and not pack.ground.optimizer.names and not model._adapters.pool.homes


def test_wrappers_of_others_around_a_layer_are_in_no_name(tmp_path):
    """Runs whose layers are within what others replace or surround: adapter and checkpoint are those of a run alone."""
    requests = unlike(
        tmp_path,
        of("adaption_prompt"),
        of("lora", modules_to_save=["lm_head", "embed_tokens"]),
        of("lora", target_modules=["lm_head", "embed_tokens", "q_proj"]),
        of("lora", modules_to_save=["lm_head"]),
    )
    wanted = the_same_alone(requests)
    pack, heard = started(requests)
    heard["run2"].stop_after = 1
    for name in requests:
        assert pack.enter(name, requests[name], heard[name])
    while pack.trials:
        pack.round()
    rest = alone(requests["run2"])
    assert [*heard["run2"].steps, *rest.steps] == wanted["run2"].steps
    assert apart(rest, wanted["run2"]) == 0.0
    others = ("run0", "run1", "run3")
    check({name: heard[name] for name in others}, {name: wanted[name] for name in others})


def test_who_stood_on_the_base_first_is_in_no_sum(tmp_path):
    """A layer keeps the kinds of tensors in the order in which they came; norms are summed as in a run alone."""
    requests = unlike(tmp_path, of("lora"), of("adalora"))
    orders = []
    for names in (["run0", "run1"], ["run1"]):
        pack, heard = started(requests)
        for name in names:
            assert pack.enter(name, requests[name], heard[name])
        orders.append(list(pack.trials["run1"].run.seat.trained()))
    assert orders[0] == orders[1]


def test_a_run_that_turns_nan_leaves_alone(tmp_path):
    requests = unlike(tmp_path, of("lora"), of("lora"), of("ia3"))
    wanted = the_same_alone(requests)
    spec = requests["run1"].spec
    mad = spec.model_copy(update={"training": spec.training.model_copy(update={"learning_rate": 1e30})})
    requests["run1"] = replace(requests["run1"], spec=mad)
    for way in ("turns", "together"):
        here = {name: replace(each, run_dir=f"{each.run_dir}-{way}") for name, each in requests.items()}
        heard = packed(here, way)
        failed = heard["run1"].of("failed")[0]
        assert failed["kind"] == "not_finite" and "learning_rate" in failed["cause"]
        for name in ("run0", "run2"):
            assert apart(heard[name], wanted[name]) <= (0.0 if way == "turns" else 5e-4)


def test_one_that_cannot_enter_fails_alone(tmp_path):
    requests = unlike(tmp_path, of("lora"), of("lora", target_modules=["nothing_is_called_so"]), of("ia3"))
    heard = packed(requests)
    assert heard["run1"].of("failed")[0]["error"] == "SpecError" and "nothing_is_called_so" in str(
        heard["run1"].events
    )
    assert heard["run0"].of("finished") and heard["run2"].of("finished")


@pytest.mark.parametrize("most", [2, pytest.param(1, marks=pytest.mark.matrix)])
def test_memory_that_runs_out_splits_the_pack_then_the_forward(most, tmp_path, monkeypatch):
    requests = unlike(tmp_path, of("lora"), of("lora"), of("lora"), of("ia3"))
    wanted = the_same_alone(requests)
    real, tried = joint.backward, []

    def tight(model: Any, parts: Any) -> Any:
        tried.append(len(parts))
        if len(parts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, parts)

    monkeypatch.setattr(joint, "backward", tight)
    said: list[str] = []

    def tell(kind: str, **fields: Any) -> None:
        if kind == "warning":
            said.append(fields["message"])

    check(packed(requests, "together", tell), wanted, 5e-5)
    assert tried[0] == 4 and set(tried[1:]) == {2}
    assert said == [f"{n} runs did not fit in one forward; now {n // 2}" for n in (4, 2) if n > most]


def test_memory_that_runs_out_on_a_rank_that_others_wait_for_ends_the_group(tmp_path, monkeypatch):
    """Ranks of a partitioned base wait for each other in every layer: nothing can be agreed there."""
    pack, heard = started(unlike(tmp_path, of("lora"), of("ia3")), "together")
    for name, each in unlike(tmp_path, of("lora"), of("ia3")).items():
        assert pack.enter(name, each, heard[name])

    def tight(model: Any, parts: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(joint, "backward", tight)
    pack.ground.is_sharded = True
    with pytest.raises(torch.OutOfMemoryError):
        pack.round()


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_runs_share_a_forward_than_memory_was_planned_for(most, tmp_path, monkeypatch):
    requests = unlike(tmp_path, of("lora"), of("lora"), of("lora"), of("ia3"))
    real, joined, said = joint.backward, [0], []
    monkeypatch.setattr(
        joint, "backward", lambda model, parts: joined.append(len(parts)) or real(model, parts)
    )
    found = packed(requests, "auto", lambda kind, **fields: said.append(fields), most_joined=most)
    check(found, the_same_alone(requests), 5e-5)
    assert max(joined) == (0 if most == 1 else 2)
    assert said[0]["mode"] == ("turns" if most == 1 else "together")


def test_a_run_that_does_not_fit_takes_fewer_rows_a_forward(tmp_path, monkeypatch):
    requests = unlike(tmp_path, of("lora"))
    wanted = the_same_alone(requests)
    real = Training.prepare

    def tight(self: Training, batch: Any) -> Any:
        if max(map(len, batch.micro)) > 1:
            raise MemoryError("cannot allocate memory")
        return real(self, batch)

    monkeypatch.setattr(Training, "prepare", tight)
    heard = packed(requests)
    assert "going on with 1" in heard["run0"].of("warning")[0]["message"]
    # two forwards of one row for one of two
    assert apart(heard["run0"], wanted["run0"]) < 5e-4


def test_what_cannot_share_a_base_is_told(tmp_path):
    save_base(tmp_path / "base")
    fits = request(tmp_path, job(tmp_path), run="fits")
    drops = request(tmp_path, job(tmp_path, training={"base_dropout": True}), run="drops")
    heard = packed({"fits": fits, "drops": drops})
    assert heard["fits"].of("finished")
    assert "base_dropout" in heard["drops"].of("failed")[0]["cause"]


@pytest.mark.parametrize(
    ("adapter", "training"),
    [({"init_lora_weights": "corda"}, {}), ({}, {"base_dropout": True})],
)
def test_what_cannot_share_a_base_may_stand_on_one_of_its_own(adapter, training, tmp_path):
    save_base(tmp_path / "base", dropout=0.2)
    spec = job(tmp_path, rows=9, adapter=adapter, training={"num_epochs": 2, **training})
    pack, heard = started(
        {"own": request(tmp_path, spec, run="own"), "late": request(tmp_path, spec, run="late")}
    )
    assert pack.enter("own", request(tmp_path, spec, run="own"), heard["own"])
    assert not pack.enter("late", request(tmp_path, spec, run="late"), heard["late"])
    while pack.trials:
        pack.round()
    lone = alone(request(tmp_path, spec, run="alone"))
    check(heard, {"own": lone})
    assert heard["late"].of("failed")[0]["error"] == "SpecError"


def test_runs_with_the_bases_own_dropout_come_after_one_another(tmp_path):
    save_base(tmp_path / "base", dropout=0.2)
    requests = unlike(tmp_path, of("lora"), of("ia3"))
    for name, each in requests.items():
        training = each.spec.training.model_copy(update={"base_dropout": True})
        requests[name] = replace(each, spec=each.spec.model_copy(update={"training": training}))
    pack, heard = started(requests)
    for name, each in requests.items():
        assert pack.ground.alone and pack.enter(name, each, heard[name])
        while pack.trials:
            pack.round()
    check(heard, the_same_alone(requests))


def micro(rows: int) -> Plan:
    return plan(micro=rows)


def test_auto_measures_both_ways_and_keeps_to_the_law(tmp_path):
    spec = job(tmp_path, rows=20, training={"num_epochs": 2, "learning_rate": 1e-3})
    requests = {f"run{i}": request(tmp_path, spec, micro(1), run=f"pack{i}") for i in range(3)}
    told: list[str] = []
    heard = packed(requests, "auto", tell=lambda kind, **fields: told.append(fields["mode"]))
    assert told[:4] == ["together", "turns", "together", "turns"] and len(told) <= 8
    lone = alone(request(tmp_path, spec, micro(1), run="alone"))
    check(heard, dict.fromkeys(requests, lone), 1e-4)
    assert tensors_of(lone).keys() == tensors_of(heard["run0"]).keys()


def mixtures(folder: Path, kind: str = "xlora") -> list[dict[str, Any]]:
    """Adapters that weigh two that are there."""
    from orchestrator.train.worker.run import train

    parts = {
        name: train(
            request(folder, job(folder, rows=9, adapter={"r": 2}, training={"seed": seed}), run=name)
        ).adapter_dir
        for seed, name in enumerate("ab")
    }
    return [
        {"type": kind, "adapters": parts, "xlora_size": 8, "xlora_depth": 2, "xlora_dropout_p": 0.2},
        {"type": kind, "adapters": {"b": parts["b"]}, "xlora_size": 4, "use_trainable_adapters": True},
        {"type": kind, "adapters": parts, "xlora_size": 8, "layerwise_scalings": True},
    ]


@pytest.mark.parametrize("way", ["turns", "together"])
def test_mixtures_of_adapters_share_a_base_among_themselves(way, tmp_path):
    requests = unlike(tmp_path, *mixtures(tmp_path), eval={"metrics": ["contains"], "max_new_tokens": 3})
    told: list[dict[str, Any]] = []
    heard = packed(requests, way, tell=lambda kind, **fields: told.append(fields))
    assert all(each["mode"] == way and not each["reason"] for each in told)
    check(heard, the_same_alone(requests), 0.0 if way == "turns" else 5e-5)


def test_a_mixture_does_not_stand_beside_what_keeps_a_cache(tmp_path):
    requests = unlike(tmp_path, of("lora"), mixtures(tmp_path)[0])
    heard = packed(requests)
    assert heard["run0"].of("finished") and "keeps no cache" in heard["run1"].of("failed")[0]["cause"]
    assert base_key(requests["run0"].spec) != base_key(requests["run1"].spec)


class Normed(torch.nn.Embedding):
    """With statistics of all rows behind it."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.norm = torch.nn.BatchNorm1d(self.embedding_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(ids).transpose(1, 2)).transpose(1, 2)


def test_runs_on_a_base_with_batch_norm_come_after_one_another(tmp_path, monkeypatch):
    """Each begins with the statistics that were loaded, and measures the bare base with its own."""
    from orchestrator.train.worker import ground

    real = ground.load_frozen_base

    def loaded(*given: Any, **named: Any) -> Any:
        base = real(*given, **named)
        table = base.get_input_embeddings()
        normed = Normed(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        base.set_input_embeddings(normed.requires_grad_(False))
        return base

    monkeypatch.setattr(ground, "load_frozen_base", loaded)
    requests = unlike(tmp_path, of("lora"), of("ia3"))
    pack, heard = started(requests)
    assert pack.ground.alone and "batch norm" in pack.ground.alone
    assert pack.enter("run0", requests["run0"], heard["run0"])
    beside = Heard()
    assert not pack.enter("run1", requests["run1"], beside)
    assert "batch norm" in beside.of("failed")[0]["cause"]
    while pack.trials:
        pack.round()
    assert pack.enter("run1", requests["run1"], heard["run1"])
    while pack.trials:
        pack.round()
    check(heard, the_same_alone(requests))
