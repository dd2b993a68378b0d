"""C3A, FourierFT, WaveFT, SHiRA, OSF, MiSS: what the laws and the parity do not say, and where HF PEFT is wrong."""

from __future__ import annotations

import warnings

import peft
import pytest
import pywt
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft.tuners.waveft.wavelet import Wavelet
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_dist
from peft_dist import inject
from peft_dist.contract import Site
from peft_dist.errors import BaseLayerError, ConfigError
from peft_dist.methods.weight.shira import ShiraConfig, random_mask
from peft_dist.methods.weight.waveft import FAMILIES, WaveFTConfig
from tests.contract.bases import llama


def disturb(model: nn.Module, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * size)


def linear(in_: int = 12, out: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(in_, out))


def one_layer(config, *names: str, base: nn.Module | None = None):
    base, shared = base or linear().double(), inject.Adapters()
    config.target_modules = ["0"]
    for name in names or ("a",):
        inject.inject(base, config, name, shared)
    inject.activate(base, list(names or ("a",)))
    return base


# C3A


def test_two_c3a_adapters_add() -> None:
    """HF PEFT's second adapter sees what the first one gave, so that it fails unless the layer is square, and is
    wrong there."""
    x, models = torch.randn(3, 8), []
    for library in (peft_dist, peft):
        config = library.C3AConfig(block_size=4, target_modules=["0"])
        model = library.get_peft_model(linear(8, 8), config)
        model.add_adapter("b", config)
        models.append(model)
    ours, theirs = models
    for name in ("default", "b"):
        kernel = theirs.base_model.model[0].c3a_kernel[name]
        with torch.no_grad():
            ours.base_model.model[0].tensors(name)["kernel"].copy_(kernel.copy_(torch.randn(kernel.shape)))
    plain, alone = linear(8, 8)(x), []
    for name in ("default", "b"):
        ours.set_adapter(name), theirs.set_adapter(name)
        alone.append(ours(x) - plain)
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
    for model in models:
        model.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(ours(x), plain + sum(alone), rtol=1e-5, atol=1e-5)
    assert (theirs(x) - ours(x)).abs().max() > 1e-3


def test_what_c3a_passes_on_is_its_gradient() -> None:
    """HF PEFT's backward transforms the kernel the wrong way round for the gradient of the input."""
    x = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    w = torch.randn(2, 2, 4, dtype=torch.double, requires_grad=True)
    assert not torch.autograd.gradcheck(BlockCircularConvolution.apply, (x, w), raise_exception=False)
    config = peft_dist.C3AConfig(block_size=4)
    base = one_layer(config, base=linear(8, 8).double())[0].base
    assert torch.autograd.gradcheck(lambda x, w: config.added({"kernel": w}, base, x), (x, w))


# WaveFT


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_waveft_is_its_inverse_transform(family) -> None:
    """One level of PyWavelets' inverse transform of the four bands, cut to its middle."""
    config = WaveFTConfig(n_frequency=60, wavelet_family=family, scaling=2.0)
    base = one_layer(config, base=linear(13, 9).double())
    disturb(base)
    p = base[0].tensors("a")
    assert FAMILIES[family] == pywt.Wavelet(family).dec_len
    cut = FAMILIES[family] - 2
    rows, columns = 9 + cut + (9 + cut) % 2, 13 + cut + (13 + cut) % 2
    C = torch.zeros(rows, columns, dtype=torch.double)
    row, column = p["places"] // 13 + (rows - 9) // 2, p["places"] % 13 + (columns - 13) // 2
    C[row, column] = p["spectrum"].detach()
    H, W = rows // 2, columns // 2
    bands = (C[:H, :W], (C[:H, W:], C[H:, :W], C[H:, W:]))
    whole = torch.from_numpy(pywt.idwt2(tuple_of(bands), family)) * 2.0
    top, left = (whole.shape[0] - 9) // 2, (whole.shape[1] - 13) // 2
    torch.testing.assert_close(base[0].change(["a"])[0], whole[top : top + 9, left : left + 13])


def tuple_of(bands):
    return bands[0].numpy(), tuple(band.numpy() for band in bands[1])


@pytest.mark.parametrize("family", ["coif4", "coif5"])
def test_their_filters_of_coif4_and_coif5_are_no_wavelets(family) -> None:
    """A filter of an orthogonal wavelet has length 1 and is orthogonal to itself moved by two."""
    for filters, is_right in ((Wavelet(family).rec_lo, False), (pywt.Wavelet(family).rec_lo, True)):
        h = torch.tensor(filters, dtype=torch.double)
        moved = torch.stack([h[2 * k :] @ h[: len(h) - 2 * k] for k in range(len(h) // 2)])
        wanted = torch.zeros(len(h) // 2, dtype=torch.double)
        wanted[0] = 1
        # PyWavelets' own coefficients hold to 1e-6 at the worst.
        assert torch.allclose(moved, wanted, atol=1e-5) is is_right


def test_longer_wavelets_work_where_theirs_fail_in_the_forward() -> None:
    values = {"n_frequency": 20, "wavelet_family": "db12", "target_modules": ["0"]}
    x = torch.randn(2, 12)
    with pytest.raises(ValueError, match="Unknown wavelet name 'db12'"):
        peft.get_peft_model(linear(), peft.WaveFTConfig(**values))(x)
    ours = peft_dist.get_peft_model(linear(), peft_dist.WaveFTConfig(**values))
    disturb(ours)
    assert (ours(x) - linear()(x)).abs().max() > 1e-3


# SHiRA


def test_the_random_mask_is_theirs() -> None:
    for seed in (None, 5):
        theirs = peft.tuners.shira.mask_functions.random_mask(linear()[0], 2, random_seed=seed)
        assert torch.equal(random_mask(linear()[0], 2, random_seed=seed), theirs.bool())


def test_a_mask_of_ones_own(tmp_path) -> None:
    def corner(layer, r, **kwargs):
        mask = torch.zeros_like(layer.weight)
        mask.view(-1)[: r * (layer.in_features + layer.out_features)] = 1
        return mask

    models = []
    for library in (peft_dist, peft):
        with pytest.warns(UserWarning, match="mask_fn"):
            config = library.ShiraConfig(
                r=2, mask_type="corner", target_modules=["q_proj"], task_type="CAUSAL_LM"
            )
        config.mask_fn = corner
        models.append(library.get_peft_model(llama(), config))
        disturb(models[-1])
        models[-1].save_pretrained(tmp_path / library.__name__)
    ids = torch.arange(10).view(2, 5)
    y = models[0](input_ids=ids).logits
    torch.testing.assert_close(y, models[1](input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    mine, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("peft_dist", "peft"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    # The places are in the file: no mask is needed to load it.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for folder in ("peft_dist", "peft"):
            again = peft_dist.PeftModel.from_pretrained(llama(), tmp_path / folder)
            torch.testing.assert_close(again(input_ids=ids).logits, y, rtol=1e-5, atol=1e-5)


def test_masks_that_are_refused() -> None:
    base = linear()
    with pytest.warns(UserWarning, match="'mine' is no mask that is known here"):
        config = ShiraConfig(r=1, mask_type="mine")
    with pytest.raises(ConfigError, match="no mask_fn says which places of 0 are trained"):
        one_layer(config, base=base)
    config.mask_fn = lambda layer, r: torch.ones_like(layer.weight)
    with pytest.raises(BaseLayerError, match=r"0: mask_fn chose 96 places; r = 1 is for 20\."):
        one_layer(config, base=base)
    assert type(base[0]) is nn.Linear


# OSF


def test_osf_needs_no_decomposition_to_load(tmp_path, monkeypatch) -> None:
    ours = peft_dist.get_peft_model(llama(), peft_dist.OSFConfig(task_type="CAUSAL_LM"))
    disturb(ours)
    ours.save_pretrained(tmp_path)
    ids = torch.arange(10).view(2, 5)
    y = ours(input_ids=ids).logits

    def refuse(*_, **__):
        raise AssertionError("a decomposition")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    again = peft_dist.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, y)


@pytest.mark.parametrize(("in_", "out"), [(12, 8), (8, 12), (8, 8)])
def test_osf_leaves_the_high_part_alone(in_, out) -> None:
    """After steps along the gradients U_low and V_low are still orthogonal to the frozen directions."""
    base = one_layer(peft_dist.OSFConfig(effective_rank=3), base=linear(in_, out).double())
    U, _, V = torch.linalg.svd(base[0].base_layer.weight, full_matrices=False)
    p, before = base[0].tensors("a"), base[0].tensors("a")["U_low"].detach().clone()
    for step in range(3):
        x = torch.randn(5, in_, dtype=torch.double, generator=torch.Generator().manual_seed(step))
        trained = {name: t for name, t in p.items() if t.requires_grad}
        gradients = torch.autograd.grad(base(x).square().sum(), list(trained.values()))
        with torch.no_grad():
            for t, gradient in zip(trained.values(), gradients, strict=True):
                t -= 0.01 * gradient
    assert (p["U_low"] - before).abs().max() > 1e-4
    torch.testing.assert_close(
        U[:, :3].T @ p["U_low"], torch.zeros(3, p["U_low"].shape[1], dtype=torch.double)
    )
    torch.testing.assert_close(p["V_low"] @ V[:3].T, torch.zeros(p["V_low"].shape[0], 3, dtype=torch.double))


def test_two_osf_adapters_add() -> None:
    """HF PEFT runs the first one and says nothing."""
    x, outputs = torch.randn(3, 12), []
    for library in (peft_dist, peft):
        config = library.OSFConfig(target_modules=["0"])
        model = library.get_peft_model(linear(), config)
        model.add_adapter("b", config)
        for name, p in model.named_parameters():
            if "S_low" in name:
                p.data += 1.0 if ".b" in name else 0.5
        alone = []
        for names in (["default"], ["b"], ["default", "b"]):
            model.base_model.set_adapter(names)
            alone.append(model(x) - linear()(x))
        outputs.append(alone)
    (first, second, both), (their_first, _, their_both) = outputs
    torch.testing.assert_close(both, first + second, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(their_both, their_first)


def test_osf_without_usual_targets_sits_on_every_linear_layer() -> None:
    config = peft_dist.OSFConfig()
    model = llama()
    model.config.model_type = "unheard_of"
    peft_dist.get_peft_model(model, config)
    assert set(config.target_modules) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


# Messages

SITE = Site("a.b", 8, 12, "linear")
ERRORS = {
    "too many frequencies": (
        lambda: peft_dist.FourierFTConfig(n_frequency=97).params(SITE),
        "FourierFTConfig.n_frequency: 97 at a.b; it lies between 1 and out x in = 8 x 12 = 96.",
    ),
    "an unknown wavelet": (
        lambda: WaveFTConfig(wavelet_family="dbl"),
        "WaveFTConfig.wavelet_family: 'dbl' is not one of db1 to db38, sym2 to sym20, coif1 to coif17. Closest: "
        "'db9'.",
    ),
    "a block that does not divide": (
        lambda: peft_dist.C3AConfig(block_size=8).params(SITE),
        "C3AConfig.block_size: 8 does not divide in = 12 of a.b. Choose a divisor of 4, for this layer by "
        "block_size_pattern.",
    ),
    "an unknown start": (
        lambda: peft_dist.C3AConfig(init_weights="xavier"),
        "C3AConfig.init_weights: 'xavier' is not one of True, False, 'gaussian', 'kaiming_uniform', "
        "'xavier_uniform'. Closest: 'xavier_uniform'.",
    ),
    "bat that does not divide": (
        lambda: peft_dist.MissConfig(r=3, init_weights="bat").params(SITE),
        "MissConfig.r: 3 does not divide both out = 8 and in = 12 of a.b, as init_weights='bat' needs.",
    ),
    "mini that does not divide": (
        lambda: peft_dist.MissConfig(r=3, init_weights="mini", mini_r=3).params(SITE),
        "MissConfig.mini_r: 3 does not divide out = 8 of a.b.",
    ),
    "more rows than there are": (
        lambda: peft_dist.BoneConfig(r=13).params(SITE),
        "BoneConfig.r: 13 at a.b; it lies between 1 and in = 12.",
    ),
    "more numbers than there are": (
        lambda: ShiraConfig(r=5).params(SITE),
        "ShiraConfig.r: 5 asks for 100 numbers at a.b, which has 8 x 12 = 96; it is at most 4 there.",
    ),
    "nothing left to train": (
        lambda: peft_dist.OSFConfig(effective_rank=1.0).params(SITE),
        "OSFConfig.effective_rank: 1.0 keeps 8 of 8 singular values of a.b frozen; it keeps between 1 and 7.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_refused(name) -> None:
    act, message = ERRORS[name]
    with pytest.raises(ConfigError) as raised:
        act()
    assert str(raised.value) == message


def test_bat_on_a_layer_that_stores_its_weight_the_other_way_round() -> None:
    base = one_layer(peft_dist.MissConfig(r=4, init_weights="bat"), base=nn.Sequential(_conv1d()).double())
    disturb(base)
    x = torch.randn(3, 12, dtype=torch.double)
    W, b = base[0].base.weight() + base[0].change(["a"])[0], base[0].base.bias()
    torch.testing.assert_close(base(x), x @ W.T + b)


def test_each_miss_adapter_is_its_own_variant() -> None:
    """HF PEFT goes by the variant of the layer's first adapter."""
    x, given = torch.randn(3, 12), []
    for library in (peft_dist, peft):
        model = library.get_peft_model(linear(), library.MissConfig(r=4, target_modules=["0"]))
        model.add_adapter("b", library.MissConfig(r=4, init_weights="mini", mini_r=2, target_modules=["0"]))
        model.set_adapter("b")
        disturb(model)
        try:
            given.append(model(x) - linear()(x))
        except RuntimeError as error:
            given.append(str(error))
    block = torch.randn(4, 2, generator=torch.Generator().manual_seed(7)) * 0.2
    wanted = x.unflatten(-1, (3, 4)).sum(-2) @ block.repeat(1, 4)
    torch.testing.assert_close(given[0], wanted)
    assert "must match" in given[1]


def _conv1d() -> nn.Module:
    torch.manual_seed(0)
    return Conv1D(8, 12)
