"""AdaLoRA's budget over a whole schedule, beside HF PEFT on the same data."""

from __future__ import annotations

from unittest import mock

import peft
import pytest
import torch

import peft_dist
from peft_dist.errors import ConfigError
from tests.contract import bases

STEPS = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 14, "lora_alpha": 8}
TARGETS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def trained(model, steps, after: bool, lr: float = 2e-2) -> list[float]:
    """The losses of a run, with the allocation after the optimizer's step, as HF PEFT's example has it, or with
    sensitivities of before it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in steps:
        loss = model(**batch(step)).loss
        loss.backward()
        in_halves = isinstance(model, peft.PeftModel) and not after
        allocator = model.base_model.rankallocator if in_halves else None
        if in_halves and step < allocator.peft_config.total_step - allocator.peft_config.tfinal:
            allocator.update_ipt(model.base_model.model)
        elif not after and not in_halves:
            model.base_model.update_and_allocate(step)
        optimizer.step()
        if in_halves:
            # What it had to give up in one call: what is masked before the step grows again in it.
            with mock.patch.object(allocator, "update_ipt"):
                model.base_model.update_and_allocate(step)
        elif after:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pair():
    theirs = peft.get_peft_model(bases.llama(), peft.AdaLoraConfig(**STEPS, **TARGETS))
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.AdaLoraConfig(**STEPS, **TARGETS))
    values = {name.replace(".default", ""): p for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for key, tensor in ours.adapter_tensors().items():
            tensor.copy_(values[key])
    return ours, theirs


@pytest.mark.parametrize("after", [True, False], ids=["after the step", "before the step"])
def test_a_whole_schedule_is_theirs(after, tmp_path) -> None:
    ours, theirs = pair()
    steps = range(STEPS["total_step"])
    # The libraries sum the same terms in another order; fourteen steps of SGD carry that on.
    assert trained(ours, steps, after) == pytest.approx(trained(theirs, steps, after), rel=1e-5)
    # As before each forward: what the last step moved of what is taken away.
    ours.base_model.settle()
    mine = ours.peft_config["default"].rank_pattern
    others = {
        key.replace(".default", ""): mask for key, mask in theirs.peft_config["default"].rank_pattern.items()
    }
    assert mine == others
    assert sum(map(sum, mine.values())) == STEPS["target_r"] * len(mine)
    assert len({sum(mask) for mask in mine.values()}) > 1, "the budget is not spread over the layers"
    values = {name.replace(".default", ""): p for name, p in theirs.named_parameters()}
    for key, tensor in ours.adapter_tensors().items():
        torch.testing.assert_close(tensor, values[key], rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    ids = batch(99)["input_ids"]
    with torch.no_grad():
        logits = ours(input_ids=ids).logits
        for where in ("ours", "theirs"):
            again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / where)
            torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
            other = peft.PeftModel.from_pretrained(bases.llama(), tmp_path / where)
            torch.testing.assert_close(other(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_what_is_taken_away_before_the_step_is_away_after_it(tmp_path) -> None:
    ours, _ = pair()
    trained(ours, range(STEPS["total_step"]), after=False)
    kept = ours.peft_config["default"].rank_pattern

    def left() -> float:
        sites = ours.base_model.sites("default")
        return max(
            float(p["E"][~torch.tensor(kept[f"{name}.lora_E"])].detach().abs().max())
            for name, p in sites.items()
        )

    assert left() > 0, "the step moved nothing, so this shows nothing"
    with torch.no_grad():
        ours(**batch(99))
    assert left() == 0


def test_a_saved_adapter_is_as_large_as_its_ranks(tmp_path) -> None:
    ours, _ = pair()
    trained(ours, range(STEPS["total_step"]), after=True)
    full = {key: t.shape for key, t in ours.adapter_tensors().items()}
    ranks = {key: sum(mask) for key, mask in ours.peft_config["default"].rank_pattern.items()}
    saved = peft_dist.get_peft_model_state_dict(ours)
    for key, rank in ranks.items():
        layer = f"base_model.model.{key.removesuffix('.lora_E')}"
        assert saved[f"{layer}.lora_A"].shape[0] == rank
        assert saved[f"{layer}.lora_B"].shape[1] == rank
        assert full[f"{layer}.lora_A"][0] == STEPS["init_r"]
    ours.save_pretrained(tmp_path)
    again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, is_trainable=True)
    loaded = peft_dist.get_peft_model_state_dict(again)
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    # It trains on from there.
    trained(again, range(STEPS["total_step"]), after=True)


def test_a_layer_without_any_rank_saves_and_loads(tmp_path) -> None:
    ours, _ = pair()
    config = ours.peft_config["default"]
    config.rank_pattern = {
        f"{name}.lora_E": [name.endswith("v_proj")] * STEPS["init_r"]
        for name in ours.base_model.sites("default")
    }
    with torch.no_grad():
        for name, p in ours.base_model.sites("default").items():
            p["E"].fill_(0.3 if name.endswith("v_proj") else 0.0)
    ids = batch(0)["input_ids"]
    logits = ours(input_ids=ids).logits
    ours.save_pretrained(tmp_path)
    again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(bases.llama(), tmp_path)
    torch.testing.assert_close(theirs(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_resumed_budget_goes_on_as_if_it_had_not_stopped() -> None:
    whole, _ = pair()
    torch.manual_seed(0)
    stopped = peft_dist.get_peft_model(bases.llama(), peft_dist.AdaLoraConfig(**STEPS, **TARGETS))
    with torch.no_grad():
        for key, tensor in stopped.adapter_tensors().items():
            tensor.copy_(whole.adapter_tensors()[key])
    losses = trained(whole, range(14), after=True)
    first = trained(stopped, range(7), after=True)
    resumed = peft_dist.get_peft_model(bases.llama(), peft_dist.AdaLoraConfig(**STEPS, **TARGETS))
    with torch.no_grad():
        for key, tensor in resumed.adapter_tensors().items():
            tensor.copy_(stopped.adapter_tensors()[key])
    resumed.base_model.controllers["default"].load_state(stopped.base_model.controllers["default"].state())
    assert first + trained(resumed, range(7, 14), after=True) == losses
    assert resumed.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"total_step": None}, "total_step: None; the schedule needs the number of steps"),
        ({"total_step": 0}, "total_step: 0; the schedule needs"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight: -1.0; it is at least 0"),
        ({"tinit": 5, "tfinal": 5}, "tinit: 5 of 10 steps with tfinal 5 leave none"),
        ({"beta1": 1.0}, r"beta1: 1.0; it lies within \(0, 1\)"),
        ({"use_dora": True}, "use_dora: True; AdaLoRA does not support it"),
        (
            {"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "loftq"},
            "loftq_config: .*does not support",
        ),
        ({"use_rslora": True}, "use_rslora: True; AdaLoRA does not support it"),
        ({"deltaT": 0}, "deltaT: 0; it is a whole number of at least 1"),
    ],
)
def test_rules(values, message) -> None:
    with pytest.raises(ConfigError, match=f"AdaLoraConfig.{message}"):
        peft_dist.AdaLoraConfig(**{"total_step": 10, **values})


def test_r_is_said_to_be_unused() -> None:
    with pytest.warns(UserWarning, match="the initial rank is `init_r`"):
        peft_dist.AdaLoraConfig(total_step=10, r=4)


def test_a_loaded_adapter_takes_labels_and_rows_name_it(tmp_path) -> None:
    """HF PEFT looks for the adapter that is trained, and knows none."""
    ours, _ = pair()
    trained(ours, range(STEPS["total_step"]), after=True)
    ours.save_pretrained(tmp_path)
    inputs = batch(0)
    theirs = peft.PeftModel.from_pretrained(bases.llama(), tmp_path)
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        theirs(**inputs)
    with pytest.raises(TypeError, match="adapter_names"):
        theirs(input_ids=inputs["input_ids"], adapter_names=["default"] * 3)
    again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path)
    with torch.no_grad():
        assert again(**inputs).loss > 0
        rows = again(input_ids=inputs["input_ids"], adapter_names=["default", "__base__", "default"]).logits
        torch.testing.assert_close(rows[[0, 2]], again(**inputs).logits[[0, 2]], rtol=1e-5, atol=1e-5)
        bare = bases.llama()(input_ids=inputs["input_ids"]).logits
        torch.testing.assert_close(rows[1], bare[1], rtol=1e-5, atol=1e-5)


def test_an_evaluation_has_the_tasks_loss_alone() -> None:
    """HF PEFT adds how far the factors are from orthonormal there too."""
    for library in (peft_dist, peft):
        model = library.get_peft_model(bases.llama(), library.AdaLoraConfig(**STEPS, **TARGETS)).eval()
        with torch.no_grad():
            evaluated = model(**batch(0))
        task = torch.nn.functional.cross_entropy(
            evaluated.logits[:, :-1].flatten(0, 1), batch(0)["labels"][:, 1:].flatten()
        )
        assert torch.allclose(evaluated.loss, task, rtol=1e-5) == (library is peft_dist)
        assert model(**batch(0)).loss > task + 0.1


def test_several_adapters_train_each_by_its_own_budget() -> None:
    """HF PEFT lets one be trained."""
    ours, theirs = pair()
    with pytest.raises(ValueError, match="supports only 1 trainable adapter"):
        theirs.add_adapter("other", peft.AdaLoraConfig(**STEPS, **TARGETS))
    ours.add_adapter("other", peft_dist.AdaLoraConfig(**{**STEPS, "target_r": 1}, **TARGETS))
    for name in ("default", "other"):
        ours.set_adapter(name)
        trained(ours, range(STEPS["total_step"]), after=True)
    totals = [sum(map(sum, ours.peft_config[name].rank_pattern.values())) for name in ("default", "other")]
    assert totals == [STEPS["target_r"] * 6, 6]


def test_a_checkpoint_goes_back_into_what_is_being_trained(tmp_path) -> None:
    """As Trainer resumes, and as it takes the best checkpoint back at the end."""
    ours, _ = pair()
    trained(ours, range(5), after=True)
    ours.save_pretrained(tmp_path)
    ids = batch(99)["input_ids"]
    pattern = ours.peft_config["default"].rank_pattern
    with torch.no_grad():
        wanted = ours(input_ids=ids).logits
    trained(ours, range(5, STEPS["total_step"]), after=True)
    assert ours.peft_config["default"].rank_pattern != pattern
    shapes = {key: t.shape for key, t in ours.adapter_tensors().items()}
    ours.load_adapter(tmp_path, "default", is_trainable=True)
    assert {key: t.shape for key, t in ours.adapter_tensors().items()} == shapes
    assert ours.peft_config["default"].rank_pattern == pattern
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    fresh = peft_dist.get_peft_model(bases.llama(), peft_dist.AdaLoraConfig(**STEPS, **TARGETS))
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(fresh(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    trained(fresh, range(5, STEPS["total_step"]), after=True)
    assert sum(map(sum, fresh.peft_config["default"].rank_pattern.values())) == STEPS["target_r"] * 6
