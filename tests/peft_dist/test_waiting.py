"""Adapters on the meta device over a base on the meta device: they start once the base has its values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_dist import LoraConfig, get_peft_model, get_peft_model_state_dict, inject
from peft_dist.errors import AdapterError, OptimizerError
from peft_dist.model import PeftModel
from peft_dist.optim import AdapterOptimizer, Hyper
from tests.distributed import one_process as run

IDS = torch.arange(18).reshape(2, 9)


def on_meta(method: str) -> PeftModel:
    return get_peft_model(run.base().float().to("meta"), run.METHODS[method](), low_cpu_mem_usage=True)


def fill(model: PeftModel) -> None:
    """Gives the base the values of the real one."""
    base, real = model.get_base_model(), run.base().float()
    layers: dict[str, nn.Module] = {name: place.layer for name, place in inject.places(base).items()} | {
        "": base
    }
    for name, value in real.named_parameters():
        layer, _, key = name.rpartition(".")
        layers[layer]._parameters[key] = nn.Parameter(value.detach(), requires_grad=False)
    for name, value in real.named_buffers():
        layer, _, key = name.rpartition(".")
        layers[layer]._buffers[key] = value


def logits(model: PeftModel) -> Tensor:
    return model(input_ids=IDS, **run.read(model, torch.arange(2))).logits


@pytest.mark.parametrize("method", run.METHODS)
def test_an_adapter_starts_as_on_a_base_that_has_its_values(method: str) -> None:
    config, real = run.METHODS[method](), run.base().float()
    torch.manual_seed(1)
    expected = get_peft_model(real, config)
    model = on_meta(method)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.is_meta for p in model.parameters())
    fill(model)
    torch.manual_seed(1)
    assert inject.start_waiting(model) == ["default"]
    assert inject.start_waiting(model) == []
    # An optimizer that has them goes on having them.
    assert all(
        a is b for a, b in zip(trained, (p for p in model.parameters() if p.requires_grad), strict=True)
    )
    state = get_peft_model_state_dict(model)
    for key, value in get_peft_model_state_dict(expected).items():
        assert torch.equal(state[key], value), key
    torch.testing.assert_close(run.evaluate(model), run.evaluate(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["LORA", "LN_TUNING", "PROMPT_TUNING", "ADAPTION_PROMPT", "VERA"])
def test_a_forward_before_that_names_the_adapter(method: str) -> None:
    model = on_meta(method)
    with pytest.raises(AdapterError, match="adapter 'default' is still on the meta device"):
        logits(model)
    with pytest.raises(AdapterError, match=r"'default' cannot start: .* of the base is on the meta device"):
        inject.start_waiting(model)
    fill(model)
    with pytest.raises(AdapterError, match="adapter 'default' is still on the meta device"):
        logits(model)


def test_moving_a_model_to_a_device_starts_what_waits() -> None:
    model = get_peft_model(
        run.base().float(), LoraConfig(r=2, target_modules=["q_proj"]), low_cpu_mem_usage=True
    )
    assert any(p.is_meta for p in model.parameters())
    model.double().float()
    assert any(p.is_meta for p in model.parameters())
    model.to("cpu")
    assert not any(p.is_meta for p in model.parameters())
    torch.testing.assert_close(run.evaluate(model), run.base().float().eval()(input_ids=_ids()).logits)


def _ids() -> Tensor:
    return torch.randint(0, run.VOCAB, (2, run.LENGTH), generator=torch.Generator().manual_seed(99))


def test_an_optimizer_refuses_tensors_that_left_the_model() -> None:
    model = get_peft_model(run.base().float(), LoraConfig(r=2, target_modules=["q_proj"]))
    optimizer = AdapterOptimizer()
    optimizer.add("default", run.trained(model, "default"), Hyper(1e-3))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.delete_adapter("default")
    with pytest.raises(OptimizerError, match="adapter 'default' is not in the model as it was added"):
        optimizer.reduce()
