"""The laws on layers whose weight is a function's argument: nn.MultiheadAttention and raw parameters.

float64, so equalities hold to rounding: 1e-12 relative is some thousand times its unit.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

import peft_dist
from peft_dist import inject, merge
from peft_dist.adapted import Adapted
from peft_dist.base_layer import ParameterLayer
from peft_dist.contract import Site
from peft_dist.errors import BaseLayerError, ConfigError, RowsError, TargetError
from peft_dist.methods.activation.ia3 import IA3Config
from peft_dist.methods.weight.lora import LoraConfig
from peft_dist.rows import BASE, Rows
from peft_dist.targets import UnmatchedWarning
from tests.contract.cases import disturb


class Attention(nn.Module):
    """Self-attention under the name `attn`; the batch on the first axis of what it takes and gives."""

    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=batch_first, bias=bias)
        self.masks: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        swap = not self.attn.batch_first
        h = x.transpose(0, 1) if swap else x
        y, weights = self.attn(h, h, value=h, **self.masks)
        assert weights.shape == (len(x), x.shape[1], x.shape[1])
        return y.transpose(0, 1) if swap else y


class Experts(nn.Module):
    """Four experts, each token goes to two of them."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = ((4, 12, 10), (4, 5, 12)) if is_transposed else ((4, 10, 12), (4, 12, 5))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape) / 3) for shape in shapes)

    def forward(self, x: Tensor, index: Tensor, share: Tensor) -> Tensor:
        up, down = self.gate_up_proj[index], self.down_proj[index]
        if not self.is_transposed:
            up, down = up.mT, down.mT
        gate, h = (x[:, None, None] @ up).chunk(2, dim=-1)
        return (((gate.sigmoid() * h) @ down)[:, :, 0] * share[..., None]).sum(1)


class Mixture(nn.Module):
    """A router and its experts, on the tokens of all rows one after the other."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(12, 4, bias=False)
        self.experts = Experts(is_transposed)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        share, index = self.router(tokens).softmax(-1).topk(2)
        return self.experts(tokens, index, share).unflatten(0, x.shape[:2])


BASES = {
    "attention": Attention,
    "attention, batch second": lambda: Attention(batch_first=False),
    "attention without bias": lambda: Attention(bias=False),
    "experts": Mixture,
    "transposed experts": lambda: Mixture(is_transposed=True),
    "one parameter": Mixture,
    "a matrix": Mixture,
}
TARGETS = {
    "attention": {"target_modules": ["attn"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "one parameter": {"target_modules": [], "target_parameters": ["down_proj"]},
    "a matrix": {"target_modules": [], "target_parameters": ["router.weight"]},
}
TARGETS["attention, batch second"] = TARGETS["attention without bias"] = TARGETS["attention"]
TARGETS["transposed experts"] = TARGETS["experts"]
kinds = pytest.mark.parametrize("kind", BASES)


def adapted(kind: str, *names: str, **values) -> tuple[nn.Module, inject.Adapters]:
    torch.manual_seed(0)
    base, shared = BASES[kind]().double(), inject.Adapters()
    for name in names or ("a",):
        inject.inject(base, LoraConfig(r=2, lora_alpha=3, **TARGETS[kind], **values), name, shared)
    inject.activate(base, [(names or ("a",))[0]])
    shared.current.length = 5
    return base, shared


def dense(base: nn.Module, *names: str) -> nn.Module:
    """The bare base with W + dW, put together from the factors alone."""
    plain = copy.deepcopy(base)
    inject.remove_wrappers(plain)
    for path, module in inject.adapter_modules(base):
        assert isinstance(module, Adapted)
        if isinstance(module.base, ParameterLayer):
            target = plain.get_parameter(path)
        else:
            target = plain.get_submodule(path)._parameters[module.base.key]
        for name in names:
            A, B = (module.tensors(name)[key].detach() for key in "AB")
            if target.ndim == 2:
                dW = B @ A
            else:
                dW = torch.stack([B[:, e::4] @ A[2 * e : 2 * e + 2] for e in range(4)])
            dW = dW.mT if getattr(module.base.layer, "is_transposed", False) else dW
            target.data += 1.5 * dW
    return plain


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def sample(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, 12, dtype=torch.double)


@kinds
def test_fresh_changes_nothing(kind) -> None:
    base, _ = adapted(kind)
    x = sample()
    close(base(x), dense(base)(x))


@kinds
def test_forward_is_the_layer_with_the_delta(kind) -> None:
    base, _ = adapted(kind)
    disturb(base)
    x = sample()
    for train in (True, False):
        base.train(train)
        assert (base(x) - dense(base)(x)).abs().max() > 1e-3
        close(base(x), dense(base, "a")(x))
        with torch.no_grad():
            close(base(x), dense(base, "a")(x))


@kinds
def test_gradients_reach_the_adapter_and_nothing_else(kind) -> None:
    base, _ = adapted(kind)
    disturb(base)
    base(sample()).square().sum().backward()
    found = {name: p.grad for name, p in base.named_parameters()}
    assert all(
        (grad is not None and grad.abs().sum() > 0) == ("lora_" in name) for name, grad in found.items()
    )


@kinds
def test_merge_and_back(kind) -> None:
    base, _ = adapted(kind)
    disturb(base)
    plain = dense(base)
    x, stored = sample(), {key: p.clone() for key, p in plain.state_dict().items()}
    before = base(x)
    merge.merge(base, safe_merge=True)
    close(base(x), before)
    merge.unmerge(base)
    close(base(x), before)
    inject.remove_wrappers(base)
    assert {key: p.shape for key, p in base.state_dict().items()} == {k: p.shape for k, p in stored.items()}
    assert all(torch.equal(p, stored[key]) for key, p in base.state_dict().items())


@kinds
def test_merged_and_unloaded(kind) -> None:
    base, _ = adapted(kind)
    disturb(base)
    x = sample()
    before = base(x)
    alone = merge.merge_and_unload(base)
    assert not list(inject.adapter_modules(alone))
    close(alone(x), before)


@kinds
def test_several_active_adapters_add_up(kind) -> None:
    base, _ = adapted(kind, "a", "b")
    disturb(base)
    inject.activate(base, ["a", "b"])
    x = sample()
    wanted = dense(base, "a", "b")(x)
    close(base(x), wanted)
    merge.merge(base)
    close(base(x), wanted)


@kinds
def test_rows_name_their_adapters(kind) -> None:
    base, shared = adapted(kind, "a", "b", "c")
    disturb(base)
    choices = ("b", "a", BASE, "c", "b", None, "a", "c")
    x = sample(len(choices)).requires_grad_()
    alone = []
    for row, choice in enumerate(choices):
        inject.activate(base, [] if choice == BASE else [choice or "a"])
        alone.append(base(x[row : row + 1]))
    wanted = torch.cat(alone)
    inject.activate(base, ["a"])
    parameters = [p for name, p in base.named_parameters() if "lora_" in name]
    weight = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * weight).sum(), [*parameters, x])
    shared.current.rows = Rows(adapters=choices)
    got = base(x)
    close(got, wanted)
    for mine, theirs in zip(
        torch.autograd.grad((got * weight).sum(), [*parameters, x]), gradients, strict=True
    ):
        close(mine, theirs)


@kinds
def test_meta_has_the_same_shapes(kind) -> None:
    base, _ = adapted(kind)
    torch.manual_seed(0)
    ghost = BASES[kind]().to("meta")
    inject.inject(ghost, LoraConfig(r=2, **TARGETS[kind]), "a", inject.Adapters())
    assert {k: t.shape for k, t in base.state_dict().items()} == {
        k: t.shape for k, t in ghost.state_dict().items()
    }
    assert all(p.is_meta for p in ghost.parameters())


@kinds
def test_deleting_leaves_the_bare_base(kind) -> None:
    base, _ = adapted(kind)
    wanted = dense(base)
    inject.delete(base, "a")
    assert [name for name, _ in base.named_modules()] == [name for name, _ in wanted.named_modules()]


def test_masks_are_cut_with_the_rows() -> None:
    base, shared = adapted("attention", "a", "b")
    disturb(base)
    x, choices = sample(3), ("b", "a", "b")
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padding[1, 1:] = True
    per_head = torch.randn(3 * 3, 5, 5, dtype=torch.double)
    for masks in (
        {"key_padding_mask": padding},
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
        {"attn_mask": per_head, "key_padding_mask": padding.double() * -1e9},
    ):
        alone = []
        for row, name in enumerate(choices):
            inject.activate(base, [name])
            base.masks = {
                key: mask
                if mask.shape == (5, 5)
                else mask[row * 3 : row * 3 + 3]
                if len(mask) == 9
                else mask[row : row + 1]
                for key, mask in masks.items()
            }
            alone.append(base(x[row : row + 1]))
        base.masks = masks
        shared.current.rows = Rows(adapters=choices)
        close(base(x), torch.cat(alone))
        shared.current.rows = None


def test_attention_in_another_order_than_the_rows() -> None:
    base, shared = adapted("attention, batch second", "a", "b")
    # Five rows of five positions: only the axis says which is which.
    disturb(base)
    x, choices = sample(5), ("b", "a", "b", "a", BASE)
    shared.current.rows = Rows(adapters=choices)
    got = base(x)
    shared.current.rows = None
    for row, name in enumerate(choices):
        inject.activate(base, [] if name == BASE else [name])
        close(got[row : row + 1], base(x[row : row + 1]))
    shared.current.rows = Rows(adapters=("a", "b"))
    with pytest.raises(RowsError) as raised:
        base.attn(x, x, x)
    assert str(raised.value) == (
        "attn: its input has shape (5, 5, 12), but the batch has 2 sequences, which are to stand on axis 1. "
        "Rows cannot tell which adapter serves which part of it; run one adapter at a time."
    )


def test_tokens_in_a_routers_order_are_refused() -> None:
    base, shared = adapted("experts", "a", "b")
    tokens = torch.randn(10, 12, dtype=torch.double)
    index, share = torch.zeros(10, 2, dtype=torch.long), torch.ones(10, 2, dtype=torch.double)
    shared.current.rows = Rows(adapters=("a", "b"))
    assert base.experts(tokens, index, share).shape == (10, 12)
    wrong = {
        "it is not given each token with the experts it goes to": [(tokens,), (tokens, index[:4], share)],
        "it is given more than tensors of tokens": [(tokens, index, [5, 5])],
        "all rows share one input": [(tokens[:1], index[:1], share[:1])],
    }
    for why, calls in wrong.items():
        for call in calls:
            with pytest.raises(RowsError) as raised:
                base.experts(*call)
            assert str(raised.value) == (
                f"experts.down_proj: {why}, so rows cannot tell which adapter serves which part of its input. "
                "Run one adapter at a time, or leave these parameters out."
            )
    with pytest.raises(RowsError, match="its input has 7 rows, but the batch has 2 sequences of 5 positions"):
        base.experts(tokens[:7], index[:7], share[:7])


def test_encoder_layers_of_torch_take_no_way_past_the_adapters() -> None:
    """In inference torch runs these by one call on their children's weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).double()
    x = sample()
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[0, 3:] = True
    for targets in (["self_attn"], ["linear1"], ["layers.1.linear2"]):
        base = copy.deepcopy(encoder)
        inject.inject(base, LoraConfig(r=2, target_modules=targets), "a", inject.Adapters())
        inject.activate(base, ["a"])
        disturb(base)
        trained = base.train()(x, src_key_padding_mask=padding)
        with torch.inference_mode():
            close(base.eval()(x, src_key_padding_mask=padding)[~padding], trained[~padding].detach())
        assert (trained - encoder(x, src_key_padding_mask=padding))[~padding].abs().max() > 1e-3


def refusal(error: type[Exception], base: nn.Module, config) -> str:
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(error) as raised:
        inject.inject(base, config, "a", inject.Adapters())
    assert [name for name, _ in base.named_modules()] == before
    return str(raised.value)


def test_parts_of_attention_alone() -> None:
    wanted = (
        "{}: 'attn.out_proj' is a part of the MultiheadAttention 'attn', which reads its weight without "
        "calling it, so an adapter on it would do nothing. Name 'attn'; that adapts both."
    )
    assert refusal(TargetError, Attention(), LoraConfig(target_modules=["out_proj"])) == wanted.format(
        "targets"
    )
    saved = LoraConfig(target_modules=["head"], modules_to_save=["out_proj"])
    base = Attention()
    base.head = nn.Linear(12, 12)
    assert refusal(TargetError, base, saved) == wanted.format("modules_to_save")
    inject.inject(base, LoraConfig(r=2, target_modules="all-linear"), "a", inject.Adapters())
    assert [name for name, _ in inject.adapter_modules(base)] == ["head"]
    base = Attention()
    inject.inject(base, LoraConfig(r=2, target_modules=["attn", "out_proj"]), "a", inject.Adapters())
    assert [name for name, _ in inject.adapter_modules(base)] == ["attn", "attn.out_proj"]


@pytest.mark.parametrize("modules", [["foobar"], ".*foobar"])
def test_modules_that_match_nothing_beside_parameters_that_match(modules) -> None:
    for library in (peft, peft_dist):
        config = library.LoraConfig(r=2, target_modules=modules, target_parameters=["router.weight"])
        with pytest.warns(RuntimeWarning, match="target_modules.*foobar"):
            model = library.get_peft_model(nn.ModuleDict({"router": nn.Linear(4, 4)}), config)
        assert [p.shape for p in model.parameters() if p.requires_grad] == [(2, 4), (4, 2)]


def test_layers_whose_weights_a_state_space_mixer_reads() -> None:
    """HF PEFT refuses out_proj and conv1d of five architectures; an adapter on dt_proj has no effect there."""
    facts = MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    base, ids = MambaForCausalLM(facts).eval(), torch.arange(5)[None]
    for name in ("out_proj", "conv1d", "dt_proj"):
        message = refusal(TargetError, base, LoraConfig(r=2, target_modules=[name, "in_proj"]))
        assert f"reads the weight of 'backbone.layers.0.mixer.{name}' past its forward" in message
    for name in ("out_proj", "conv1d"):
        with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
            peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=[name]))
    silent = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["dt_proj"], init_lora_weights=False)
    )
    assert torch.equal(silent(ids).logits, base(ids).logits)
    adapters = inject.Adapters()
    inject.inject(base, LoraConfig(r=2, target_modules="all-linear"), "a", adapters)
    names = [name.rpartition(".")[2] for name, _ in inject.adapter_modules(base)]
    assert sorted(names) == ["in_proj", "x_proj"]


def test_one_rank_for_attention_and_its_output() -> None:
    base = Attention()
    inject.inject(
        base, LoraConfig(r=2, rank_pattern={"attn": 3}, target_modules=["attn"]), "a", inject.Adapters()
    )
    assert {tuple(m.tensors("a")["A"].shape) for _, m in inject.adapter_modules(base)} == {(3, 12)}


def test_methods_that_do_not_sit_on_attention() -> None:
    assert refusal(
        TargetError, Attention(), IA3Config(target_modules=["attn"], feedforward_modules=[])
    ).startswith("targets: 'attn' is a MultiheadAttention; IA3 sits on conv1d, conv2d, conv3d, linear.")


def parameters(*names: str, **values) -> LoraConfig:
    return LoraConfig(
        r=2, target_modules=values.pop("target_modules", []), target_parameters=list(names), **values
    )


def test_parameters_that_are_not_there() -> None:
    assert refusal(TargetError, Mixture(), parameters("experts.down_prj")) == (
        "target_parameters: 'experts.down_prj' matched no parameter of Mixture. Similar: 'down_proj'."
    )
    with pytest.warns(UnmatchedWarning) as caught:
        inject.inject(Mixture(), parameters("down_proj", "up"), "a", inject.Adapters())
    assert str(caught[0].message).startswith("target_parameters: 'up' matched no parameter of Mixture.")


def test_a_layer_or_its_parameter() -> None:
    both = parameters("router.weight", target_modules=["router"])
    wanted = (
        "target_parameters: 'router.weight' is a parameter of 'router', on which an adapter sits as a layer. "
        "Name one or the other; target_modules=[] names no layer."
    )
    assert refusal(TargetError, Mixture(), both) == wanted
    base, shared = Mixture(), inject.Adapters()
    inject.inject(base, LoraConfig(r=2, target_modules=["router"]), "layer", shared)
    assert refusal(TargetError, base, parameters("router.weight")) == wanted
    base, shared = Mixture(), inject.Adapters()
    inject.inject(base, parameters("router.weight"), "parameter", shared)
    assert refusal(TargetError, base, LoraConfig(r=2, target_modules=["router"])) == (
        "targets: adapters sit on parameters of 'router', so none can sit on it as a layer. Delete them first, "
        "or name its parameters by target_parameters."
    )


def test_adapters_of_one_module_name_the_same_parameters() -> None:
    base, _ = adapted("experts")
    assert refusal(TargetError, base, parameters("down_proj")) == (
        "target_parameters: down_proj of 'experts', where adapters sit on down_proj, gate_up_proj. All "
        "adapters of a module name the same parameters."
    )


@pytest.mark.parametrize(
    "values",
    [
        {"lora_dropout": 0.1},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"use_dora": True},
        {"init_lora_weights": "eva"},
    ],
)
def test_what_does_not_go_with_parameters(values) -> None:
    (name,) = values
    message = refusal(ConfigError, Mixture(), parameters("experts.down_proj", **values))
    assert message.startswith(f"LoraConfig.{name}: ") and "'experts.down_proj'" in message


def test_parameters_of_other_shapes() -> None:
    layer = nn.LayerNorm(4)
    with pytest.raises(BaseLayerError) as raised:
        ParameterLayer(layer, "norm.weight")
    assert str(raised.value) == (
        "norm.weight: a parameter of shape (4,) and dtype torch.float32; target_parameters takes floating "
        "ones of two axes (out, in) or three (experts, out, in)."
    )


def test_dropout_that_attention_cannot_have_is_said() -> None:
    with pytest.warns(
        UserWarning, match="'attn' reads the changed weight as a whole, so dropout has no effect"
    ):
        inject.inject(
            Attention(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["attn"]), "a", inject.Adapters()
        )


def test_sites() -> None:
    base, _ = adapted("transposed experts")
    sites = {name: module.base.site for name, module in inject.adapter_modules(base)}
    assert sites["experts.gate_up_proj"] == Site(
        "experts.gate_up_proj", 10, 12, "experts", tensors=(("gate_up_proj", (4, 12, 10)),), experts=4
    )
    base, _ = adapted("attention")
    site = base.attn.base.site
    assert (site.kind, site.out, site.in_, site.bias, site.experts) == ("mha", 36, 12, 0, 0)


class Stored(nn.Module):
    """Experts in 8-bit floats, computed in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(2, 6, 4).to(torch.float8_e4m3fn), requires_grad=False)
        self.experts.forward = lambda x, index: torch.einsum("ti,toi->to", x, self.experts.up.float()[index])

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.experts(x, index)


def test_experts_in_8_bit_floats() -> None:
    """The sum is made in fp32 and rounded to what the parameter is stored in; beyond its range it stops."""
    torch.manual_seed(0)
    base = Stored()
    W = base.experts.up.clone()
    inject.inject(base, parameters("experts.up"), "a", inject.Adapters())
    inject.activate(base, ["a"])
    disturb(base)
    module = base.experts
    assert all(p.dtype == torch.float32 for p in module.tensors("a").values())
    dW, _ = module.change(["a"])
    x, index = torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1])
    wanted = torch.einsum("ti,toi->to", x, (W.float() + dW).to(torch.float8_e4m3fn).float()[index])
    torch.testing.assert_close(base(x, index), wanted)
    with torch.no_grad():
        module.tensors("a")["A"].mul_(1e4)
    merge.merge(base)
    merged = module.base_layer.up
    assert merged.dtype == torch.float8_e4m3fn and merged.float().isfinite().all()
    merge.unmerge(base)
    assert torch.equal(module.base_layer.up.view(torch.uint8), W.view(torch.uint8))
