"""Law 7: what holds of every method on a linear layer holds over bitsandbytes' 8-bit and 4-bit ones.

fp32, as adapters on quantised layers are. In training mode bitsandbytes multiplies by the dequantised weight on a
CPU, so equalities hold to fp32's rounding over sums of a dozen terms (1e-5 of the largest). In eval mode its
8-bit kernel rounds each row of x to 127 steps as well: half a step of x and of W over sums of a dozen terms stays
within 3e-2 of the largest output.
"""

from __future__ import annotations

import copy
import logging

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_dist import inject, merge
from peft_dist.adapted import Adapted
from peft_dist.base_layer import Layer, door, has_door, kind_of
from peft_dist.errors import BaseLayerError, TargetError
from peft_dist.inject import adapter_dtype
from peft_dist.methods.replace.ln_tuning import LNTuningConfig
from peft_dist.methods.weight.lora import LoraConfig
from peft_dist.pooled import PooledModule
from peft_dist.rows import BASE, Rows
from tests.contract.case import Case
from tests.contract.cases import CASES, disturb


def linear_8bit(in_: int = 12, out: int = 8, **values) -> nn.Module:
    return bnb.nn.Linear8bitLt(in_, out, has_fp16_weights=False, **values)


def linear_4bit(in_: int = 12, out: int = 8, **values) -> nn.Module:
    return bnb.nn.Linear4bit(in_, out, **{"quant_type": "nf4", **values})


STORAGES = {
    "8-bit": linear_8bit,
    "4-bit": linear_4bit,
}
# More of the same, on one method: thresholds, fp4, double quantisation or none, storage in other dtypes.
MORE = {
    **STORAGES,
    "8-bit with outliers": lambda *a: linear_8bit(*a, threshold=6.0),
    "8-bit without bias": lambda *a: linear_8bit(*a, bias=False),
    "fp4": lambda *a: linear_4bit(*a, quant_type="fp4"),
    "4-bit without nested scales": lambda *a: linear_4bit(*a, compress_statistics=False),
    "4-bit in bf16": lambda *a: linear_4bit(*a, quant_storage=torch.bfloat16),
    "4-bit in fp32, without bias": lambda *a: linear_4bit(*a, quant_storage=torch.float32, bias=False),
    "4-bit computing in bf16": lambda *a: linear_4bit(*a, compute_dtype=torch.bfloat16),
}
PLAIN = next(case for case in CASES if case.method == "LORA" and case.label == "plain")
ON_LINEAR = [case for case in CASES if "linear" in case.kinds]
SITES = [(case, storage) for case in ON_LINEAR for storage in STORAGES] + [
    (PLAIN, storage) for storage in MORE if storage not in STORAGES
]
sites = pytest.mark.parametrize(
    ("case", "storage"), SITES, ids=[f"{c.method}-{c.label}-{s}".replace(" ", "_") for c, s in SITES]
)
storages = pytest.mark.parametrize("storage", MORE)


class Base(nn.Module):
    """A quantised base of one layer, called `target`."""

    def __init__(self, storage: str, in_: int = 12, out: int = 8) -> None:
        super().__init__()
        self.target = MORE[storage](in_, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.target(x)


def adapted(case: Case, storage: str, *names: str, exact: bool = True) -> tuple[Base, inject.Adapters]:
    """A quantised base with adapters of the case, the first of them active; `exact`: see above."""
    torch.manual_seed(0)
    base, shared = Base(storage).to("cpu").eval(), inject.Adapters()
    shared.common = PooledModule(shared.pool, "")
    for name in names or ("a",):
        inject.inject(base, case.config(target_modules=["target"]), name, shared)
    inject.activate(base, [(names or ("a",))[0]])
    shared.current.batch = {name: torch.tensor([1]) for name in case.config().reads}
    base.target.base_layer.train(exact)
    return base, shared


def run_with(base: Base, x: Tensor, *names: str) -> Tensor:
    """A plain linear layer with the dequantised weight and the changes of the named adapters."""
    module = base.target
    W, b = dequantised(module.base_layer), bias_of(module.base_layer)
    dW, db = module.change(names)
    return F.linear(x, W if dW is None else W + dW, b if db is None else b + db)


def dequantised(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if weight.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return bnb.functional.int8_vectorwise_dequant(weight.data, scales)
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def bias_of(layer: nn.Module) -> Tensor | None:
    """A copy, in fp32: bitsandbytes casts a bias in place to what it computes in."""
    return None if layer.bias is None else layer.bias.detach().float().clone()


def bits(layer: nn.Module) -> dict[str, Tensor]:
    """All that a quantised layer stores."""
    return {key: t.detach().clone().view(torch.uint8) for key, t in layer.state_dict().items() if t.ndim}


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert (got - wanted).abs().max() <= tolerance * max(1, wanted.abs().max())


def tolerance_of(storage: str) -> float:
    # bf16 has 8 bits: 2^-8 of x and of W each.
    return 2e-2 if "computing in bf16" in storage else 1e-5


def sample(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, 12)


@sites
def test_law_1_fresh_adapter_changes_nothing(case, storage) -> None:
    base, _ = adapted(case, storage)
    x = sample()
    y = base.target.base_layer(x)
    assert ((base(x) - y).abs().max() <= 1e-5 * y.abs().max()) == case.is_fresh


@sites
def test_law_2_forward_is_the_dequantised_layer_with_the_delta(case, storage) -> None:
    base, _ = adapted(case, storage)
    disturb(base)
    x = sample()
    assert (base(x) - base.target.base_layer(x)).abs().max() > 1e-3
    close(base(x), run_with(base, x, "a"), tolerance_of(storage))
    base.target.base_layer.eval()
    close(base(x), run_with(base, x, "a"), 3e-2)


@sites
def test_law_2_mixed_is_forward_row_by_row(case, storage) -> None:
    base, shared = adapted(case, storage, "a", "b")
    disturb(base)
    choices = ("b", "a", BASE, "b", None)
    x = sample(len(choices))
    alone = []
    for row, choice in enumerate(choices):
        inject.activate(base, [] if choice == BASE else [choice or "a"])
        alone.append(base(x[row : row + 1]))
    inject.activate(base, ["a"])
    shared.current.rows = Rows(adapters=choices)
    close(base(x), torch.cat(alone), tolerance_of(storage))


@sites
def test_law_3_gradients_reach_the_adapter_and_nothing_else(case, storage) -> None:
    base, _ = adapted(case, storage)
    disturb(base)
    x = sample().requires_grad_()
    base(x).square().sum().backward()
    wrapper = base.target
    for key, param in wrapper.wanted("a").items():
        gradient = wrapper.tensors("a")[key].grad
        assert (gradient is not None and gradient.abs().sum() > 0) == param.trainable, key
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in wrapper.base_layer.parameters())


@sites
def test_law_3_gradients_are_those_of_the_dequantised_layer(case, storage) -> None:
    base, _ = adapted(case, storage)
    disturb(base)
    x = sample()
    weight = torch.randn(4, 5, 8)
    tensors = [t for k, t in base.target.tensors("a").items() if base.target.wanted("a")[k].trainable]
    gradients = torch.autograd.grad((base(x) * weight).sum(), tensors)
    module, plain = base.target, nn.Linear(12, 8)
    plain.weight.data, b = dequantised(module.base_layer), bias_of(module.base_layer)
    plain.bias = None if b is None else nn.Parameter(b)
    plain.requires_grad_(False)
    module.base_layer, module.base = plain, door(plain, "target")
    wanted = torch.autograd.grad((base(x) * weight).sum(), tensors)
    for mine, theirs in zip(gradients, wanted, strict=True):
        close(mine, theirs, 10 * tolerance_of(storage))


@sites
def test_law_5_merged_is_the_sum_quantised(case, storage) -> None:
    base, _ = adapted(case, storage)
    disturb(base)
    module, x = base.target, sample()
    before, stored = base(x), bits(module.base_layer)
    dW, db = module.change(["a"])
    W, b = dequantised(module.base_layer), bias_of(module.base_layer)
    wanted = requantised(module.base_layer, W + dW if dW is not None else W)
    merge.merge(base, safe_merge=True)
    got = bits(module.base_layer)
    for key, value in bits(wanted).items():
        if "bias" not in key:
            assert torch.equal(got[key], value), key
    close(base(x), F.linear(x, dequantised(wanted), b if db is None else b + db), tolerance_of(storage))
    merge.unmerge(base)
    assert {key: t.tolist() for key, t in bits(module.base_layer).items()} == {
        key: t.tolist() for key, t in stored.items()
    }
    close(base(x), before)


def requantised(layer: nn.Module, W: Tensor) -> nn.Module:
    """A layer of the same storage, made from W by bitsandbytes itself."""
    made = copy.deepcopy(layer)
    if layer.weight.dtype == torch.int8:
        made.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False).to("cpu")
        made.state.reset_grads()
    else:
        of = layer.weight
        kept = {name: getattr(of, name) for name in ("compress_statistics", "quant_type", "quant_storage")}
        made.weight = bnb.nn.Params4bit(W, requires_grad=False, blocksize=of.blocksize, **kept).to("cpu")
    return made


@storages
def test_several_adapters_merged_and_unloaded(storage) -> None:
    base, _ = adapted(PLAIN, storage, "a", "b")
    disturb(base)
    inject.activate(base, ["a", "b"])
    module = base.target
    wanted = requantised(module.base_layer, dequantised(module.base_layer) + module.change(["a", "b"])[0])
    alone = merge.merge_and_unload(base)
    assert type(alone.target) is type(wanted)
    assert torch.equal(dequantised(alone.target), dequantised(wanted))


@storages
def test_the_door(storage) -> None:
    layer = MORE[storage](12, 8).to("cpu")
    base = door(layer, "layer")
    assert (has_door(layer), kind_of(layer), base.site.kind) == (True, "linear", "linear")
    assert base.shape == (8, 12) == (base.site.out, base.site.in_)
    assert base.site.tensors[0] == ("weight", (8, 12))
    W = base.weight()
    assert W.shape == (8, 12) and torch.equal(W, dequantised(layer)) and torch.equal(W, base.tensor("weight"))
    assert adapter_dtype(base, True) == adapter_dtype(base, False) == torch.float32
    x = sample()
    M = torch.randn(8, 12, requires_grad=True)
    with base.substituted(M):
        y = base(x)
    b = bias_of(layer)
    close(y, F.linear(x, M, b))
    assert torch.autograd.grad(y.sum(), M)[0].abs().sum() > 0
    close(base(x), layer(x), 0)


def test_meta_and_unquantised_weights() -> None:
    for storage in STORAGES:
        with torch.device("meta"):
            ghost = Base(storage)
        inject.inject(ghost, LoraConfig(r=2, target_modules=["target"]), "a", inject.Adapters())
        assert ghost.target.base.shape == (8, 12)
        assert ghost.target.base.weight().shape == (8, 12)
        with pytest.raises(BaseLayerError, match=r"target\.weight is on the meta device"):
            ghost.target.base.add_(torch.zeros(8, 12))


def test_8_bit_weights_before_their_first_forward() -> None:
    """bitsandbytes quantises such a layer in its first forward, or when it is moved."""
    torch.manual_seed(0)
    layer = linear_8bit()
    base, moved = door(copy.deepcopy(layer), "layer"), copy.deepcopy(layer).to("cpu")
    assert base.layer.weight.dtype == torch.float32
    assert torch.equal(base.weight(), dequantised(moved))
    base.adopt()
    assert torch.equal(base.weight(), dequantised(moved))
    x = sample()
    assert torch.equal(base(x), moved(x))
    assert torch.equal(base.weight(), dequantised(moved))


def test_8_bit_weights_that_stay_in_half_precision() -> None:
    layer = bnb.nn.Linear8bitLt(12, 8, has_fp16_weights=True).requires_grad_(False)
    base, x = door(layer, "layer"), sample()
    W, dW = layer.weight.detach().clone(), torch.randn(8, 12)
    base(x)
    assert torch.equal(base.weight(), W)
    stored = base.stored()
    base.add_(dW)
    assert torch.equal(base.weight(), W + dW)
    layer.eval()
    close(base(x), F.linear(x, W + dW, layer.bias), 3e-2)
    base.restore_(stored)
    assert torch.equal(base.weight(), W)
    close(base(x), F.linear(x, W, layer.bias), 3e-2)


def test_dtype_of_the_weight_survives_a_merge() -> None:
    layer = linear_4bit(64, 64).to(torch.bfloat16).to("cpu")
    base = door(layer, "layer")
    assert base.weight().dtype == torch.bfloat16
    base.add_(torch.randn(64, 64))
    assert base.weight().dtype == torch.bfloat16 == layer.weight.quant_state.dtype


@pytest.mark.parametrize("storage", [storage for storage in MORE if "8-bit" not in storage])
def test_what_was_repacked_is_read_and_laid_out_again(storage) -> None:
    """A forward in eval mode repacks a 4-bit weight on some CPUs and rounds its scales to bf16; done here by hand,
    so that every machine sees it."""
    torch.manual_seed(0)
    layer = MORE[storage](128, 64).to("cpu").eval()
    W = dequantised(layer)
    codes = layer.weight.data.clone()
    pack = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
    base = door(layer, "layer")
    read = base.weight()
    # bf16 keeps 8 bits of a scale; scales that were quantised themselves are off by no more than before.
    close(read / W.abs().max(), W / W.abs().max(), 2**-8)
    base.adopt()
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(layer.weight.data.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(dequantised(layer), read)
    x = sample().new_ones(3, 128).requires_grad_()
    close(layer(x), F.linear(x, read, bias_of(layer)), tolerance_of(storage))
    assert torch.autograd.grad(layer(x).sum(), x)[0].abs().sum() > 0


def test_evaluating_in_between_changes_no_number() -> None:
    torch.manual_seed(0)
    base = Base("4-bit", 128, 64).to("cpu")
    inject.inject(base, LoraConfig(r=2, target_modules=["target"]), "a", inject.Adapters())
    inject.activate(base, ["a"])
    disturb(base)
    x = torch.randn(3, 128)
    trained = base.train()(x)
    with torch.no_grad():
        assert torch.equal(base.eval()(x), trained)
    stored = bits(base.target.base_layer)
    merge.merge(base)
    with torch.no_grad():
        base.eval()(x)
    merge.unmerge(base)
    assert all(torch.equal(t, stored[key]) for key, t in bits(base.target.base_layer).items())
    assert torch.equal(base.train()(x), trained)


def test_bitsandbytes_says_nothing_of_its_casts(caplog) -> None:
    base, _ = adapted(PLAIN, "8-bit", exact=False)
    with caplog.at_level(logging.WARNING):
        base(sample())
        logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_all_linear_finds_quantised_layers() -> None:
    base = nn.ModuleDict({name: make(12, 8) for name, make in STORAGES.items()})
    inject.inject(base, LoraConfig(r=2, target_modules="all-linear"), "a", inject.Adapters())
    assert all(isinstance(layer, Adapted) for layer in base.values())


@pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 alone"
)
def test_evaluating_in_between_under_hf_peft() -> None:
    """There the weight is another one from the first evaluation on, and cannot be merged into any more."""
    torch.manual_seed(0)
    base = nn.Sequential(linear_4bit(64, 64)).to("cpu")
    config = {"target_modules": ["0"], "init_lora_weights": False}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**config))
    x = torch.randn(3, 64)
    trained = theirs.train()(x)
    with torch.no_grad():
        theirs.eval()(x)
    assert (theirs.train()(x) - trained).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="must match the size"):
        theirs.merge_adapter()


@pytest.mark.parametrize("storage", STORAGES)
def test_training_a_quantised_module_whole_is_refused(storage) -> None:
    base = nn.ModuleDict({"target": MORE[storage](12, 8), "other": nn.Linear(12, 8)}).to("cpu")
    config = LoraConfig(r=2, target_modules=["other"], modules_to_save=["target"])
    with pytest.raises(TargetError) as raised:
        inject.inject(base, config, "a", inject.Adapters())
    wanted = (
        "target.weight is quantised, so it cannot be trained whole. Leave 'target' out, or put an adapter on "
        "its layers."
    )
    assert str(raised.value) == wanted
    assert type(base["other"]) is nn.Linear
    with pytest.raises(TargetError) as raised:
        inject.inject(base, LNTuningConfig(target_modules=["target"]), "a", inject.Adapters())
    assert str(raised.value) == wanted


@pytest.mark.parametrize("storage", STORAGES)
def test_blocks_of_quantised_layers_know_their_sizes(storage) -> None:
    block = nn.ModuleDict({"q_proj": MORE[storage](12, 8), "norm": nn.LayerNorm(3)}).to("cpu")
    tensors = dict(Layer(block, "block").site.tensors)
    assert (tensors["q_proj.weight"], tensors["norm.weight"]) == ((8, 12), (3,))
