"""Where LoHa, LoKr, VeRA, RandLoRA, VB-LoRA, GraLoRA, DeLoRA and Poly are more than the laws and the comparison
with HF PEFT say: chance while training, projections, small checkpoints, tasks, and HF PEFT's own mistakes.
"""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_dist
from peft_dist.errors import AdapterError, CheckpointError, ConfigError, RowsError, UntrainableError
from peft_dist.methods.weight.lokr import factors
from peft_dist.rows import Rows, uniform
from tests.contract import bases

pytestmark = pytest.mark.filterwarnings("ignore")
LYCORIS = ("LoHaConfig", "LoKrConfig")
Q = {"target_modules": ["q_proj", "v_proj"]}


class One(nn.Module):
    """A base of one layer, called `target`."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        return self.target(x)


def disturb(model: nn.Module, size: float = 0.3, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p) * size)


def one(library, config: str, target: nn.Module, **values) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(library, config)(target_modules=["target"], **values)
    model = library.get_peft_model(One(target), config)
    disturb(model)
    return model


def ids(rows: int = 3) -> Tensor:
    return torch.randint(1, 60, (rows, 5), generator=torch.Generator().manual_seed(3))


# What chance leaves out


def added_by(model: nn.Module, x: Tensor) -> Tensor:
    return model(x) - model.get_base_model().target.base_layer(x)


@pytest.mark.parametrize("name", LYCORIS)
def test_rank_dropout_leaves_out_rows_of_the_update_for_all_of_a_batch(name) -> None:
    more = {"rank_dropout_scale": True} if name == "LoKrConfig" else {}
    model = one(peft_dist, name, nn.Linear(12, 400), rank_dropout=0.25, **more).double()
    x = torch.randn(3, 2, 12, dtype=torch.double)
    whole = added_by(model.eval(), x)
    thinned = added_by(model.train(), x)
    kept = (thinned / whole).flatten(0, 1)
    # One choice for all rows of a batch; what stays is rescaled to the same mean.
    factor = kept.median()
    assert (((kept - factor).abs() < 1e-2) | (kept.abs() < 1e-2)).all()
    rows = kept[0] > 0.5
    assert factor.item() == pytest.approx(400 / rows.sum().item(), rel=1e-3)
    # 400 draws at 0.75: a standard deviation is 8.7, and the bounds are four of them.
    assert 265 < rows.sum() < 335
    assert torch.equal(added_by(model.eval(), x), whole)


def test_rank_dropout_of_lokr_is_rescaled_where_asked() -> None:
    model = one(peft_dist, "LoKrConfig", nn.Linear(12, 400), rank_dropout=0.25)
    x = torch.randn(3, 12)
    whole = added_by(model.eval(), x)
    kept = added_by(model.train(), x) / whole
    assert (((kept - 1).abs() < 1e-2) | (kept.abs() < 1e-2)).all()


@pytest.mark.parametrize("name", LYCORIS)
def test_rank_dropout_of_every_row_is_no_update_where_hf_peft_gives_nan(name) -> None:
    more = {"rank_dropout_scale": True} if name == "LoKrConfig" else {}
    ours = one(peft_dist, name, nn.Linear(12, 2), rank_dropout=0.999, **more)
    theirs = one(peft, name, nn.Linear(12, 2), rank_dropout=0.999, **more)
    x = torch.randn(3, 12)
    assert torch.equal(ours.train()(x), ours.get_base_model().target.base_layer(x))
    assert theirs.train()(x).isnan().all()


@pytest.mark.parametrize("name", LYCORIS)
def test_module_dropout_leaves_out_the_whole_update_of_a_layer(name) -> None:
    model = one(peft_dist, name, nn.Linear(12, 8), module_dropout=0.25).train()
    x = torch.randn(3, 12)
    outputs = [added_by(model, x) for _ in range(300)]
    without = sum(bool((y == 0).all()) for y in outputs)
    # 300 draws at 0.25: a standard deviation is 7.5, and the bounds are four of them.
    assert 45 < without < 105
    whole = added_by(model.eval(), x)
    assert all(torch.allclose(y, whole, atol=1e-5) or not y.any() for y in outputs)


@pytest.mark.parametrize("name", LYCORIS)
def test_what_is_left_out_is_a_function_of_seed_and_step(name) -> None:
    """Not of the batch, of its rows, or of torch's generator."""
    model = one(peft_dist, name, nn.Linear(12, 8), rank_dropout=0.5, module_dropout=0.3).double().train()
    x = torch.randn(4, 3, 12, dtype=torch.double)

    def run(samples, step, x=x):
        with model.using(Rows(samples=torch.tensor(samples), seed=5, step=step)):
            return model(x)

    steps = [run([0, 1, 2, 3], step) for step in range(6)]
    torch.manual_seed(1)
    for step, wanted in enumerate(steps):
        torch.testing.assert_close(run([3, 1], step, x[[3, 1]]), wanted[[3, 1]])
    assert len({y.sum().item() for y in steps}) > 2


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("LoHaConfig", {"r": 3, "rank_dropout": 0.3, "module_dropout": 0.2}),
        ("LoKrConfig", {"r": 1, "rank_dropout": 0.3}),
        ("VeraConfig", {"r": 4, "vera_dropout": 0.2}),
        ("RandLoraConfig", {"r": 4, "randlora_dropout": 0.2}),
        ("VBLoRAConfig", {"vector_length": 8, "num_vectors": 9, "vblora_dropout": 0.2}),
        ("GraloraConfig", {"r": 4, "gralora_dropout": 0.2}),
        ("DeloraConfig", {"r": 4, "module_dropout": 0.2}),
        ("PolyConfig", {"r": 4, "n_tasks": 2}),
    ],
)
def test_training_a_row_does_not_depend_on_its_batch(name, values) -> None:
    """Nor on the adapters that other rows name. float64: sums in another order differ by 1e-16 of their size."""

    def config():
        return getattr(peft_dist, name)(**Q, **values)

    model = peft_dist.get_peft_model(bases.llama().double(), config(), "a")
    model.add_adapter("b", config())
    model.set_requires_grad(["a", "b"], True)
    disturb(model.train(), 0.2)
    names, tasks = ["a", "b", "__base__", "b", "a", "a"], torch.tensor([0, 1, 0, 1, 1, 0])

    def run(rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        more = {"task_ids": tasks[rows]} if name == "PolyConfig" else {}
        chosen = Rows([names[row] for row in rows], torch.tensor(rows), seed=2, step=3)
        with model.using(chosen):
            y = model(input_ids=ids(6)[rows], **more).logits
            y.square().sum().backward()
        return y.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    together, gradients = run([0, 1, 2, 3, 4, 5])
    total = {key: torch.zeros_like(gradient) for key, gradient in gradients.items()}
    for rows in ([5, 2], [0, 3], [1], [4]):
        alone, parts = run(rows)
        torch.testing.assert_close(alone, together[rows], rtol=1e-10, atol=1e-10)
        for key, part in parts.items():
            total[key] += part
    # Small ones are what is left of large ones.
    most = max(gradient.abs().max().item() for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(total[key], gradient, rtol=1e-9, atol=max(1e-10, 1e-13 * most))


def test_vblora_of_the_largest_logits_on_a_half_precision_base(tmp_path) -> None:
    """HF PEFT reads them in fp32 and puts them beside the base's dtype."""
    values = {**Q, "r": 4, "num_vectors": 8, "vector_length": 4, "topk": 1, "save_only_topk_weights": True}
    for library in (peft, peft_dist):
        config = library.VBLoRAConfig(**values)
        model = library.get_peft_model(bases.llama().bfloat16(), config, autocast_adapter_dtype=False)
        model.save_pretrained(tmp_path / library.__name__)
        with pytest.raises(RuntimeError, match="scatter"):
            peft.PeftModel.from_pretrained(
                bases.llama().bfloat16(), tmp_path / library.__name__, autocast_adapter_dtype=False
            )
        loaded = peft_dist.PeftModel.from_pretrained(
            bases.llama().bfloat16(), tmp_path / library.__name__, autocast_adapter_dtype=False
        )
        wanted = model.eval()(input_ids=ids(2)).logits
        torch.testing.assert_close(loaded.eval()(input_ids=ids(2)).logits, wanted, rtol=0, atol=1e-2)


def test_draws_are_uniform() -> None:
    t = uniform((50,), torch.arange(400), (3, -7))
    assert t.shape == (400, 50) and t.min() >= 0 and t.max() < 1
    # 20000 uniform numbers: the mean's standard deviation is 0.002, and neighbours do not correlate.
    assert abs(t.mean() - 0.5) < 0.008
    assert abs(t.var() - 1 / 12) < 0.003
    for a, b in ((t[1:], t[:-1]), (t[:, 1:], t[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.03
    assert torch.equal(uniform((50,), torch.tensor([7]), (3, -7))[0], t[7])


# LoHa and LoKr


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_gradients_of_decomposed_kernels_are_right_where_hf_peft_s_are_not(kind) -> None:
    """HF PEFT takes the other product's part of the kernel for the gradient of each `w_a`."""
    values = {"r": 3, "use_effective_conv2d": True}
    torch.manual_seed(1)
    target = kind(4, 6, 3).double()
    ours = one(peft_dist, "LoHaConfig", copy.deepcopy(target), **values)
    theirs = one(peft, "LoHaConfig", target, **values)
    x = torch.randn(2, 4, *(5,) * (1 if kind is nn.Conv1d else 2), dtype=torch.double)
    theirs.double(), ours.double()
    mine, others = (
        {k.split(".default")[0]: p for k, p in m.named_parameters() if p.requires_grad}
        for m in (ours, theirs)
    )
    with torch.no_grad():
        for key, p in mine.items():
            p.copy_(others[key])
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward(), theirs(x).square().sum().backward()
    for key, p in mine.items():
        small = torch.zeros_like(p)
        small.view(-1)[0] = 1e-6
        with torch.no_grad():
            rise = [ours(x).square().sum() for sign in (1, -2) if p.add_(sign * small) is not None]
            p.add_(small)
        slope = (rise[0] - rise[1]) / 2e-6
        assert p.grad.view(-1)[0].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-6), key
        is_wrong = (others[key].grad - p.grad).abs().max() > 1e-3 * p.grad.abs().max()
        assert is_wrong == key.endswith(("w1_a", "w2_a")), key


@pytest.mark.parametrize("name", LYCORIS)
def test_padding_is_the_layer_s_where_hf_peft_pads_with_zeros(name) -> None:
    torch.manual_seed(1)
    target, x = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), torch.randn(2, 4, 5, 5)
    for library, is_right in ((peft_dist, True), (peft, False)):
        model = one(library, name, copy.deepcopy(target), r=1).eval()
        running = model(x)
        model.merge_adapter()
        assert torch.allclose(model(x), running, atol=1e-4) == is_right


def test_factors_of_sizes() -> None:
    assert [factors(n, -1) for n in (256, 128, 127, 1)] == [(16, 16), (8, 16), (1, 127), (1, 1)]
    assert [factors(128, limit) for limit in (4, 32, 3, 100)] == [(4, 32), (32, 4), (2, 64), (8, 16)]


def test_lokr_is_a_kronecker_product() -> None:
    model = one(peft_dist, "LoKrConfig", nn.Linear(12, 8), r=1, alpha=3, decompose_both=True).double()
    p = {key.split(".")[-1]: t for key, t in model.adapter_tensors().items()}
    first, second = p["lokr_w1_a"] @ p["lokr_w1_b"] if "lokr_w1_a" in p else p["lokr_w1"], None
    second = p["lokr_w2_a"] @ p["lokr_w2_b"] if "lokr_w2_a" in p else p["lokr_w2"]
    x = torch.eye(12, dtype=torch.double)
    torch.testing.assert_close(added_by(model, x).T, 3 * torch.kron(first, second))


# Projections


def projected(**values) -> peft_dist.VeraConfig:
    return peft_dist.VeraConfig(**{"r": 4, **Q, **values})


@pytest.mark.parametrize("name", ["VeraConfig", "RandLoraConfig"])
def test_projections_are_in_a_checkpoint_where_its_config_says_so(name, tmp_path) -> None:
    def make(library, **values):
        return library.get_peft_model(bases.llama(), getattr(library, name)(r=4, **Q, **values))

    model = make(peft_dist)
    disturb(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    shared = [key for key in tensors if key.count(".") == 1]
    assert [key.rpartition("_")[2] for key in sorted(shared)] == ["A", "B"]
    save_file({key: t for key, t in tensors.items() if key not in shared}, path)
    with pytest.raises(CheckpointError, match=r"lacks '\w+_A', though its config has save_projection=True"):
        peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path)
    # The key draws them again, whoever drew them first.
    unsaved = getattr(peft_dist, name).from_pretrained(tmp_path)
    unsaved.save_projection = False
    again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, config=unsaved)
    assert torch.equal(again(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits)
    save_file(tensors, path)
    with pytest.warns(UserWarning, match="save_projection=False: it is drawn again"):
        peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, config=unsaved)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["VeraConfig", "RandLoraConfig"])
def test_projections_that_are_not_saved_are_warned_of(name) -> None:
    for library in (peft, peft_dist):
        with pytest.warns(UserWarning, match="projection_prng_key"):
            getattr(library, name)(save_projection=False)


@pytest.mark.parametrize("name", ["VeraConfig", "RandLoraConfig"])
def test_adapters_of_one_model_have_one_key(name) -> None:
    for library in (peft, peft_dist):
        config = getattr(library, name)
        model = library.get_peft_model(bases.llama(), config(r=4, **Q))
        for values in ({"projection_prng_key": 1}, {"save_projection": False}):
            with pytest.raises(ValueError, match=r"same|multiple different"):
                model.add_adapter("other", config(r=4, **Q, **values))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("smaller", config(r=2, target_modules=["k_proj"]))


def test_several_vera_adapters_have_projections_of_their_own_sizes() -> None:
    model = peft_dist.get_peft_model(bases.llama(), projected())
    model.add_adapter("wide", projected(r=6, target_modules=["q_proj", "down_proj"]))
    disturb(model)
    shapes = {
        name: tuple(peft_dist.get_peft_model_state_dict(model, adapter_name=name)["base_model.vera_A"].shape)
        for name in ("default", "wide")
    }
    assert shapes == {"default": (4, 16), "wide": (6, 24)}
    model.eval()
    mixed = model(input_ids=ids(), adapter_names=["wide", "__base__", "default"]).logits
    for row, name in enumerate(("wide", "__base__", "default")):
        alone = model(input_ids=ids()[row : row + 1], adapter_names=[name]).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    model.delete_adapter("default")
    assert not any("vera" in key and "default" in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["VeraConfig", "RandLoraConfig"])
def test_an_adapter_s_projections_are_of_its_own_layers_sizes(name, tmp_path) -> None:
    """In HF PEFT all adapters of a model have the first one's: one on a larger layer is refused, and one
    that is saved without them is another when it is loaded alone."""

    def made(library, first: str, second: str):
        values = {"r": 4, "save_projection": False, "init_weights": False}
        config = getattr(library, name)
        model = library.get_peft_model(bases.llama(), config(target_modules=[first], **values))
        model.add_adapter("second", config(target_modules=[second], **values))
        model.set_adapter("second")
        return model.eval()

    for library, is_right in ((peft_dist, True), (peft, False)):
        if is_right:
            made(library, "q_proj", "down_proj")(input_ids=ids())
        else:
            with pytest.raises(ValueError, match="24 or greater is required"):
                made(library, "q_proj", "down_proj")
        model = made(library, "down_proj", "q_proj")
        wanted = model(input_ids=ids()).logits
        model.save_pretrained(tmp_path / library.__name__)
        alone = library.PeftModel.from_pretrained(bases.llama(), tmp_path / library.__name__ / "second")
        assert torch.allclose(alone(input_ids=ids()).logits, wanted, atol=1e-4) == is_right


@pytest.mark.parametrize(("name", "key"), [("VeraConfig", "vera"), ("RandLoraConfig", "randlora")])
def test_adapters_share_the_memory_of_equal_projections(name, key) -> None:
    names = ("default", "same", "other")

    def addresses() -> list[int]:
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        found = [getattr(layer, f"{key}_{which}")[name].data_ptr() for which in "AB" for name in names]
        assert found == [
            getattr(model, f"{key}_{which}")[name].data_ptr() for which in "AB" for name in names
        ]
        return found

    def config(r: int = 4):
        return getattr(peft_dist, name)(r=r, **Q)

    model = peft_dist.get_peft_model(bases.llama(), config())
    model.add_adapter("same", config())
    model.add_adapter("other", config(r=6))
    disturb(model)
    for _ in range(2):
        first, second, third, *more = addresses()
        assert first == second != third
        assert more[0] == more[1] != more[2]
        model.bfloat16().float()
    before = model.eval()(input_ids=ids()).logits
    # A file whose projections were drawn elsewhere changes its own adapter alone.
    tensors = peft_dist.get_peft_model_state_dict(model)
    shared = [name for name in tensors if name.count(".") == 1]
    peft_dist.set_peft_model_state_dict(model, {**tensors, **{k: tensors[k] * 2 for k in shared}}, "same")
    assert len(set(addresses())) == 6
    assert torch.equal(model(input_ids=ids()).logits, before)
    peft_dist.set_peft_model_state_dict(model, tensors, "same")
    assert len(set(addresses())) == 4
    model.delete_adapter("default")
    assert getattr(model, f"{key}_A")["same"].abs().sum() > 0


def test_projections_on_a_half_precision_base_are_as_drawn_where_hf_peft_rounds_them() -> None:
    """HF PEFT casts them to the base's dtype and back; here they are the fp32 tensors of the key."""
    exact = peft_dist.get_peft_model_state_dict(peft_dist.get_peft_model(bases.llama(), projected()))
    half = peft_dist.get_peft_model_state_dict(
        peft_dist.get_peft_model(bases.llama().bfloat16(), projected())
    )
    config = peft.VeraConfig(r=4, **Q)
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(bases.llama().bfloat16(), config))
    for key in ("base_model.vera_A", "base_model.vera_B"):
        assert torch.equal(exact[key], half[key])
        assert torch.equal(theirs[key], half[key].bfloat16().float())


@pytest.mark.parametrize(
    ("name", "values"),
    [("VeraConfig", {"r": 4}), ("RandLoraConfig", {"r": 4}), ("VBLoRAConfig", {"vector_length": 8})],
)
def test_methods_whose_layers_share_tensors_need_a_model_around_the_base(name, values) -> None:
    """HF PEFT refuses VeRA and VB-LoRA; RandLoRA, which shares as VeRA does, it injects."""
    base = bases.llama()
    with pytest.raises(
        AdapterError, match=r"share tensors, which a bare base cannot hold\. Use get_peft_model"
    ):
        peft_dist.inject_adapter_in_model(getattr(peft_dist, name)(**Q, **values), base)
    assert set(base.state_dict()) == set(bases.llama().state_dict())
    if name == "RandLoraConfig":
        peft.inject_adapter_in_model(getattr(peft, name)(**Q, **values), base)
    else:
        with pytest.raises(ValueError, match="uses shared state"):
            peft.inject_adapter_in_model(getattr(peft, name)(**Q, **values), base)


# Quantised bases on which HF PEFT fails


def quantised(bits: int, in_: int, out: int) -> nn.Module:
    if bits == 4:
        return bnb.nn.Linear4bit(in_, out, quant_type="nf4").to("cpu")
    return bnb.nn.Linear8bitLt(in_, out, has_fp16_weights=False).to("cpu")


def marked(library, config: str, target: nn.Module, bits: int, **values) -> nn.Module:
    """HF PEFT asks the model, not the layer, whether it is quantised."""
    torch.manual_seed(0)
    base = One(target)
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = bits == 8, bits == 4
    model = library.get_peft_model(base, getattr(library, config)(target_modules=["target"], **values))
    disturb(model)
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_randlora_merges_into_a_quantised_base(bits) -> None:
    """HF PEFT multiplies the two factors the wrong way round: an error, or in a square layer a wrong weight."""
    values = {"r": 5, "randlora_alpha": 2}
    x = torch.randn(4, 12)
    # A quantised weight moves by half a step: 2^-8 of a row's largest in 8 bits, 0.15 of it in 4.
    step = {8: 2**-6, 4: 0.25}[bits]
    for out in (12, 8):
        model = marked(peft_dist, "RandLoraConfig", quantised(bits, 12, out), bits, **values).train()
        wanted = model(x)
        model.merge_adapter()
        assert (model(x) - wanted).abs().max() < step * wanted.abs().max()
    theirs = marked(peft, "RandLoraConfig", quantised(bits, 12, 8), bits, **values)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        theirs.merge_adapter()
    if bits == 8:
        values["r"] = 6
        theirs = marked(peft, "RandLoraConfig", quantised(bits, 12, 12), bits, **values).train()
        wanted = theirs(x)
        theirs.merge_adapter()
        assert (theirs(x) - wanted).abs().max() > 0.2 * wanted.abs().max()


FAILING = [
    ("GraloraConfig", {"r": 4}, 8),
    ("GraloraConfig", {"r": 4}, 4),
    ("LoHaConfig", {"r": 2}, 8),
    ("LoHaConfig", {"r": 2}, 4),
    ("LoKrConfig", {"r": 1}, 8),
    ("LoKrConfig", {"r": 1}, 4),
    ("DeloraConfig", {"r": 2}, 8),
    ("DeloraConfig", {"r": 2}, 4),
    ("VBLoRAConfig", {"num_vectors": 9, "vector_length": 4}, 8),
    ("VBLoRAConfig", {"num_vectors": 9, "vector_length": 4}, 4),
]


@pytest.mark.parametrize(("name", "values", "bits"), FAILING)
def test_training_and_merging_on_a_quantised_base_work_where_hf_peft_fails(name, values, bits) -> None:
    def use(library):
        model = marked(library, name, quantised(bits, 12, 8), bits, **values).train()
        x = torch.randn(3, 5, 12, requires_grad=True)
        model(x).sum().backward()
        model.merge_adapter()
        return x.grad

    assert use(peft_dist).abs().sum() > 0
    with pytest.raises(RuntimeError):
        use(peft)


@pytest.mark.parametrize("bits", [8, 4])
def test_poly_trains_on_a_quantised_base_where_hf_peft_fails(bits) -> None:
    """HF PEFT adds in place to what bitsandbytes gave."""
    for library in (peft_dist, peft):
        model = marked(library, "PolyConfig", quantised(bits, 12, 8), bits, r=2, n_tasks=2).train()
        x = torch.randn(3, 5, 12, requires_grad=True)
        if library is peft:
            with pytest.raises(RuntimeError, match="inplace"):
                model.base_model(x, task_ids=TASKS % 2).sum().backward()
        else:
            model.base_model(x, task_ids=TASKS % 2).sum().backward()
            assert x.grad.abs().sum() > 0


def test_poly_reads_task_ids_without_a_task_type_and_of_rows_without_positions() -> None:
    for x in (torch.randn(3, 5, 12), torch.randn(3, 12)):
        model = one(peft_dist, "PolyConfig", nn.Linear(12, 8), r=2, n_tasks=3).eval()
        got = model(x, task_ids=TASKS)
        for row in range(3):
            alone = model(x[row : row + 1], task_ids=TASKS[row : row + 1])
            torch.testing.assert_close(got[row : row + 1], alone)
        theirs = one(peft, "PolyConfig", nn.Linear(12, 8), r=2, n_tasks=3)
        with pytest.raises(TypeError, match="task_ids"):
            theirs(x, task_ids=TASKS)


# VB-LoRA


@pytest.mark.parametrize("num_vectors", [9, 300])
def test_small_checkpoints_of_vblora_are_hf_peft_s_and_infer_alone(num_vectors, tmp_path) -> None:
    values = {"num_vectors": num_vectors, "vector_length": 8, "save_only_topk_weights": True, "topk": 3, **Q}
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.VBLoRAConfig(**values))
    disturb(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(bases.llama(), tmp_path / "ours")
    wanted = ours.eval()(input_ids=ids()).logits
    torch.testing.assert_close(theirs(input_ids=ids()).logits, wanted, rtol=1e-5, atol=1e-5)
    trained = peft.get_peft_model(bases.llama(), peft.VBLoRAConfig(**values))
    disturb(trained)
    trained.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: (t.shape, t.dtype) for k, t in files[0].items()} == {
        k: (t.shape, t.dtype) for k, t in files[1].items()
    }
    again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "theirs")
    torch.testing.assert_close(
        again(input_ids=ids()).logits, trained.eval()(input_ids=ids()).logits, rtol=1e-5, atol=1e-5
    )
    again.merge_and_unload()
    for library in (peft_dist, peft):
        further = library.PeftModel.from_pretrained(bases.llama(), tmp_path / "theirs", is_trainable=True)
        further.eval()(input_ids=ids())
        with pytest.raises(RuntimeError, match="save_only_topk_weights"):
            further.train()(input_ids=ids())
    with pytest.raises(UntrainableError, match=r"q_proj: .* infinite, so it cannot be trained further"):
        peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "ours").train()(input_ids=ids())


@pytest.mark.parametrize("num_vectors", [9, 300])
def test_what_a_checkpoint_of_vblora_takes_is_hf_peft_s_count(num_vectors, capsys) -> None:
    for more in ({}, {"save_only_topk_weights": True, "topk": 3, "bias": "vblora_only"}):
        values = {"num_vectors": num_vectors, "vector_length": 8, **Q, **more}
        counts, printed = [], []
        for library in (peft_dist, peft):
            model = library.get_peft_model(bases.llama(), library.VBLoRAConfig(**values))
            counts.append(model.get_nb_savable_parameters())
            model.print_savable_parameters()
            printed.append(capsys.readouterr().out)
        assert counts[0] == counts[1]
        assert printed[0] == printed[1]


def test_one_bank_gets_the_gradient_of_every_layer() -> None:
    config = peft_dist.VBLoRAConfig(num_vectors=9, vector_length=8, **Q)
    model = peft_dist.get_peft_model(bases.llama(), config)
    banks = [p for key, p in model.named_parameters() if "vector_bank" in key]
    assert len(banks) == 1 and banks[0].requires_grad
    disturb(model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    whole, parts = banks[0].grad.clone(), torch.zeros_like(banks[0])
    for layer in (0, 1):
        for name in ("q_proj", "v_proj"):
            model.zero_grad()
            others = [
                module
                for path, module in model.named_modules()
                if hasattr(module, "shared") and f"layers.{layer}.self_attn.{name}" not in path
            ]
            kept = [module.shared for module in others]
            for module, shared in zip(others, kept, strict=True):
                module.shared = lambda a, shared=shared: {k: t.detach() for k, t in shared(a).items()}
            model(input_ids=ids(), labels=ids()).loss.backward()
            parts += banks[0].grad
            for module in others:
                del module.shared
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-7)


# Poly


POLY = {"r": 3, "n_tasks": 3, "n_skills": 2, "n_splits": 2, "task_type": "CAUSAL_LM", **Q}
TASKS = torch.tensor([2, 0, 2])


def poly() -> peft_dist.PeftModel:
    model = peft_dist.get_peft_model(bases.llama(), peft_dist.PolyConfig(**POLY))
    disturb(model)
    return model


def test_poly_draws_as_hf_peft_does_while_training(tmp_path) -> None:
    ours = poly()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(bases.llama(), tmp_path, is_trainable=True)
    outputs, gradients = [], []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(5)
        outputs.append(model(input_ids=ids(), labels=ids(), task_ids=TASKS))
        outputs[-1].loss.backward()
        gradients.append(
            {k.split("poly_")[0]: p.grad for k, p in model.named_parameters() if "module_logits" in k}
        )
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-7)
    assert not torch.equal(outputs[0].logits, ours(input_ids=ids(), task_ids=TASKS).logits)


def test_poly_draws_for_each_sample_alone() -> None:
    model = poly().double().train()

    def run(samples, tasks):
        rows = Rows(samples=torch.tensor(samples), seed=5, step=2)
        with model.using(rows):
            return model(input_ids=ids(4)[samples], task_ids=torch.tensor(tasks)).logits

    wanted = run([0, 1, 2, 3], [0, 1, 2, 0])
    torch.testing.assert_close(run([3, 1], [0, 1]), wanted[[3, 1]])
    assert not torch.allclose(run([3, 1], [0, 1]), run([3, 1], [1, 1]))


def test_poly_says_which_task_ids_it_needs() -> None:
    model = poly().eval()
    with pytest.raises(RowsError, match=r"q_proj: PolyConfig needs task_ids, one entry per sequence"):
        model(input_ids=ids())
    with pytest.raises(
        RowsError, match=r"q_proj: task_ids holds 3, but the adapter has 3 tasks, counted from 0"
    ):
        model(input_ids=ids(), task_ids=torch.tensor([0, 3, 1]))
    with pytest.raises(RowsError, match=r"2 task_ids for an input of 3 rows. Give one per sequence"):
        model(input_ids=ids(), task_ids=torch.tensor([0, 1]))
    with pytest.raises(RowsError, match=r"task_ids has 2 entries for 3 sequences"):
        model(
            input_ids=ids(), task_ids=torch.tensor([0, 1]), adapter_names=["default", "__base__", "default"]
        )
    with model.disable_adapter():
        model(input_ids=ids())


def test_poly_beside_others_row_by_row() -> None:
    model = poly()
    model.add_adapter("second", peft_dist.PolyConfig(**{**POLY, "n_tasks": 2}))
    model.add_adapter("lora", peft_dist.LoraConfig(**Q, task_type="CAUSAL_LM"))
    for name in ("second", "lora"):
        model.set_requires_grad(name, True)
    disturb(model, seed=3)
    model.eval()
    names, tasks = ["second", "lora", "default", "__base__", "default"], torch.tensor([1, 0, 2, 0, 1])
    mixed = model(input_ids=ids(5), task_ids=tasks, adapter_names=names).logits
    for row, name in enumerate(names):
        one_row = {"input_ids": ids(5)[row : row + 1], "task_ids": tasks[row : row + 1]}
        alone = model(**one_row, adapter_names=[name]).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_poly_generates_by_task(num_beams) -> None:
    model = poly().eval()
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": num_beams}
    together = model.generate(input_ids=ids(), task_ids=TASKS, **how)
    for row in range(3):
        alone = model.generate(input_ids=ids()[row : row + 1], task_ids=TASKS[row : row + 1], **how)
        assert torch.equal(alone[0], together[row][: alone.shape[1]])


def test_poly_under_gradient_checkpointing() -> None:
    model = poly().train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with model.using(Rows(samples=torch.arange(3), seed=1, step=4)):
            model(input_ids=ids(), labels=ids(), task_ids=TASKS).loss.backward()
        gradients.append({k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-8)


# What programs read of a layer


@pytest.mark.parametrize(
    ("name", "values", "names"),
    [
        ("LoHaConfig", {"r": 3}, ("r", "alpha", "scaling", "rank_dropout", "module_dropout")),
        ("LoKrConfig", {"r": 1, "alpha": 3}, ("r", "alpha", "scaling", "rank_dropout", "module_dropout")),
        ("VeraConfig", {"r": 3}, ("r",)),
        ("RandLoraConfig", {"r": 3}, ("r", "scaling")),
        ("VBLoRAConfig", {"num_vectors": 9, "vector_length": 8}, ("r", "topk")),
        ("GraloraConfig", {"r": 4, "hybrid_r": 2}, ("r", "hybrid_r", "alpha", "scaling", "gralora_k")),
        ("DeloraConfig", {"r": 3, "rank_pattern": {"q_proj": 2}}, ("r",)),
        ("PolyConfig", {"r": 3}, ("r", "n_tasks", "n_skills", "n_splits", "poly_type")),
    ],
)
def test_layers_tell_what_hf_peft_s_tell(name, values, names) -> None:
    layers = []
    for library in (peft_dist, peft):
        model = library.get_peft_model(bases.llama(), getattr(library, name)(**Q, **values))
        layers.append(model.base_model.model.model.layers[0].self_attn.q_proj)
    for attribute in names:
        assert getattr(layers[0], attribute) == getattr(layers[1], attribute), attribute


# What a layer or a config refuses


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("GraloraConfig", {"r": 6, "gralora_k": 3}, r"q_proj: gralora_k 3 does not divide its in size 16"),
        ("VBLoRAConfig", {"vector_length": 5}, r"q_proj: vector_length 5 does not divide its in size 16"),
        ("PolyConfig", {"n_splits": 3}, r"q_proj: n_splits 3 does not divide its in size 16"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_the_layer_s_name(name, values, message) -> None:
    base = bases.llama()
    before = set(base.state_dict())
    with pytest.raises(ValueError, match=message):
        peft_dist.get_peft_model(base, getattr(peft_dist, name)(**Q, **values))
    assert set(base.state_dict()) == before
    assert not any("Adapted" in type(module).__name__ for module in base.modules())


@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig", "VeraConfig", "DeloraConfig", "PolyConfig"])
def test_layers_that_a_method_does_not_know_are_refused(name) -> None:
    config = getattr(peft_dist, name)(target_modules=["embed_tokens"], r=2)
    with pytest.raises(ValueError, match=r"embed_tokens' is a Embedding; \w+ sits on"):
        peft_dist.get_peft_model(bases.llama(), config)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("GraloraConfig", {"r": 5}, r"GraloraConfig.r: 5; gralora_k, which is 2, must divide it"),
        ("VBLoRAConfig", {"topk": 300}, r"VBLoRAConfig.topk: 300; it is at most num_vectors, which is 256"),
        (
            "VeraConfig",
            {"bias": "some"},
            r"VeraConfig.bias: 'some' is not one of none, all, vera_only",
        ),
        (
            "LoHaConfig",
            {"rank_pattern": {"q": 0}},
            r"LoHaConfig.rank_pattern\['q'\]: 0; a rank is a whole number",
        ),
        ("LoKrConfig", {"init_weights": "pissa"}, r"LoKrConfig.init_weights: 'pissa' is not one of"),
        ("PolyConfig", {"poly_type": "mhr"}, r"PolyConfig.poly_type: 'mhr' is not 'poly'"),
        (
            "LoHaConfig",
            {"layers_pattern": "h"},
            r"LoHaConfig.layers_pattern: `layers_to_transform` must be given",
        ),
    ],
)
def test_configs_that_contradict_themselves_are_refused(name, values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        getattr(peft_dist, name)(**values)


@pytest.mark.filterwarnings("default")
def test_patterns_that_match_no_layer_are_warned_of() -> None:
    config = peft_dist.DeloraConfig(target_modules=["q_proj"], lambda_pattern={"q_prj": 3, "q_proj": 2})
    with pytest.warns(
        UserWarning, match=r"lambda_pattern: 'q_prj' matched no adapted layer .* Similar: 'q_proj'"
    ):
        peft_dist.get_peft_model(bases.llama(), config)
