"""Quantised bases under ZeRO-3: every method on int8 and 4-bit bases equals one process on the same base.

Bases are made by bitsandbytes itself. Everything is fp32: sums in another order differ by 1e-7 of their size, and
AdamW over 3 steps at 1e-3 lets no more than 1e-5 come of that. Codes, statistics and what a rank holds are
compared bit for bit and byte for byte. Each claim has a control without its mechanism.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dist import (
    DeloraConfig,
    LNTuningConfig,
    LoraConfig,
    OSFConfig,
    PeftModel,
    ShiraConfig,
    TrainableTokensConfig,
    get_peft_model,
    load_base,
    packed,
    prepare_model_for_kbit_training,
    sharding,
)
from peft_dist.adapted import Adapted
from peft_dist.base_layer import door, num_elements
from peft_dist.catalog import METHODS as CATALOG
from peft_dist.checkpoint import WEIGHTS_NAME
from peft_dist.config import PeftConfig
from peft_dist.errors import BaseLayerError, ShardingError
from peft_dist.inject import adapter_modules
from tests.distributed import one_process as run
from tests.distributed.own_engine import own_engine
from tests.ranks import run_on_ranks

FLOAT: Any = {"rtol": 0.0, "atol": 1e-5}


def linear_8bit(dense: nn.Linear, **values: Any) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        dense.in_features, dense.out_features, bias=dense.bias is not None, has_fp16_weights=False, **values
    )
    return filled(layer, dense)


def linear_4bit(dense: nn.Linear, **values: Any) -> nn.Module:
    given = {"quant_type": "nf4", "compute_dtype": torch.float32, **values}
    layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=dense.bias is not None, **given)
    return filled(layer, dense)


def filled(layer: nn.Module, dense: nn.Linear) -> nn.Module:
    for key, parameter in dense.named_parameters():
        layer.get_parameter(key).data.copy_(parameter.data)
    return layer.to("cpu").requires_grad_(False)


STORAGES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "int8": linear_8bit,
    "nf4": linear_4bit,
    "nf4 in bf16": lambda dense: linear_4bit(dense, quant_storage=torch.bfloat16),
    "nf4 in fp32 without nested scales": lambda dense: linear_4bit(
        dense, quant_storage=torch.float32, compress_statistics=False
    ),
}
MORE = {
    **STORAGES,
    "int8 with outliers": lambda dense: linear_8bit(dense, threshold=1.5),
    "fp4": lambda dense: linear_4bit(dense, quant_type="fp4"),
    "nf4 computing in bf16": lambda dense: linear_4bit(dense, compute_dtype=torch.bfloat16),
    "nf4 that takes what comes": lambda dense: linear_4bit(dense, compute_dtype=None),
}
storages = pytest.mark.parametrize("storage", STORAGES)


def quantised(model: nn.Module, storage: str) -> Any:
    """The model with each linear layer but the head quantised."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is nn.Linear and key != "lm_head":
                parent._modules[key] = STORAGES[storage](child)
    return model


SMALL = run.base


def base(storage: str) -> LlamaForCausalLM:
    model = SMALL().float()
    del model.first
    return quantised(model, storage)


def larger(storage: str) -> LlamaForCausalLM:
    """Layers of a size that bitsandbytes repacks on CPUs with AVX512-BF16, left in eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    return quantised(LlamaForCausalLM(config), storage).eval()


def share_of(model: nn.Module, world: int = 2) -> int:
    """Bytes that one of `world` ranks may hold: of each parameter, codes and statistics alike, its piece; buffers;
    and the levels of 4-bit codes, two tables of 16 and 256 floats for the whole process."""
    held = sum(b.nbytes for b in model.buffers())
    for module in model.modules():
        sizes = {key: (p.shape, p.dtype) for key, p in module._parameters.items() if p is not None}
        if packed.is_quantised(module):
            sizes |= packed.whole_sizes(module)
        held += sum(
            -(-torch.Size(shape).numel() // world) * dtype.itemsize for shape, dtype in sizes.values()
        )
    nested = [
        getattr(m.weight.quant_state, "state2", None) for m in model.modules() if packed.is_4bit(type(m))
    ]
    return held + 64 * bool(nested) + 1024 * any(state is not None for state in nested)


# One layer, whole: codes and statistics as parameters change no number


@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("storage", MORE)
def test_a_partitionable_layer_is_bitsandbytes_own(storage: str, bias: bool, dtype: Any, mode: str) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(72, 36, bias)
    theirs, ours = MORE[storage](dense), MORE[storage](dense)
    packed.make_partitionable(ours)
    for layer in (theirs, ours):
        packed.settle(layer)
        layer.train(mode == "train")
    x = torch.randn(3, 5, 72, dtype=dtype)
    ys, gradients = [], []
    with torch.set_grad_enabled("without" not in mode):
        for layer in (theirs, ours):
            given = x.clone().requires_grad_("without" not in mode)
            ys.append(layer(given))
            if "without" not in mode:
                gradients.append(torch.autograd.grad((ys[-1].float() ** 2).sum(), given)[0])
    assert ys[0].dtype == ys[1].dtype and torch.equal(*ys)
    assert not gradients or torch.equal(*gradients)
    assert isinstance(ours, type(theirs)) and all(p.requires_grad is False for p in ours.parameters())
    assert torch.equal(door(ours, "").weight(), door(theirs, "").weight())
    assert num_elements(ours.weight) == num_elements(theirs.weight)
    assert sum(map(num_elements, ours.parameters())) == sum(map(num_elements, theirs.parameters()))


@pytest.mark.parametrize("storage", MORE)
@pytest.mark.parametrize("shape", [(64, 64), (33, 70), (8, 24)])
def test_on_meta_it_has_the_sizes_that_it_has_when_it_is_quantised(storage: str, shape: tuple) -> None:
    if "nf4 in" in storage and shape == (33, 70):
        shape = (34, 72)  # bitsandbytes packs into floats what fills them
    out, in_ = shape
    made = MORE[storage](nn.Linear(in_, out))
    with torch.device("meta"):
        kind, weight = type(made), made.weight
        ghost = kind(in_, out, has_fp16_weights=False) if packed.is_8bit(kind) else kind(in_, out)
    if packed.is_4bit(kind):
        for key in ("compress_statistics", "quant_type", "quant_storage"):
            setattr(ghost.weight, key, getattr(weight, key))
    sizes = packed.whole_sizes(ghost)
    packed.make_partitionable(ghost, torch.float32)
    packed.make_partitionable(made)
    for layer in (ghost, made):
        here = {key: (tuple(p.shape), p.dtype) for key, p in layer.named_parameters() if key != "bias"}
        assert here == sizes
    assert all(p.is_meta for key, p in ghost.named_parameters())
    if packed.is_4bit(kind):
        theirs, ours = made.weight.quant_state, ghost.weight.quant_state
        for key in ("shape", "blocksize", "quant_type", "dtype", "nested"):
            assert getattr(ours, key) == getattr(theirs, key), key
        assert torch.equal(ours.code, theirs.code)


# Methods: train, evaluate, save, merge, unmerge

SOME: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# Those that read the base when they start, beside a plain one of each kind.
STARTS: dict[str, Callable[[], PeftConfig]] = {
    "IA3": run.METHODS["IA3"],
    "PROMPT_TUNING": run.METHODS["PROMPT_TUNING"],
    "PiSSA": lambda: LoraConfig(r=3, init_lora_weights="pissa", **SOME),
    "OLoRA": lambda: LoraConfig(r=3, init_lora_weights="olora", **SOME),
    "MiCA": lambda: LoraConfig(r=3, init_lora_weights="mica", **SOME),
    "DoRA": lambda: LoraConfig(r=3, use_dora=True, **SOME),
    "DELORA": lambda: DeloraConfig(r=3, **SOME),
    "OSF": lambda: OSFConfig(effective_rank=5, **SOME),
    "SHIRA": lambda: ShiraConfig(r=2, **SOME),
    "LN_TUNING": lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"),
    "TRAINABLE_TOKENS": lambda: TrainableTokensConfig(
        token_indices=[1, 4], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
}


def lives(storage: str, stage: int, folder: str, configs: str) -> dict[str, dict[str, Any]]:
    chosen = STARTS if configs == "starts" else run.METHODS
    with mock.patch.object(run, "base", lambda: base(storage)):
        return {
            name: life(make(), stage, f"{folder}/{name}", number % 2 == 0)
            for number, (name, make) in enumerate(chosen.items())
        }


def life(config: PeftConfig, stage: int, folder: str, partition_first: bool) -> dict[str, Any]:
    # A prompt's layers cannot be recomputed; the others' are, every second time.
    checkpointing = (
        partition_first and "PROMPT" not in str(config.peft_type) and "PREFIX" not in str(config.peft_type)
    )
    model, optimizer = run.build(
        stage, {"default": config}, partition_first=partition_first, checkpointing=checkpointing
    )
    report: dict[str, Any] = {"start": {k: t.detach().clone() for k, t in model.adapter_tensors().items()}}
    report |= run.train(model, optimizer, range(run.STEPS))
    report["logits"] = run.evaluate(model)
    report["bytes"] = sharding.bytes_at_rest(model)
    report["counts"] = model.get_nb_trainable_parameters()
    run.saved(model, folder)
    if CATALOG[str(config.peft_type).rpartition(".")[2]].merges:
        before, wanted = stored(model), merged_by_bitsandbytes(model)
        model.merge_adapter()
        after = stored(model)
        report["law 5"] = all(torch.equal(after[key], value) for key, value in wanted.items())
        report["merged"] = [run.evaluate(model), run.evaluate(model)]
        report["bytes merged"] = sharding.bytes_at_rest(model)
        model.unmerge_adapter()
        report["unmerged"] = run.evaluate(model)
        report["restored"] = all(torch.equal(value, before[key]) for key, value in stored(model).items())
    return report


def stored(model: PeftModel) -> dict[str, Tensor]:
    """Codes and statistics of the adapted layers, whole."""
    found: dict[str, Tensor] = {}
    for name, module in adapter_modules(model.get_base_model()):
        layer = getattr(module, "base_layer", None)
        if isinstance(layer, nn.Module) and packed.is_quantised(layer):
            held = [layer.weight, *packed.statistics(layer).values()]
            with sharding.gathered(held):
                found |= of_layer(name, layer)
    return found


def of_layer(name: str, layer: Any) -> dict[str, Tensor]:
    parts = {"weight": layer.weight.data}
    if packed.is_8bit(type(layer)):
        parts["SCB"] = packed.scales_8bit(layer)
    else:
        state = packed.quant_state(layer)
        parts["absmax"] = state.absmax.data
        if state.state2 is not None:
            parts |= {"nested": state.state2.absmax.data, "offset": state.offset.data.reshape(1)}
    return {f"{name}.{key}": value.detach().clone().view(torch.uint8) for key, value in parts.items()}


def merged_by_bitsandbytes(model: PeftModel) -> dict[str, Tensor]:
    """What law 5 says is stored after a merge: quantise(dequantise(W) + dW), quantised by bitsandbytes itself."""
    wanted: dict[str, Tensor] = {}
    for name, module in adapter_modules(model.get_base_model()):
        if isinstance(module, Adapted) and packed.is_quantised(module.base_layer):
            dW, layer = module.change(["default"])[0], module.base_layer
            if dW is None:
                continue
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight.data = module.base.weight().float() + dW
            if packed.is_8bit(type(layer)):
                made = linear_8bit(dense)
            else:
                of = layer.weight
                values = {k: getattr(of, k) for k in ("compress_statistics", "quant_type", "quant_storage")}
                made = linear_4bit(dense, **values)
            wanted |= of_layer(name, made)
    return wanted


def check(
    storage: str, alone: dict[str, Any], ranks: list[dict[str, Any]], folders: tuple[Path, Path]
) -> None:
    held = share_of(base(storage))
    for name, one in alone.items():
        for report in (rank[name] for rank in ranks):
            for key, value in one["start"].items():
                torch.testing.assert_close(report["start"][key], value, **FLOAT)
                assert torch.equal(report["start"][key], ranks[0][name]["start"][key]), (name, key)
            assert report["losses"] == pytest.approx(one["losses"], abs=1e-5), name
            assert report["norms"] == [pytest.approx(norms, rel=1e-4, abs=1e-6) for norms in one["norms"]], (
                name
            )
            torch.testing.assert_close(report["logits"], one["logits"], **FLOAT)
            assert report["counts"] == one["counts"], name
            assert report["bytes"] <= held, (name, report["bytes"], held)
            if "merged" in one:
                assert report["law 5"] and one["law 5"] and report["restored"], name
                assert report["bytes merged"] <= held, name
                assert torch.equal(*report["merged"])
                # A code on the edge of two may fall to either side; it moves a weight by a step of its block.
                torch.testing.assert_close(report["merged"][0], one["merged"][0], rtol=0, atol=5e-3)
                assert torch.equal(report["unmerged"], report["logits"]), name
        ours, theirs = (load_file(folder / name / WEIGHTS_NAME) for folder in folders)
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert value.numel() > 0
            torch.testing.assert_close(ours[key], value, **FLOAT)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_starts_training_saving_and_merging_equal_one_process(storage: str, tmp_path: Path) -> None:
    here, there = tmp_path / "alone", tmp_path / "ranks"
    alone = lives(storage, 0, str(here), "starts")
    check(storage, alone, run_on_ranks(lives, 2, storage, 3, str(there), "starts"), (there, here))


@pytest.mark.matrix  # a minute for each storage; .ci/run has the methods above and the matrix's diagonal
@pytest.mark.timeout(1200)
@storages
def test_every_method_equals_one_process(storage: str, tmp_path: Path) -> None:
    run.experts()
    here, there = tmp_path / "alone", tmp_path / "ranks"
    alone = lives(storage, 0, str(here), "methods")
    ranks = run_on_ranks(lives, 2, storage, 3, str(there), "methods", timeout_s=600)
    check(storage, alone, ranks, (there, here))


# Modes


def losses(storage: str, mode: str, sharded: bool) -> list[float]:
    """Of three steps on a base that was left in a mode, evaluated before and between them."""
    torch.manual_seed(1)
    model = get_peft_model(larger(storage), LoraConfig(r=4, **SOME))
    run.disturb(model)
    if sharded:
        sharding.partition_base(model, run.ZERO3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(2))
    made = []
    for _ in range(3):
        model.train(mode == "train")
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        made.append(loss.item())
        with torch.no_grad():
            model.eval()(input_ids=ids)
    return made


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_the_mode_that_a_base_was_left_in_changes_no_number(storage: str) -> None:
    alone = losses(storage, "train", False)
    assert losses(storage, "eval", False) == alone
    for mode in ("train", "eval"):
        for got in run_on_ranks(losses, 2, storage, mode, True):
            assert got == pytest.approx(alone, abs=1e-6)


def test_without_a_steady_state_it_does() -> None:
    with mock.patch.object(packed, "_steady", lambda kind: kind):
        assert abs(losses("int8", "eval", False)[0] - losses("int8", "train", False)[0]) > 1e-5


@pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 alone"
)
@pytest.mark.filterwarnings("ignore:bitsandbytes::gemv_4bit")  # which lets no gradient through
def test_without_being_settled_a_4_bit_base_is_repacked_in_eval_mode() -> None:
    with mock.patch.object(packed, "settle"):
        assert abs(losses("nf4", "eval", False)[-1] - losses("nf4", "train", False)[-1]) > 1e-5


def evaluated(folder: str, stage: int) -> dict[str, Tensor]:
    """Weights of a base that was evaluated before it got an adapter."""
    model = load_base(folder, quantization="nf4", zero_stage=stage)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.ones(2, 5, dtype=torch.long)).logits
    layers = {name: door(m, name) for name, m in model.named_modules() if packed.is_quantised(m)}
    return {"logits": logits, **{name: layer.weight() for name, layer in layers.items()}}


def test_a_base_that_is_evaluated_bare_keeps_its_weights(tmp_path: Path) -> None:
    source = LlamaForCausalLM(larger("nf4").config)
    source.save_pretrained(tmp_path)
    weights = dict(source.named_parameters())
    one = evaluated(str(tmp_path), 0)
    for found in (one, *run_on_ranks(evaluated, 2, str(tmp_path), 3)):
        for name, W in found.items():
            torch.testing.assert_close(W, one[name], **FLOAT)
            if name != "logits":
                assert torch.equal(W, door(linear_4bit(as_linear(weights[f"{name}.weight"])), name).weight())


def as_linear(weight: Tensor) -> nn.Linear:
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.data = weight.detach()
    return dense


# What a rank holds


def alive(storage: str) -> int:
    """Bytes of codes that this process holds anywhere."""
    kind = {"int8": torch.int8, "nf4": torch.uint8}[storage]
    found: dict[int, int] = {}
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            for tensor in (thing, getattr(thing, "ds_tensor", None)):
                if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.dtype == kind:
                    found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def held_while_training(storage: str) -> tuple[int, list[int], int]:
    before = alive(storage)
    model = get_peft_model(larger(storage), LoraConfig(r=2, **SOME))
    codes = sum(m.weight.nbytes for m in model.modules() if packed.is_quantised(m))
    # Nothing is fetched ahead of its use: all of so small a base would be.
    sharding.partition_base(model, {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0}})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    at_rest, between = [], 0
    for _ in range(3):
        loss = model(
            input_ids=torch.ones(2, 9, dtype=torch.long), labels=torch.ones(2, 9, dtype=torch.long)
        ).loss
        between = max(between, alive(storage) - before)
        loss.backward()
        optimizer.step()
        at_rest.append(sharding.bytes_at_rest(model))
    return codes, at_rest, between


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_no_rank_holds_more_than_its_share_at_rest_or_for_the_backward(storage: str) -> None:
    held = share_of(larger(storage))
    for codes, at_rest, between in run_on_ranks(held_while_training, 2, storage):
        assert at_rest == [held] * 3
        # 4-bit statistics are bytes as well, a 32nd of the codes.
        assert between <= codes // 2 * 34 / 32
    with mock.patch.object(packed, "make_partitionable"):
        for codes, at_rest, between in run_on_ranks(held_while_training, 2, storage):
            assert between >= codes
            assert storage == "nf4" or min(at_rest) > held + codes // 2


# Merged, dequantised


def dequantised(storage: str, sharded: bool) -> dict[str, Any]:
    with mock.patch.object(run, "base", lambda: base(storage)):
        model, _ = run.build(
            3 if sharded else 0, {"default": run.METHODS["LORA"]()}, partition_first=True, checkpointing=False
        )
    report: dict[str, Any] = {"before": run.evaluate(model), "stored": stored(model)}
    modules = {name: m for name, m in adapter_modules(model.get_base_model()) if isinstance(m, Adapted)}
    sums = {name: m.base.weight().float() + m.change(["default"])[0] for name, m in modules.items()}
    model.merge_adapter(dequantize=True)
    report["exact"] = all(torch.equal(m.base.weight(), sums[name]) for name, m in modules.items())
    report["kinds"] = {type(m.base_layer).__name__ for m in modules.values()}
    report["merged"] = run.evaluate(model)
    with model.disable_adapter():
        report["disabled"] = run.evaluate(model)
    report["merged again"] = run.evaluate(model)
    model.unmerge_adapter()
    report["unmerged"] = run.evaluate(model)
    report["restored"] = stored(model)
    # Layers that are dense by the first forward after an adapter came.
    model.add_adapter("second", run.METHODS["IA3"]())
    model.merge_adapter(["default"], dequantize=True)
    report["merged anew"] = run.evaluate(model)
    model.unmerge_adapter()
    plain = model.merge_and_unload(dequantize=True)
    report["left"] = [name for name, m in plain.named_modules() if packed.is_quantised(m)]
    report["bytes"] = sharding.bytes_at_rest(plain)
    with torch.no_grad():
        ids = torch.randint(0, run.VOCAB, (2, run.LENGTH), generator=torch.Generator().manual_seed(99))
        report["alone"] = plain.eval()(input_ids=ids).logits.clone()
    return report


@storages
def test_a_merge_that_dequantises_is_exact_on_every_rank_and_undone(storage: str) -> None:
    one = dequantised(storage, False)
    dense = SMALL().float()
    del dense.first
    sharded = run_on_ranks(dequantised, 2, storage, True)
    assert one["kinds"] == {"Linear", "Embedding"}
    assert all(report["kinds"] == {"RestingLinear", "Embedding"} for report in sharded)
    for report in (one, *sharded):
        assert report["exact"] and report["left"] == []
        # Nothing is rounded to codes: int8's own product rounds its input to 127 steps in eval mode.
        bound = 5e-3 if storage == "int8" else 1e-5
        assert (report["merged"] - report["before"]).abs().max() < bound
        assert torch.equal(report["merged again"], report["merged"])
        assert torch.equal(report["merged anew"], report["merged"])
        assert torch.equal(report["unmerged"], report["before"])
        assert all(torch.equal(report["restored"][key], value) for key, value in report["stored"].items())
        for key in ("before", "merged", "disabled", "alone"):
            torch.testing.assert_close(report[key], one[key], **FLOAT)
        assert report["bytes"] <= (share_of(dense, 1) if report is one else share_of(dense))


# Offloaded; under a user's own engine; quantised first; refused


def offloaded(storage: str) -> dict[str, Any]:
    offload = {"device": "cpu", "pin_memory": True}
    zero = {"zero_optimization": {**run.ZERO3["zero_optimization"], "offload_param": offload}}
    with mock.patch.object(run, "ZERO3", zero), mock.patch.object(run, "base", lambda: base(storage)):
        model, optimizer = run.build(
            3, {"default": run.METHODS["LORA"]()}, partition_first=False, checkpointing=True
        )
    report = run.train(model, optimizer, range(run.STEPS))
    report["devices"] = {
        str(p.ds_tensor.device) for p in model.get_base_model().parameters() if hasattr(p, "ds_id")
    }
    report["bytes"] = sharding.bytes_at_rest(model)
    return report


@pytest.mark.parametrize("storage", ["int8", "nf4 in bf16"])
def test_pieces_that_rest_in_memory_train_the_same(storage: str) -> None:
    with mock.patch.object(run, "base", lambda: base(storage)):
        model, optimizer = run.build(
            0, {"default": run.METHODS["LORA"]()}, partition_first=False, checkpointing=True
        )
    alone = run.train(model, optimizer, range(run.STEPS))
    for report in run_on_ranks(offloaded, 2, storage):
        assert report["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert report["devices"] == {"cpu"} and report["bytes"] <= share_of(base(storage))


def own_model(storage: str) -> PeftModel:
    torch.manual_seed(run.SEED)
    model = get_peft_model(larger(storage), LoraConfig(r=3, **SOME))
    run.disturb(model)
    return model


def own_loss(model: Any, step: int) -> Tensor:
    ids, _, _ = run.batch(step, 0)
    return run.token_loss_sum(model(input_ids=ids).logits, ids) / ids[:, 1:].numel()


def with_own_engine(storage: str) -> dict[str, Any]:
    sharding.disable_deepspeed_op_builds()
    model = own_model(storage)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = own_engine(model, optimizer, run.ZERO3["zero_optimization"], 2)
    # Also before any forward has told the layers that they are partitioned.
    model.merge_adapter()
    model.unmerge_adapter()
    made = []
    for step in range(run.STEPS):
        loss = own_loss(engine, step)
        engine.backward(loss)
        engine.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        made.append(whole.item() / dist.get_world_size())
    report: dict[str, Any] = {
        "losses": made,
        "bytes": sharding.bytes_at_rest(model),
        "logits": run.evaluate(model),
    }
    model.merge_adapter(dequantize=True)
    report["dense"] = run.evaluate(model)
    report["kinds"] = {type(m.base_layer) for _, m in adapter_modules(model.get_base_model())}
    model.unmerge_adapter()
    # The engine goes on with the layers that it knew.
    loss = own_loss(engine, 0)
    engine.backward(loss)
    engine.step()
    report["bytes again"] = sharding.bytes_at_rest(model)
    model.merge_adapter()
    report["merged"] = run.evaluate(model)
    model.merge_and_unload(dequantize=True)
    return report


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_under_a_users_own_engine_codes_are_partitioned_and_train_the_same(storage: str) -> None:
    model = own_model(storage)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    alone = []
    for step in range(run.STEPS):
        optimizer.zero_grad()
        loss = own_loss(model, step)
        loss.backward()
        optimizer.step()
        alone.append(loss.item())
    logits = run.evaluate(model)
    model.merge_adapter(dequantize=True)
    dense = run.evaluate(model)
    model.unmerge_adapter()
    optimizer.zero_grad()
    own_loss(model, 0).backward()
    optimizer.step()
    model.merge_adapter()
    merged = run.evaluate(model)
    for report in run_on_ranks(with_own_engine, 2, storage):
        assert report["losses"] == pytest.approx(alone, abs=1e-5)
        torch.testing.assert_close(report["logits"], logits, rtol=0, atol=5e-3)
        torch.testing.assert_close(report["merged"], merged, rtol=0, atol=5e-3)
        torch.testing.assert_close(report["dense"], dense, rtol=0, atol=1e-4)
        assert not any(packed.is_8bit(kind) or packed.is_4bit(kind) for kind in report["kinds"])
        assert max(report["bytes"], report["bytes again"]) <= share_of(larger(storage))


def without_an_engine() -> str:
    with mock.patch.object(run, "base", lambda: base("nf4")):
        model, _ = run.build(3, {"default": run.METHODS["LORA"]()}, partition_first=True, checkpointing=False)
    before = stored(model)
    del model.get_base_model().__dict__[sharding._ENGINE]
    with pytest.raises(ShardingError) as caught:
        model.merge_and_unload(dequantize=True)
    after = stored(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    return str(caught.value)


def test_a_base_whose_engine_cannot_be_told_is_not_dequantised() -> None:
    for said in run_on_ranks(without_an_engine, 2):
        assert said.startswith("an engine of your own has partitioned this base and trains nothing in it")


def prepared(storage: str, sharded: bool) -> tuple[list[float], set[torch.dtype]]:
    """A base of half precision, partitioned, made ready for training through codes, trained."""
    torch.manual_seed(0)
    model: Any = quantised(LlamaForCausalLM(larger("int8").config).to(torch.bfloat16), storage).train()
    if sharded:
        sharding.partition_base(model, run.ZERO3)
    prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=3, **SOME))
    run.disturb(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(2))
    made = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        made.append(loss.item())
    head = model.get_base_model().lm_head
    return made, {head.weight.dtype, sharding.whole(head.weight).dtype}


@pytest.mark.parametrize("storage", ["int8", "nf4 in bf16"])
def test_a_partitioned_base_is_made_ready_for_training_as_a_whole_one_is(storage: str) -> None:
    alone, dtypes = prepared(storage, False)
    assert dtypes == {torch.float32}
    for made, kept in run_on_ranks(prepared, 2, storage, True):
        assert made == pytest.approx(alone, abs=1e-5) and kept == dtypes


def codes_first(storage: str) -> tuple[Tensor, Tensor, list[str]]:
    torch.manual_seed(0)
    model = nn.Sequential(STORAGES[storage](nn.Linear(64, 64)), nn.LayerNorm(64))
    x, whole = torch.randn(3, 64), copy.deepcopy(model)
    packed.settle_base(whole, whole.modules())
    sharding.partition_base(model, {"zero_optimization": {"stage": 3}})
    return model(x).detach(), whole(x).detach(), [name for name, _ in model.named_parameters()]


@storages
def test_a_base_may_begin_with_codes(storage: str) -> None:
    for ours, theirs, names in run_on_ranks(codes_first, 2, storage):
        torch.testing.assert_close(ours, theirs, **FLOAT)
        assert names[0] == "0.weight"


def refusals() -> list[str]:
    said = []
    halves = nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True))
    keys = ("zero_quantized_nontrainable_weights", "stage3_use_all_reduce_for_fetch_params")
    for model, more in ((halves, {}), *((base("nf4"), {key: True}) for key in keys)):
        with pytest.raises(ShardingError) as caught:
            sharding.partition_base(model, {"zero_optimization": {"stage": 3, **more}})
        said.append(str(caught.value))
    return said


def test_what_would_not_keep_codes_is_refused_in_words() -> None:
    wanted = [
        "partition_base: 0 is a Linear8bitLt with has_fp16_weights=True, which quantises its whole weight in each "
        "forward. Load the base with has_fp16_weights=False.",
        *(
            f"partition_base: zero_optimization.{key} is true and model.layers.0.self_attn.q_proj is quantised; "
            f"DeepSpeed would {what}, and codes are no numbers. Leave it out."
            for key, what in (
                ("zero_quantized_nontrainable_weights", "quantise its pieces once more"),
                ("stage3_use_all_reduce_for_fetch_params", "add its pieces up instead of gathering them"),
            )
        ),
    ]
    assert run_on_ranks(refusals) == [wanted, wanted]


def test_a_layer_in_halves_is_not_made_partitionable() -> None:
    with pytest.raises(BaseLayerError, match="has_fp16_weights=True cannot be partitioned"):
        packed.make_partitionable(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True))


def cast_codes() -> Iterator[str]:
    model = own_model("nf4 in bf16")
    layer = next(m for m in model.modules() if packed.is_4bit(type(m)))
    layer.weight.data = layer.weight.data.float()
    layer.weight.ds_id = 0
    with pytest.raises(BaseLayerError) as caught:
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    yield str(caught.value)


def test_codes_that_an_engine_cast_are_found_before_they_are_read() -> None:
    (said,) = cast_codes()
    assert said.startswith("a Linear4bit whose codes are kept as torch.bfloat16 was cast to torch.float32")
