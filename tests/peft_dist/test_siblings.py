"""Layers that take one input: computed in one node, and nobody can tell."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import peft_dist
from peft_dist.adapted import layer as adapted_layer
from peft_dist.catalog import METHODS, config_class

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "LORA": ("LoraConfig", {"r": 4, "lora_alpha": 12, "init_lora_weights": False}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 8, "init_weights": False}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"], "init_ia3_weights": False}),
}


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).to(dtype)


def tuned(name: str) -> peft_dist.PeftModel:
    torch.manual_seed(1)
    cls, values = CONFIGS[name]
    config = getattr(peft_dist, cls)(**values, target_modules=ALL, task_type="CAUSAL_LM")
    return peft_dist.get_peft_model(llama(), config, autocast_adapter_dtype=False).double().train()


@pytest.fixture
def joined(monkeypatch) -> list[int]:
    """How many layers each call for several took on."""
    sizes: list[int] = []
    for cls, _ in CONFIGS.values():
        config = getattr(peft_dist, cls)

        def together(own, methods, ps, bases, x, run=vars(config)["together"].__func__):
            given = run(own, methods, ps, bases, x)
            if given is not None:
                sizes.append(len(methods))
            return given

        monkeypatch.setattr(config, "together", classmethod(together))
    return sizes


IDS = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(2))


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(got, wanted) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-9, atol=1e-10)
    assert got[1].keys() == wanted[1].keys()
    for name in wanted[1]:
        torch.testing.assert_close(got[1][name], wanted[1][name], rtol=1e-8, atol=1e-9)


def test_every_method_with_a_path_for_several_layers_is_tried_here():
    own = {name for name in METHODS if adapted_layer._joins(config_class(name))}
    assert own == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_of_one_input_are_computed_at_once_and_give_what_each_gives(name, joined):
    model = tuned(name)
    alone = step(model)
    assert joined == []
    same(step(model), alone)
    # Each block: query, key and value; gate and up.
    assert joined == [3, 2, 3, 2]


def test_and_what_hf_peft_gives(joined, tmp_path):
    ours = tuned("LORA")
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).double().train()
    step(ours)
    ours_now, wanted = step(ours), step(theirs)
    assert joined
    torch.testing.assert_close(ours_now[0], wanted[0], rtol=1e-6, atol=1e-7)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(ours_now[1][name], gradient, rtol=1e-6, atol=1e-7)


class Block(nn.Module):
    """Layers that take one input, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, how: str = "all") -> Tensor:
        y = self.one(x)
        if how == "others":
            return y + self.two(x * 2) + self.three(x * 3)
        if how == "first":
            return y
        if how == "changed":
            x = x.mul_(2)
        if how == "in place":
            return self.two(x).mul_(2) + self.three(x).add_(1) + y
        if how == "unused":
            self.two(x)
            return y + self.three(x)
        return y + self.two(x) + self.three(x)


def block() -> peft_dist.PeftModel:
    torch.manual_seed(3)
    config = peft_dist.LoraConfig(r=2, target_modules=["one", "two", "three"], init_lora_weights=False)
    return peft_dist.get_peft_model(Block(), config).train()


def gradients(model: nn.Module, x: Tensor, how: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    y = model(x.clone(), how)
    y.square().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", ["all", "others", "first", "in place", "unused"])
def test_what_the_model_does_with_the_layers_is_free(how, joined):
    """Learned of "all", then used otherwise: the answer is that of a model that has learned nothing."""
    model, fresh, x = block(), block(), torch.randn(5, 8)
    gradients(model, x, "all")
    gradients(model, x, "all")
    assert joined == [3]
    for _ in range(3):
        got, wanted = gradients(model, x, how), gradients(copy.deepcopy(fresh), x, how)
        torch.testing.assert_close(got[0], wanted[0])
        for name, gradient in wanted[1].items():
            if gradient is None:
                assert got[1][name] is None
            else:
                torch.testing.assert_close(got[1][name], gradient)


def test_an_input_changed_in_place_is_another():
    model, fresh, x = block(), block(), torch.randn(5, 8)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        for _ in range(2):
            torch.testing.assert_close(model(x.clone(), "changed"), fresh(x.clone(), "changed"))


def test_switching_adapters_off_over_and_dropping_out_is_seen():
    model, fresh, x = block(), block(), torch.randn(5, 8)
    for each in (model, fresh):
        torch.manual_seed(4)
        each.add_adapter(
            "b", peft_dist.LoraConfig(r=3, target_modules=["one", "three"], init_lora_weights=False)
        )
    for _ in range(3):
        model(x)
    model.set_adapter("b")
    fresh.set_adapter("b")
    torch.testing.assert_close(model(x), fresh(x))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), model.base_model.model(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), fresh(x), rtol=1e-4, atol=1e-5)


def test_what_was_computed_without_gradients_is_not_handed_out_with_them():
    model, x = block(), torch.randn(5, 8)
    model(x), model(x)
    inner = model.base_model.model
    with torch.no_grad():
        inner.one(x)
    assert inner.two(x).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_save_in_the_backward_what_they_saved_in_the_forward(reentrant, joined):
    model, x = block(), torch.randn(5, 8, requires_grad=True)
    wanted = gradients(model, x, "all")
    for _ in range(3):
        model.zero_grad()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        for name, gradient in wanted[1].items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_a_class_with_a_forward_of_its_own_is_not_passed_by():
    class Own(peft_dist.LoraConfig):
        def forward(self, p, base, x, enter):
            return super().forward(p, base, x, enter) * 2

    assert adapted_layer._joins(peft_dist.LoraConfig)
    assert not adapted_layer._joins(Own)


def test_a_copy_of_a_model_learns_anew(joined):
    model, x = block(), torch.randn(5, 8)
    model(x), model(x)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), model(x))
    assert joined == [3, 3]


@pytest.mark.parametrize(
    ("name", "dtype"), [("LORA", torch.float32), ("LORA", torch.bfloat16), ("IA3", torch.float32)]
)
def test_not_a_bit_of_the_answer_depends_on_what_was_learned(name, dtype, joined):
    model = tuned(name).to(dtype)
    with torch.no_grad():
        alone = model(input_ids=IDS).logits
        assert joined == []
        assert torch.equal(model(input_ids=IDS).logits, alone)
    assert joined


@pytest.mark.parametrize("name", ["LORA", "OFT", "IA3"])
@pytest.mark.parametrize("targets", [["one"], ["one", "two"]])
def test_a_model_may_be_trained_on_one_tensor_again_and_again(name, targets):
    """Each run computes anew, though the input is the same object: between two of them the adapters have moved."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(sum(getattr(self, target)(x) for target in targets))

    more = {"LORA": {"r": 2}, "OFT": {"oft_block_size": 4}, "IA3": {"feedforward_modules": targets}}[name]
    losses = []
    for library in (peft, peft_dist):
        torch.manual_seed(0)
        config = library.PEFT_TYPE_TO_CONFIG_MAPPING[library.PeftType(name)]
        model = library.get_peft_model(Net(), config(target_modules=targets, **more))
        torch.manual_seed(1)
        trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.copy_(torch.randn(parameter.shape) * 0.1 + (name == "IA3"))
        x = torch.randn(4, 8)
        optimizer = torch.optim.SGD(trained, 0.01)
        losses.append([])
        for _ in range(7):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_called_by_hand_compute_for_themselves_whatever_changed_in_between(name):
    model = tuned(name)
    attention = model.base_model.model.model.layers[0].self_attn
    step(model)
    step(model)
    x = torch.randn(3, 16, 32, dtype=torch.float64)
    with torch.no_grad():
        before = attention.k_proj(x)
        attention.q_proj(x)
        for parameter in attention.k_proj.parameters():
            parameter.data += 0.1
        assert not torch.equal(attention.k_proj(x), before)
