"""Layer kinds in whole models, beside HF PEFT: files both ways, and where HF PEFT is wrong, its value and the
right one (docs/differences.md)."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peft_dist
from peft_dist.errors import ConfigError, RowsError
from peft_dist.rows import BASE
from tests.contract import bases


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(self.attn(query=h, key=h, value=h)[0])


def attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention().eval()


ON_ATTENTION = {"r": 4, "lora_alpha": 6, "target_modules": ["attn", "head"], "init_lora_weights": False}


def test_attention_both_ways(tmp_path) -> None:
    """One set of names, shapes and values; equal outputs where HF PEFT's twofold change is none."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(attention(), peft.LoraConfig(**ON_ATTENTION)).eval()
    for name, p in theirs.named_parameters():
        if "out_proj.lora_B" in name:
            p.data.zero_()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peft_dist.PeftModel.from_pretrained(attention(), tmp_path / "theirs", is_trainable=True).eval()
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(attention(), tmp_path / "ours").eval()
    mine, others = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == others.keys() and len(mine) == 6
    assert all(torch.equal(mine[key], value) for key, value in others.items())
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), again(x), rtol=1e-5, atol=1e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters()}
    for key, p in ours.adapter_tensors().items():
        if "out_proj" not in key:
            torch.testing.assert_close(p.grad, gradients[key], rtol=1e-4, atol=1e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_change_of_attentions_output_is_made_once(tmp_path) -> None:
    """HF PEFT adds sBA to the output projection's weight twice in a forward; LoRA's W + sBA has it once."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(attention(), peft.LoraConfig(**ON_ATTENTION)).eval()
    theirs.save_pretrained(tmp_path)
    ours = peft_dist.PeftModel.from_pretrained(attention(), tmp_path).eval()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    x = torch.randn(3, 5, 6)

    def dense(times: int) -> Tensor:
        base = attention()
        changed = {
            "attn": (base.attn.in_proj_weight, 1),
            "attn.base_layer.out_proj": (base.attn.out_proj.weight, times),
            "head": (base.head.weight, 1),
        }
        for name, (weight, count) in changed.items():
            A, B = (saved[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
            weight.data += count * 1.5 * B @ A
        return base(x)

    torch.testing.assert_close(theirs(x), dense(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), dense(1), rtol=1e-5, atol=1e-5)
    assert (dense(1) - dense(2)).abs().max() > 1e-2


def test_low_cpu_mem_usage_on_attention_and_experts(tmp_path) -> None:
    for name, make, config in (
        ("attention", attention, peft_dist.LoraConfig(**ON_ATTENTION)),
        ("experts", bases.mixtral, on_experts()),
    ):
        ours = peft_dist.get_peft_model(make(), config)
        ours.save_pretrained(tmp_path / name)
        loaded = peft_dist.PeftModel.from_pretrained(make(), tmp_path / name, low_cpu_mem_usage=True)
        assert not any(p.is_meta for p in loaded.parameters())
        for key, p in ours.adapter_tensors().items():
            assert torch.equal(loaded.adapter_tensors()[key], p)


def on_experts(**values) -> peft_dist.LoraConfig:
    return peft_dist.LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=["v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
        **values,
    )


@pytest.mark.parametrize("base", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_rows_of_mixtures_name_their_adapters(base, implementation) -> None:
    """Tokens of all rows go through the experts together, in the batch's order. fp32, two layers."""
    made = getattr(bases, base)()
    made.set_experts_implementation(implementation)
    torch.manual_seed(1)
    model = peft_dist.get_peft_model(made, on_experts()).eval()
    model.add_adapter("other", on_experts())
    # Seven rows of seven positions: sizes alone do not say which is which.
    ids = torch.randint(1, 64, (7, 7))
    names = ["other", "default", BASE, "other", "default", "other", BASE]
    got = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        model.set_adapter("default" if name == BASE else name)
        if name == BASE:
            with model.disable_adapter():
                alone = model(input_ids=ids[row : row + 1]).logits
        else:
            alone = model(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(got[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    got.square().sum().backward()


def test_merging_a_mixture() -> None:
    model = peft_dist.get_peft_model(bases.mixtral(), on_experts()).eval()
    ids = torch.randint(1, 64, (2, 7))
    before, stored = model(input_ids=ids).logits, copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(t, stored[key]) for key, t in model.state_dict().items())
    alone = model.merge_and_unload()
    torch.testing.assert_close(alone(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    assert alone.state_dict().keys() == bases.mixtral().state_dict().keys()


def test_convolutions_that_dilate_or_wrap_around(tmp_path) -> None:
    """HF PEFT's A pads with zeros and does not dilate, whatever the layer does, so its forward is not that of
    W + dW: with wrap-around padding it differs from its own merged layer, with dilation it fails."""
    x = torch.randn(2, 4, 9)

    def base(**values) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(4, 6, 3, **values))

    config = {"r": 4, "target_modules": ["0"], "init_lora_weights": False}
    for values in ({"padding": 1, "padding_mode": "circular"}, {"dilation": 2}):
        torch.manual_seed(1)
        theirs = peft.get_peft_model(base(**values), peft.LoraConfig(**config)).eval()
        theirs.save_pretrained(tmp_path)
        ours = peft_dist.PeftModel.from_pretrained(base(**values), tmp_path).eval()
        merged = copy.deepcopy(theirs).merge_and_unload()(x)
        torch.testing.assert_close(ours(x), merged, rtol=1e-5, atol=1e-5)
        if "dilation" in values:
            with pytest.raises(RuntimeError):
                theirs(x)
        else:
            assert (theirs(x) - merged).abs().max() > 1e-2


def test_lora_on_grouped_convolutions_merges(tmp_path) -> None:
    """Its A reads every channel, so the merged layer has one group. HF PEFT's merge fails on the shapes."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))

    config = {"r": 4, "target_modules": ["0"], "init_lora_weights": False}
    x = torch.randn(2, 4, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base(), peft.LoraConfig(**config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = peft_dist.PeftModel.from_pretrained(base(), tmp_path).eval()
    before = ours(x)
    torch.testing.assert_close(before, theirs(x), rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="the merged layer has one group and a weight over all channels"):
        alone = ours.merge_and_unload()
    torch.testing.assert_close(alone(x), before, rtol=1e-5, atol=1e-5)
    assert (alone[0].groups, tuple(alone[0].weight.shape)) == (1, (6, 4, 3, 3))
    with pytest.raises(RuntimeError):
        theirs.merge_adapter()


def test_dora_on_grouped_convolutions_stretches_its_own_change(tmp_path) -> None:
    """HF PEFT takes the lengths of W and of B A with rows and groups mixed up."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))

    config = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "use_dora": True}
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    theirs.save_pretrained(tmp_path)
    ours = peft_dist.PeftModel.from_pretrained(base(), tmp_path).eval()

    saved = load_file(tmp_path / "adapter_model.safetensors")
    A, B, m = (
        saved[f"base_model.model.0.lora_{key}"] for key in ("A.weight", "B.weight", "magnitude_vector")
    )
    conv, W, BA = base()[0], torch.zeros(6, 4, 3, 3), torch.zeros(6, 4, 3, 3)
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)
        W[rows, 2 * group : 2 * group + 2] = conv.weight[rows]
        BA[rows] = torch.einsum("or,rikl->oikl", B[rows].flatten(1), A[2 * group : 2 * group + 2])
    direction = W + 1.5 * BA
    W = m.reshape(6, 1, 1, 1) * direction / direction.flatten(1).norm(dim=1).view(6, 1, 1, 1)
    x = torch.randn(2, 4, 5, 5, generator=generator)
    wanted = nn.functional.conv2d(x, W, conv.bias)
    torch.testing.assert_close(ours(x), wanted, rtol=1e-5, atol=1e-5)
    assert (theirs(x) - wanted).abs().max() > 1e-2
    with pytest.warns(UserWarning, match="the merged layer has one group"):
        torch.testing.assert_close(ours.merge_and_unload()(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_bias_of_lora_that_attention_would_not_read(tmp_path) -> None:
    config = {**ON_ATTENTION, "lora_bias": True, "target_modules": ["attn"]}
    theirs, x = peft.get_peft_model(attention(), peft.LoraConfig(**config)), torch.randn(2, 5, 6)
    before = theirs(x)
    bias = theirs.base_model.model.attn.lora_B["default"].bias
    with torch.no_grad():
        bias.add_(1)
    assert bias.requires_grad and torch.equal(theirs(x), before)
    with pytest.raises(ConfigError, match=r"lora_bias: 'attn' is a mha, where B has no bias"):
        peft_dist.get_peft_model(attention(), peft_dist.LoraConfig(**config))


@torch.no_grad()
def test_dora_on_attention_stretches_both_projections() -> None:
    config = {**ON_ATTENTION, "use_dora": True, "target_modules": ["attn"]}
    with pytest.raises(ValueError, match="does not support DoRA"):
        peft.get_peft_model(attention(), peft.LoraConfig(**config))
    ours, x = peft_dist.get_peft_model(attention(), peft_dist.LoraConfig(**config)), torch.randn(2, 5, 6)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    dense, adapted = attention(), ours.get_base_model().attn
    parts = ((dense.attn.in_proj_weight, adapted), (dense.attn.out_proj.weight, adapted.base_layer.out_proj))
    for W, layer in parts:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        m, V = layer.lora_magnitude_vector["default"].weight, W + 6 / 4 * B @ A
        W.copy_((m / V.norm(dim=1))[:, None] * V)
    torch.testing.assert_close(ours(x), dense(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.merge_and_unload()(x), dense(x), rtol=1e-5, atol=1e-5)


def test_norms_of_every_kind() -> None:
    """LN_TUNING sits on any module with tensors of its own."""
    torch.manual_seed(0)
    layers = {
        "layer": nn.LayerNorm(6),
        "bare": nn.LayerNorm(6, bias=False),
        "rms": nn.RMSNorm(6),
        "group": nn.GroupNorm(2, 6),
        "linear": nn.Linear(6, 6),
    }
    for name, layer in layers.items():
        base = nn.ModuleDict({"first": nn.Linear(6, 6), name: layer})
        base.forward = lambda x, b=base, n=name: b[n](b["first"](x))
        x = torch.randn(4, 6)
        plain = base.forward(x)
        model = peft_dist.get_peft_model(base, peft_dist.LNTuningConfig(target_modules=[name]))
        own = {key.rpartition(".")[2] for key in model.adapter_tensors()}
        assert own == {key for key, _ in layer.named_parameters()}
        torch.testing.assert_close(base.forward(x), plain)
        base.forward(x).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in model.adapter_tensors().values())
        for p in model.adapter_tensors().values():
            p.data += 1
        changed = base.forward(x)
        assert (changed - plain).abs().max() > 1e-2
        model.merge_adapter()
        torch.testing.assert_close(base.forward(x), changed)


class Routed(nn.Module):
    """A mixture of older make: each expert is called with the tokens that were sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = self.router(tokens).argmax(-1)
        y = torch.zeros_like(tokens)
        for expert, layer in enumerate(self.experts):
            here = (chosen == expert).nonzero()[:, 0]
            y[here] = layer(tokens[here])
        return y.view_as(x)


def test_tokens_sent_to_an_expert_that_is_a_layer() -> None:
    """However many arrive, their number says nothing about whose they are."""
    torch.manual_seed(0)
    model = peft_dist.get_peft_model(
        nn.Sequential(Routed()), peft_dist.LoraConfig(r=2, target_modules=["0.experts.0", "0.experts.1"])
    )
    model.add_adapter("other", peft_dist.LoraConfig(r=2, target_modules=["0.experts.0", "0.experts.1"]))
    x = torch.randn(2, 3, 6)
    with pytest.raises(RowsError, match=r"0\.experts\.[01]: "):
        model(x, adapter_names=["default", "other"])
    expert = model.get_base_model()[0].experts[0]
    names = ["default", "other"]
    with model.using(peft_dist.Rows(adapters=names)), pytest.raises(RowsError) as raised:
        expert(torch.randn(2, 6))
    assert str(raised.value) == (
        "0.experts.0: an expert is given the tokens that a router sent to it, and rows cannot tell whose they "
        "are. Run one adapter at a time, or leave the experts out."
    )
    # Where as many tokens arrive as there are rows, HF PEFT takes them for the rows.
    base = nn.Sequential(Routed())
    config = {"r": 2, "target_modules": ["0.experts.0", "0.experts.1"], "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
    rows = torch.randn(100, 2, 6)
    first = base[0].router(rows).argmax(-1)
    # One row goes to the first expert, the other to the second.
    x = torch.stack([rows[(first == 0).all(1)][0], rows[(first == 1).all(1)][0]])
    wrong = theirs(x, adapter_names=["default", BASE])
    assert (wrong[0] - theirs(x)[0]).abs().max() > 1e-2
    assert (wrong[1] - base(x)[1]).abs().max() > 1e-2
    # One adapter for all rows needs no telling.
    for p in model.adapter_tensors("other").values():
        nn.init.normal_(p)
    got = model(x, adapter_names=["other", "other"])
    model.set_adapter("other")
    torch.testing.assert_close(got, model(x))
    assert (got - model(x, adapter_names=[BASE, BASE])).abs().max() > 1e-2


def test_inference_in_torchs_encoder_layers() -> None:
    """Without gradients torch runs the whole layer by one call on its parts' weights, past HF PEFT's adapters."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, dropout=0.0)).eval()
    x = torch.randn(2, 5, 12)
    config = {"r": 4, "target_modules": ["0.linear1"], "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(encoder), peft.LoraConfig(**config)).eval()
    ours = peft_dist.get_peft_model(copy.deepcopy(encoder), peft_dist.LoraConfig(**config)).eval()
    with torch.no_grad():
        plain = encoder(x)
        torch.testing.assert_close(theirs(x), plain, rtol=1e-5, atol=1e-5)
        inferred = ours(x)
    torch.testing.assert_close(inferred, ours(x), rtol=1e-5, atol=1e-5)
    assert (inferred - plain).abs().max() > 1e-2


@pytest.mark.parametrize("targets", [["attn"], ["head"]])
def test_all_biases_around_attention(tmp_path, targets) -> None:
    """Each adapter's own copies, under HF PEFT's names."""
    config = {"r": 4, "target_modules": targets, "bias": "all"}
    theirs = peft.get_peft_model(attention(), peft.LoraConfig(**config)).eval()
    torch.manual_seed(2)
    for name, p in theirs.named_parameters():
        if p.requires_grad and "lora_B" not in name:
            p.data.add_(torch.randn(p.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peft_dist.PeftModel.from_pretrained(attention(), tmp_path / "theirs", is_trainable=True).eval()
    ours.save_pretrained(tmp_path / "ours")
    mine, others = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[key], value) for key, value in others.items())
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    ours(x).square().sum().backward()
    assert all(p.grad is not None for p in ours.adapter_tensors().values())
    with ours.disable_adapter():
        torch.testing.assert_close(ours(x), attention()(x))
    before = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before, rtol=1e-5, atol=1e-5)


def test_factors_on_groups_are_not_combined() -> None:
    config = peft_dist.LoraConfig(r=2, target_modules=["0"])
    model = peft_dist.get_peft_model(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), config)
    model.add_adapter("other", config)
    with pytest.raises(ConfigError) as raised:
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    assert str(raised.value) == (
        "add_weighted_adapter: '0' is a convolution with groups, where LoRA's factors cannot be combined. Merge "
        "the adapters one after the other, or leave the layer out of their targets."
    )
    assert list(model.peft_config) == ["default", "other"]


def test_status_and_targets_are_theirs() -> None:
    experts = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    for make, values in ((attention, ON_ATTENTION), (bases.mixtral, {"r": 2, **experts})):
        theirs = peft.get_peft_model(make(), peft.LoraConfig(**values))
        ours = peft_dist.get_peft_model(make(), peft_dist.LoraConfig(**values))
        seen = [
            [(layer.name, layer.module_type, layer.requires_grad) for layer in model.get_layer_status()]
            for model in (ours, theirs)
        ]
        assert seen[0] == seen[1]
        assert ours.targeted_module_names == theirs.targeted_module_names
        assert ours.base_model.targeted_parameter_names == theirs.base_model.targeted_parameter_names
        assert {name for name, _ in ours.named_parameters()} == {
            name for name, _ in theirs.named_parameters()
        }
