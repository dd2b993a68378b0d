"""Under ZeRO-3 ranks mix adapters by row, each rank others than its peer: what they gather, they gather together.

Each rank names adapters of three rows, disjoint where it says so. A rank that gathered once more, or in another
order than its peer, would end both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from peft_dist import (
    BoneConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
)
from peft_dist.adapted import Adapted
from peft_dist.adapted import layer as adapted_layer
from peft_dist.base_layer import layer
from tests.distributed import one_process as run
from tests.distributed import test_quantised_sharding as quantised
from tests.ranks import RankFailed, run_on_ranks

ROWS = 6
BASE = "__base__"
LINEAR: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
DORA = LoraConfig(r=2, use_dora=True, lora_dropout=0.1, **LINEAR)
LORA = LoraConfig(r=3, **LINEAR)
BAT = MissConfig(r=4, init_weights="bat", **LINEAR)
# What each of rank 0's rows names, then each of rank 1's; None stands for the active ones.
CASES: dict[str, tuple[dict[str, Any], list[str | None]]] = {
    "two that read the weight | one and the base": (
        {"1st": DORA, "2nd": LoraConfig(r=3, use_dora=True, **LINEAR), "3rd": LORA},
        ["1st", "2nd", "1st", "3rd", BASE, "3rd"],
    ),
    "one name | three methods": (
        {"1st": DORA, "2nd": LORA, "3rd": BAT, "4th": OFTConfig(oft_block_size=4, r=0, **LINEAR)},
        ["1st", "1st", "1st", "2nd", "3rd", "4th"],
    ),
    "the base alone | three methods": (
        {"1st": BAT, "2nd": LoHaConfig(r=2, **LINEAR), "3rd": HRAConfig(r=4, **LINEAR)},
        [BASE, BASE, BASE, "1st", "2nd", "3rd"],
    ),
    "two active together | one of them": (
        {"1st": HRAConfig(r=4, **LINEAR), "2nd": DORA, "3rd": LORA},
        [None, None, "3rd", "1st", "1st", "1st"],
    ),
}


class Kinds(nn.Module):
    """A layer of each kind that can be adapted, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.embed = nn.Embedding(run.VOCAB, 8)
        self.turned = Conv1D(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, run.VOCAB)
        self.double().train()
        # DeepSpeed looks at the first parameter alone, and refuses float64 there.
        self.first = nn.Parameter(torch.zeros(2, dtype=torch.float32), requires_grad=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        h = self.conv((input_ids / run.VOCAB).double().unsqueeze(1))
        h = self.grouped(h).mT.contiguous() + self.embed(input_ids)
        h = h + self.turned(h)
        h = h + self.attn(h, h, h, need_weights=False)[0]
        index = input_ids.flatten() % 2
        h = h + self.experts(h.flatten(0, 1), index).unflatten(0, input_ids.shape)
        return CausalLMOutput(logits=self.head(self.norm(h)))


class Image(nn.Module):
    """Begins with a convolution, as models of images do, and a norm that nothing trained comes before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8)
        self.head = nn.Linear(8, run.VOCAB)
        self.double().train()
        self.first = nn.Parameter(torch.zeros(2, dtype=torch.float32), requires_grad=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        h = self.conv((input_ids / run.VOCAB).double().unsqueeze(1)).mT
        return CausalLMOutput(logits=self.head(self.frozen(self.norm(h)).tanh()))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 8) / 3)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return (self.up[index] @ x[..., None])[..., 0].tanh()


def kinds() -> Kinds:
    torch.manual_seed(0)
    return Kinds()


def image() -> Image:
    torch.manual_seed(0)
    return Image()


OF_IMAGES: dict[str, tuple[dict[str, Any], list[str | None]]] = {
    "a norm that nothing trained comes before | a later layer": (
        {"1st": LNTuningConfig(target_modules=["norm"]), "2nd": LoraConfig(r=2, target_modules=["head"])},
        ["1st", "1st", BASE, "2nd", "2nd", BASE],
    ),
}
ALL = ["conv", "grouped", "embed", "turned", "head"]
OF_KINDS: dict[str, tuple[dict[str, Any], list[str | None]]] = {
    "DoRA and modules whole | LoRA and the base": (
        {
            "1st": LoraConfig(r=2, use_dora=True, target_modules=ALL),
            "2nd": LoraConfig(r=2, target_modules=ALL, modules_to_save=["norm"]),
            "3rd": LoHaConfig(r=2, target_modules=["conv", "grouped", "turned"]),
        },
        ["1st", "2nd", "1st", "3rd", BASE, "3rd"],
    ),
    "the base alone | embeddings and convolutions": (
        {
            "1st": LoraConfig(r=2, use_dora=True, target_modules=["embed"]),
            "2nd": OFTConfig(oft_block_size=8, r=0, target_modules=["conv", "turned"]),
            "3rd": LoraConfig(r=2, target_modules=["head"], modules_to_save=["norm"]),
        },
        [BASE, BASE, BASE, "1st", "2nd", "3rd"],
    ),
    "attention and experts | others of them and none": (
        {
            "1st": LoraConfig(r=2, target_modules=["attn"], target_parameters=["experts.up"]),
            "2nd": LoraConfig(r=2, target_modules=["attn"]),
            "3rd": LoraConfig(r=2, target_parameters=["experts.up"], target_modules=["turned"]),
            "4th": IA3Config(target_modules=["head"], feedforward_modules=[]),
        },
        ["1st", "2nd", "3rd", "4th", BASE, "4th"],
    ),
}
# Each beside two of other methods; ADAPTION_PROMPT stands beside no other.
METHODS = [method for method in run.METHODS if method != "ADAPTION_PROMPT"]
OF_METHODS = {
    method: (
        {"1st": run.METHODS[method](), "2nd": DORA, "3rd": BoneConfig(r=4, **LINEAR)},
        ["1st", BASE, "2nd", "3rd", "1st", "3rd"],
    )
    for method in METHODS
}


def trained(cases: dict[str, Any], base: Callable[[], Any]) -> dict[str, Any]:
    with mock.patch.object(run, "PER_MICRO_BATCH", ROWS), mock.patch.object(run, "base", base):
        return {case: one_case(configs, names) for case, (configs, names) in cases.items()}


def one_case(configs: dict[str, Any], names: Sequence[str | None]) -> dict[str, Any]:
    """Losses and norms of two steps, and by how much what no row names has moved."""
    idle = LoraConfig(r=2, target_modules=".*q_proj|head")
    model, optimizer = run.build(
        3 if dist.is_initialized() else 0,
        {**configs, "idle": idle},
        partition_first=True,
        checkpointing=False,
    )
    if None in names:
        model.base_model.set_adapter(["1st", "2nd"])
        model.set_requires_grad(list(configs), True)
    before = {key: each.detach().clone() for key, each in run.trained(model, "idle").items()}
    report = run.train(model, optimizer, range(2), lambda place: names[place])
    after = run.trained(model, "idle")
    moved = sum((after[key] - each).abs().sum().item() for key, each in before.items())
    return {"losses": report["losses"], "norms": report["norms"], "moved": moved}


def check(cases: dict[str, Any], base: Callable[[], Any], rel: float) -> None:
    alone = trained(cases, base)
    for rank in run_on_ranks(trained, 2, cases, base, timeout_s=240):
        for case, ours in rank.items():
            one = alone[case]
            assert ours["losses"] == pytest.approx(one["losses"], rel=rel), case
            assert ours["norms"] == [pytest.approx(norms, rel=rel) for norms in one["norms"]], case
            assert ours["moved"] == one["moved"] == 0.0, case


def test_mixtures_equal_one_process() -> None:
    # float64: what remains is another order of sums.
    check(CASES, run.base, 1e-10)


def test_mixtures_on_every_kind_of_layer_equal_one_process() -> None:
    check(OF_KINDS, kinds, 1e-10)


@pytest.mark.parametrize(
    ("case", "where", "name", "without"),
    [
        (0, Adapted, "_runs_within", lambda self: False),
        (1, layer, "_with_a_backward", lambda given: given),
        (2, adapted_layer, "reach", lambda *_: None),
    ],
)
def test_without_any_one_of_its_parts_ranks_part(case: int, where: Any, name: str, without: Any) -> None:
    chosen = dict([list(OF_KINDS.items())[case]])
    with mock.patch.object(where, name, without), pytest.raises(RankFailed):
        run_on_ranks(trained, 2, chosen, kinds, timeout_s=20)


def test_mixtures_after_a_convolution_equal_one_process() -> None:
    check(OF_IMAGES, image, 1e-10)


def int8() -> Any:
    return quantised.base("int8")


def nf4() -> Any:
    return quantised.base("nf4")


@pytest.mark.parametrize("base", [int8, nf4])
def test_mixtures_on_quantised_bases_equal_one_process(base: Callable[[], Any]) -> None:
    # fp32, summed in another order
    check(CASES, base, 2e-4)


# Half a minute: thirty models in one pair of processes.
@pytest.mark.slow
def test_every_method_mixed_with_others_equals_one_process() -> None:
    check(OF_METHODS, run.base, 1e-10)
