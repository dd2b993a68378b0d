"""OFT, BOFT, HRA: against HF PEFT on convolutions, the dense formulas, dropout, and where HF PEFT is wrong."""

from __future__ import annotations

import itertools
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

import peft_dist
from peft_dist import inject
from peft_dist.contract import Site
from peft_dist.errors import ConfigError
from peft_dist.methods.activation.boft import BOFTConfig, butterfly
from peft_dist.methods.activation.hra import HRAConfig
from peft_dist.methods.activation.oft import OFTConfig, nearest_divisor
from peft_dist.rows import Rows
from tests.contract.bases import llama

METHODS = {
    "OFT": {"oft_block_size": 4},
    "OFT by an inverse": {"oft_block_size": 4, "use_cayley_neumann": False, "coft": True, "eps": 0.3},
    "BOFT": {"boft_block_size": 4},
    "HRA": {"r": 4},
    "HRA of orthogonal directions": {"r": 4, "apply_GS": True, "init_weights": False},
}


class Net(nn.Module):
    """Two convolutions; no model of transformers."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 8, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(8, 4, kernel, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def disturb(model: nn.Module, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * size)


def configs(name: str):
    values = {**METHODS[name], "target_modules": ["first", "second"]}
    return (getattr(library, f"{name.partition(' ')[0]}Config")(**values) for library in (peft_dist, peft))


def pair(name: str, tmp_path, kernel: int):
    _, others = configs(name)
    theirs = peft.get_peft_model(Net(kernel), others)
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    return peft_dist.PeftModel.from_pretrained(Net(kernel), tmp_path, is_trainable=True), theirs


@pytest.mark.parametrize(("name", "kernel"), itertools.product(METHODS, (1, 3)))
def test_convolutions_merged_are_theirs(name, kernel, tmp_path) -> None:
    """For OFT with larger kernels HF PEFT's merge is right where its forward is not."""
    ours, theirs = pair(name, tmp_path, kernel)
    x = torch.randn(2, 4, 9, 9)
    y = ours(x)
    torch.testing.assert_close(y, theirs.merge_and_unload()(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.merge_and_unload()(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kernel"), [(name, k) for name in METHODS for k in (1, 3) if k == 1 or name[0] != "O"]
)
def test_convolutions_and_their_gradients_are_theirs(name, kernel, tmp_path) -> None:
    ours, theirs = pair(name, tmp_path, kernel)
    x = torch.randn(2, 4, 9, 9)
    got, wanted = ours(x), theirs(x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    got.square().sum().backward(), wanted.square().sum().backward()
    others = {key.replace(".default", ""): p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    for key, p in ours.adapter_tensors().items():
        torch.testing.assert_close(p.grad, others[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["BOFT", "HRA"])
def test_convolutions_with_groups_are_turned_where_theirs_are_refused(name) -> None:
    """Each row of W, which sees its own group's channels, is turned."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 6, 3, groups=2))

    mine, others = (
        getattr(library, f"{name}Config")(**METHODS[name], target_modules=["0"])
        for library in (peft_dist, peft)
    )
    with pytest.raises(NotImplementedError, match="groups > 1"):
        peft.get_peft_model(base(), others)
    model, x = peft_dist.get_peft_model(base(), mine), torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(model(x), base()(x), rtol=1e-5, atol=1e-5)
    disturb(model)
    y = model(x)
    assert (y - base()(x)).abs().max() > 1e-2
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), y, rtol=1e-5, atol=1e-5)
    if name == "HRA":  # BOFT also scales rows
        W, before = (each.weight.flatten(1) for each in (merged[0], base()[0]))
        torch.testing.assert_close(W @ W.mT, before @ before.mT, rtol=1e-4, atol=1e-5)


def test_a_new_oft_adapter_on_a_convolution_changes_nothing() -> None:
    """HF PEFT's fold sums where patches overlap; its new adapter changes what the layer gives."""
    mine, others = configs("OFT")
    x = torch.randn(2, 4, 9, 9)
    plain = Net()(x)
    torch.testing.assert_close(peft_dist.get_peft_model(Net(), mine)(x), plain, rtol=1e-6, atol=1e-6)
    assert (peft.get_peft_model(Net(), others)(x) - plain).abs().max() > 0.5


def one_layer(config, in_: int, out: int = 6):
    base, shared = nn.Sequential(nn.Linear(in_, out)).double(), inject.Adapters()
    config.target_modules = ["0"]
    inject.inject(base, config, "a", shared)
    inject.activate(base, ["a"])
    disturb(base, 0.5)
    return base, shared


@pytest.mark.parametrize(("b", "m", "size"), [(2, 1, 8), (2, 2, 8), (4, 3, 16), (6, 2, 24), (4, 2, 24)])
def test_boft_is_its_product_of_permuted_blocks(b, m, size) -> None:
    """By matrices, as the paper writes it: B = prod P diag(R) P^T; HF PEFT without CUDA makes m = 1 of it."""
    base, _ = one_layer(BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m), size)
    p = base[0].tensors("a")
    B = torch.eye(size, dtype=torch.double)
    for i in range(m):
        blocks = []
        for A in p["R"][i]:
            Q, I = (A - A.T) / 2, torch.eye(b, dtype=torch.double)
            blocks.append((I - Q) @ torch.linalg.inv(I + Q))
        P = torch.eye(size, dtype=torch.double)[butterfly(size, b, i)]
        B = P @ torch.block_diag(*blocks) @ P.T @ B
    layer = base[0].base_layer
    torch.testing.assert_close(B @ B.T, torch.eye(size, dtype=torch.double))
    x = torch.randn(3, size, dtype=torch.double)
    wanted = x @ (p["s"] * (layer.weight @ B.T)).T + layer.bias
    torch.testing.assert_close(base(x), wanted)
    if m > 1:
        config = peft.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=["0"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(nn.Sequential(nn.Linear(size, 6)), config)
        assert theirs.base_model.model[0].boft_R["default"].shape[0] == 1


def test_a_butterfly_pairs_ever_larger_blocks() -> None:
    """Blocks of 2: at factor i the first of every pair in a stretch of 2^(i+1) entries stand before the second."""
    assert butterfly(8, 2, 0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert butterfly(8, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert butterfly(8, 2, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("apply_GS", [False, True])
def test_hra_is_its_chain_of_reflections(apply_GS) -> None:
    base, _ = one_layer(HRAConfig(r=3, apply_GS=apply_GS), 8)
    u, layer = base[0].tensors("a")["u"].detach(), base[0].base_layer
    M, done = torch.eye(8, dtype=torch.double), []
    for column in u.T:
        for other in done if apply_GS else ():
            column = column - (other @ column) * other
        done.append(column / column.norm())
        M = M @ (torch.eye(8, dtype=torch.double) - 2 * torch.outer(done[-1], done[-1]))
    x = torch.randn(3, 8, dtype=torch.double)
    torch.testing.assert_close(base(x), x @ (layer.weight @ M).T + layer.bias)


def test_hra_with_gram_schmidt_starts_at_directions_of_their_own() -> None:
    """HF PEFT starts it at pairs of the same direction, and divides what rounding leaves by its length."""
    values = {"r": 4, "apply_GS": True, "target_modules": ["q_proj"]}
    ranks = []
    for library in (peft_dist, peft):
        model = library.get_peft_model(llama(), library.HRAConfig(**values))
        u = next(p for name, p in model.named_parameters() if "hra_u" in name)
        ranks.append(int(torch.linalg.matrix_rank(u.detach())))
    assert ranks == [4, 2]


def test_hra_on_an_8_bit_layer_reads_its_weight() -> None:
    """HF PEFT reflects the stored codes, whole numbers up to 127, and says nothing."""
    x, wrong = torch.randn(3, 12), []
    for library in (peft_dist, peft):
        torch.manual_seed(0)
        base = nn.Sequential(bnb.nn.Linear8bitLt(12, 8, has_fp16_weights=False, bias=False)).to("cpu")
        W = bnb.functional.int8_vectorwise_dequant(base[0].weight.data, base[0].weight.SCB)
        model = library.get_peft_model(base, library.HRAConfig(r=4, target_modules=["0"]))
        wrong.append((model(x) - x @ W.T).abs().max().item())
    # A new adapter changes nothing; x is rounded to 127 steps too.
    assert wrong[0] < 0.05 and wrong[1] > 10


@pytest.mark.parametrize(
    ("config", "blocks", "out_of"),
    [
        (lambda p: OFTConfig(oft_block_size=2, module_dropout=p), 8, 8),
        (lambda p: BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=p), 8, 16),
    ],
)
def test_dropout_replaces_a_share_of_the_blocks_by_the_identity(config, blocks, out_of) -> None:
    base, shared = one_layer(config(0.5), 16)
    wrapper = base[0]

    def thinned() -> int:
        p = wrapper.given("a")
        R = wrapper.methods["a"].rotation(p).flatten(0, -3)
        assert len(R) == out_of
        return sum(torch.equal(block, torch.eye(2, dtype=torch.double)) for block in R)

    assert [thinned() for _ in range(5)] == [blocks // 2] * 5
    x = torch.randn(3, 16, dtype=torch.double)
    assert not torch.equal(base(x), base(x))
    base.eval()
    assert torch.equal(base(x), base(x)) and thinned() == 0
    base.train()
    # dW is without chance, also while training.
    assert torch.equal(wrapper.change(["a"])[0], wrapper.change(["a"])[0])
    # The same draw for the same step, whatever the rows.
    shared.current.rows = Rows(adapters=("a",) * 3, samples=torch.arange(3), seed=1, step=2)
    whole = base(x)
    shared.current.rows = Rows(adapters=("a",), samples=torch.arange(2, 3), seed=1, step=2)
    torch.testing.assert_close(base(x[2:]), whole[2:])


def test_module_dropout_of_oft_has_an_effect() -> None:
    """HF PEFT makes the module that drops out and never calls it."""
    with torch.no_grad():
        theirs = peft.get_peft_model(
            Net(1), peft.OFTConfig(oft_block_size=2, module_dropout=0.5, target_modules=["first"])
        )
        disturb(theirs)
        x = torch.randn(2, 4, 5, 5)
        assert theirs.train() and torch.equal(theirs(x), theirs(x))
        ours = peft_dist.get_peft_model(
            Net(1), OFTConfig(oft_block_size=2, module_dropout=0.5, target_modules=["first"])
        )
        disturb(ours)
        seen = [ours.train()(x) for _ in range(8)]
        assert not all(torch.equal(y, seen[0]) for y in seen)


def test_coft_is_projected_at_every_use(tmp_path) -> None:
    mine, others = (
        library.OFTConfig(oft_block_size=4, coft=True, eps=0.1, target_modules=["first"])
        for library in (peft_dist, peft)
    )
    for model in (peft_dist.get_peft_model(Net(1), mine), peft.get_peft_model(Net(1), others)):
        disturb(model)
        Q = next(p for p in model.parameters() if p.requires_grad)
        model(torch.randn(1, 4, 5, 5))
        # Two entries of a skew matrix for each that is trained; one block.
        assert ((2 * Q.square().sum(1)).sqrt() <= 0.1 * (1 + 1e-6)).all()


def test_two_forwards_before_a_backward_with_coft() -> None:
    base, _ = one_layer(OFTConfig(oft_block_size=4, coft=True, eps=0.1), 8)
    x = torch.randn(3, 8, dtype=torch.double)
    (base(x) + base(2 * x)).sum().backward()
    assert base[0].tensors("a")["Q"].grad.abs().sum() > 0


def test_the_nearest_divisor_is_theirs() -> None:
    layer = peft.tuners.oft.layer.OFTLayer
    for size in (1, 7, 12, 16, 36, 40, 97):
        for wish in range(1, 2 * size + 2):
            theirs = wish
            if size % wish or wish > size:
                theirs = layer.adjust_oft_parameters(None, size, wish)
            assert nearest_divisor(size, wish) == theirs


SITE = Site("a.b", 8, 12, "linear")
ERRORS = {
    "OFT of both": (
        lambda: OFTConfig(r=2, oft_block_size=4),
        "OFTConfig: r = 2 and oft_block_size = 4; one of them is given, the other is 0, since r x oft_block_size "
        "= in.",
    ),
    "BOFT of neither": (
        lambda: BOFTConfig(boft_block_size=0),
        "BOFTConfig: boft_block_size = 0 and boft_block_num = 0; one of them is given, the other is 0, since "
        "their product is in.",
    ),
    "BOFT that does not divide": (
        lambda: BOFTConfig(boft_block_size=5).params(SITE),
        "BOFTConfig.boft_block_size: 5 does not divide in = 12 of a.b.",
    ),
    "BOFT with too many factors": (
        lambda: BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3).params(SITE),
        "BOFTConfig.boft_n_butterfly_factor: 3 at a.b, where in = 12 has 6 blocks of 2; 2^2 has to divide their "
        "number, and 2 their size.",
    ),
    "BOFT without a factor": (
        lambda: BOFTConfig(boft_n_butterfly_factor=0),
        "BOFTConfig.boft_n_butterfly_factor: 0; it is at least 1.",
    ),
    "HRA of too many": (
        lambda: HRAConfig(r=13).params(SITE),
        "HRAConfig.r: 13 at a.b; it lies between 1 and in = 12.",
    ),
    "OFT of an old file": (
        lambda: peft_dist.PeftConfig.from_dict({"peft_type": "OFT", "r": 8}),
        "OFTConfig.oft_block_size: the file has none, so a version of HF PEFT before 0.14 wrote it, whose tensors "
        "mean something else. Train the adapter again.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_refused(name) -> None:
    act, message = ERRORS[name]
    with pytest.raises(ConfigError) as raised:
        act()
    assert str(raised.value) == message


def test_what_is_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"OFTConfig.oft_block_size: 5 does not divide the 12 columns of a.b; 4 is"
    ):
        assert OFTConfig(oft_block_size=5).params(SITE)["Q"].shape == (3, 6)
    with pytest.warns(UserWarning, match=r"HRAConfig.r: 3 is odd"):
        HRAConfig(r=3).params(SITE)
    old = {"peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": True}
    with pytest.warns(UserWarning, match="before 0.18 had another series"):
        peft_dist.PeftConfig.from_dict({**old, "peft_version": "0.17.1"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_dist.PeftConfig.from_dict({**old, "peft_version": "0.18.0"})
