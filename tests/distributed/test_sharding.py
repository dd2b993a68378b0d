"""A partitioned base: what a rank holds, what may be read and changed when, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_dist import LoraConfig, PeftModel, checkpoint, get_peft_model, merge, sharding
from peft_dist.errors import ShardingError
from peft_dist.optim import AdapterOptimizer, Hyper
from tests.distributed import one_process as run
from tests.ranks import run_on_ranks

IDS = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(5))


def gpt2() -> GPT2LMHeadModel:
    """Tied embeddings, a position table whose input needs no gradient, Conv1D, biases."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.clone()


def loss_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def close(ours: Tensor, theirs: Tensor) -> None:
    # fp32: the same operations on the same numbers; what a collective adds up has two addends.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# Training, evaluating and changing adapters in turn, with DeepSpeed's own defaults and with none of its
# leeway


def life(zero: dict[str, Any] | None) -> dict[str, Any]:
    """Train, evaluate, add an adapter, train both, load one, delete one, merge; all on one base."""
    base = gpt2()
    if zero is not None:
        sharding.partition_base(base, {"zero_optimization": {"stage": 3, **zero}})
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM"))
    optimizer = AdapterOptimizer(stage=3 if zero is not None else 0)
    report: dict[str, Any] = {"losses": [], "at_rest": [], "logits": []}
    share = 1 / (dist.get_world_size() if dist.is_initialized() else 1)

    def step(name: str) -> None:
        model.set_adapter(name)
        model.train()
        optimizer.zero_grad()
        loss = loss_of(model)
        (loss * share).backward()
        optimizer.reduce()
        optimizer.step()
        report["losses"].append(loss.item())
        report["at_rest"].append(sharding.elements_at_rest(base))

    def look() -> None:
        model.eval()
        report["logits"].append(logits(model))
        report["at_rest"].append(sharding.elements_at_rest(base))

    optimizer.add("default", run.trained(model, "default"), Hyper(1e-2))
    step("default")
    step("default")
    look()
    step("default")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["c_fc"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    optimizer.add("second", run.trained(model, "second"), Hyper(1e-2))
    for name in ("second", "default", "second"):
        step(name)
    look()
    checkpoint.load_state_dict(
        model, {k: v * 0 + 0.1 for k, v in checkpoint.state_dict(model, "second").items()}, "second"
    )
    look()
    step("second")
    optimizer.remove("second")
    model.delete_adapter("second")
    model.set_adapter("default")
    look()
    merge.merge(base)
    look()
    merge.unmerge(base)
    look()
    assert torch.equal(report["logits"][-1], report["logits"][-3])
    return report


@pytest.mark.parametrize(
    "zero",
    [
        {"stage3_param_persistence_threshold": 0},
        {},
        {"stage3_max_reuse_distance": 10**9, "stage3_prefetch_bucket_size": 0, "overlap_comm": False},
    ],
)
def test_a_life_on_a_partitioned_base_equals_one_on_a_whole_base(zero: dict[str, Any]) -> None:
    alone = life(None)
    for report in run_on_ranks(life, 2, zero):
        assert report["losses"] == pytest.approx(alone["losses"], abs=1e-6)
        for ours, theirs in zip(report["logits"], alone["logits"], strict=True):
            # Seven AdamW steps at 1e-2 after sums of another order.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        if zero.get("stage3_param_persistence_threshold") == 0:
            adapters = [whole - size_of(gpt2()) for whole in alone["at_rest"]]
            halves = sum((p.numel() + 1) // 2 for p in gpt2().parameters())
            assert report["at_rest"] == [halves + own for own in adapters]


# Reading and changing partitioned weights


def reading_and_changing() -> dict[str, Any]:
    base = gpt2()
    expected = {name: p.detach().clone() for name, p in base.named_parameters()}
    sharding.partition_base(base, run.ZERO3)
    weight = base.transformer.h[0].attn.c_attn.weight
    report: dict[str, Any] = {"shapes": (tuple(weight.shape), tuple(sharding.whole_shape(weight)))}
    with sharding.gathered([weight, None, weight]):
        with sharding.gathered([weight]):
            report["within"] = torch.equal(weight, expected["transformer.h.0.attn.c_attn.weight"])
        report["after inner"] = tuple(weight.shape)
        try:
            with sharding.gathered([weight], modify=True):
                pass
        except ShardingError as error:
            report["change while gathered"] = str(error)
    report["all"] = all(torch.equal(sharding.whole(p), expected[name]) for name, p in base.named_parameters())
    bits = sharding.stored_bits(weight)
    sharding.set_whole(weight, torch.full((16, 48), 2.0))
    report["changed"] = sharding.whole(weight).unique().tolist()
    logits(base)
    report["and it lasts"] = sharding.whole(weight).unique().tolist()
    sharding.restore_bits(weight, bits)
    report["restored"] = torch.equal(sharding.whole(weight), expected["transformer.h.0.attn.c_attn.weight"])
    seen = []

    def change(module: nn.Module, args: Any) -> None:
        sharding.set_whole(weight, torch.full((16, 48), 3.0))
        seen.append(weight.unique().tolist())

    handle = base.transformer.h[0].attn.c_attn.register_forward_pre_hook(change)
    logits(base)
    handle.remove()
    report["change in a forward"] = [*seen, sharding.whole(weight).unique().tolist()]
    report["resting"] = tuple(weight.shape)
    return report


def test_weights_are_read_whole_and_changed_on_all_ranks() -> None:
    refusal = (
        "1 of 1 partitioned weights are in use by a running forward, backward or gather and cannot be "
        "changed "
        "now. Change weights between steps."
    )
    for report in run_on_ranks(reading_and_changing):
        assert report == {
            "shapes": ((0,), (16, 48)),
            "within": True,
            "after inner": (16, 48),
            "change while gathered": refusal,
            "all": True,
            "changed": [2.0],
            "and it lasts": [2.0],
            "restored": True,
            "change in a forward": [[3.0], [3.0]],
            "resting": (0,),
        }


def load_onto_a_partitioned_base(folder: str) -> Tensor:
    base = gpt2()
    sharding.partition_base(base, run.ZERO3)
    return logits(PeftModel.from_pretrained(base, folder).eval())


def test_an_adapter_is_loaded_onto_a_partitioned_base(tmp_path: Any) -> None:
    model = get_peft_model(
        gpt2(), LoraConfig(r=2, target_modules=["c_attn", "wte"], task_type="CAUSAL_LM")
    ).eval()
    run.disturb(model)
    checkpoint.save(model, tmp_path)
    for ours in run_on_ranks(load_onto_a_partitioned_base, 2, str(tmp_path)):
        close(ours, logits(model))


def merged_where_layers_share_a_weight(targets: list[str]) -> list[Tensor]:
    """Logits after a step, merged, unmerged, and after another step; at last of the base without its wrappers."""
    base = gpt2()
    if dist.is_initialized():
        sharding.partition_base(base, run.ZERO3)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    run.disturb(model)
    found = []
    for _ in range(2):
        ids = torch.arange(12).view(2, 6)
        model(input_ids=ids).logits.square().sum().backward()
        with torch.no_grad():
            for p in run.trained(model, "default").values():
                p -= 1e-3 * p.grad
                p.grad = None
        found.append(logits(model))
        model.merge_adapter()
        found.append(logits(model))
        model.unmerge_adapter()
        found.append(logits(model))
    return [*found, logits(model.merge_and_unload())]


@pytest.mark.parametrize("targets", [["wte"], ["lm_head"], ["wte", "lm_head"]])
def test_a_merge_leaves_the_layer_that_shares_the_weight(targets: list[str]) -> None:
    one = merged_where_layers_share_a_weight(targets)
    for ours in run_on_ranks(merged_where_layers_share_a_weight, 2, targets):
        close(ours, one)


# Refusals


def refusals() -> dict[str, str]:
    said = {}

    def note(what: str, model: nn.Module, config: dict[str, Any]) -> None:
        with pytest.raises(ShardingError) as caught:
            sharding.partition_base(model, config)
        said[what] = str(caught.value)

    note("stage", gpt2(), {"zero_optimization": {"stage": 2}})
    note("precision", gpt2(), {**run.ZERO3, "bf16": {"enabled": True}})
    trained = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    trained.get_base_model().transformer.ln_f.weight.requires_grad_(True)
    note("trained", trained, run.ZERO3)
    note("float64", gpt2().double(), run.ZERO3)
    base = gpt2()
    sharding.partition_base(base, run.ZERO3)
    note("again", base, run.ZERO3)
    return said


def test_what_cannot_be_partitioned_is_refused_in_words() -> None:
    expected = {
        "stage": "partition_base: zero_optimization.stage is 2; only stage 3 partitions a base. At stages 0 to 2 "
        "the base stays whole: leave this call out.",
        "precision": "partition_base: bf16.enabled is true; DeepSpeed would cast every floating parameter, packed "
        "4-bit weights included. Leave the section out: the base keeps the dtype it was loaded in.",
        "trained": "partition_base: 1 of the base's own parameters are trained, such as 'transformer.ln_f.weight'; "
        "an engine without an optimizer keeps only frozen ones. Name their modules in modules_to_save "
        "instead.",
        "float64": "partition_base: the base is torch.float64; ZeRO-3 keeps fp32, bf16 and fp16. Load it in one of "
        "them.",
        "again": "partition_base: this base is partitioned already.",
    }
    assert run_on_ranks(refusals) == [expected, expected]


def test_without_a_process_group_there_is_nothing_to_partition_over() -> None:
    with pytest.raises(ShardingError) as caught:
        sharding.partition_base(gpt2(), run.ZERO3)
    assert str(caught.value) == (
        "partition_base: no process group is up. Call torch.distributed.init_process_group first; one "
        "process needs "
        "no partition."
    )
