"""`save_merged` and the merge of files, in one process: what transformers opens gives the adapter's logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

import peft_dist
from peft_dist import LNTuningConfig, LoraConfig, TrainableTokensConfig
from peft_dist.catalog import METHODS, config_class
from peft_dist.errors import AdapterError, CheckpointError, MergeError
from peft_dist.loading import load_base
from peft_dist.merged.file_size import size_in_bytes
from peft_dist.merged.offline import OfflineMerge
from peft_dist.merged.request import Request
from peft_dist.merged.shards import Entry, split
from tests.contract import bases
from tests.contract.methods_table import IDS, inputs, model_of
from tests.matrix.axes import NOT_MERGED

MERGED = sorted(set(METHODS) - NOT_MERGED)
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()
    }


def offline(base: Path, adapter: Path, out: Path, shares: int = 2, **values: Any) -> Path:
    """Merges files as several processes would: each plans anew, and writes its share of the steps."""
    request = Request(str(base), str(adapter), **values)
    first = OfflineMerge(request)
    first.check_adapter()
    out.mkdir()
    first.prepare(out)
    for share in range(shares):
        worker = OfflineMerge(request)
        assert worker.digest == first.digest
        written = sum(worker.write(out, range(share, len(worker.plan.steps), shares)))
        assert written == sum(worker.sizes[share::shares])
        worker.close()
    first.close()
    return out


def logits(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**given)[0]


def disturbed(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_merging_is_refused_for_these_methods_alone() -> None:
    assert {name for name in METHODS if not config_class(name).merges} == NOT_MERGED


@pytest.mark.parametrize("method", MERGED)
def test_a_merged_model_gives_the_adapters_logits_and_files_give_the_same_bits(tmp_path, method) -> None:
    model = model_of(method)
    want = logits(model, {"input_ids": IDS, **inputs(method)})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_merged(tmp_path / "direct", max_shard_size="20KB")
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "direct")
    torch.testing.assert_close(logits(opened, {"input_ids": IDS}), want, rtol=1e-4, atol=2e-5)
    bare = logits(bases.llama(), {"input_ids": IDS})
    # The negative control: the adapter does something.
    assert (bare - want).abs().max() > 0.1

    bases.llama().save_pretrained(tmp_path / "base", max_shard_size="30KB")
    model.save_pretrained(tmp_path / "adapter")
    out = offline(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", max_shard_size="20KB")
    there, here = tensors(tmp_path / "direct"), tensors(out)
    assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in there)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "direct", out)]
    # The model at hand runs without a cache.
    assert configs[0] == {**configs[1], "use_cache": False}


@pytest.mark.parametrize("method", sorted(NOT_MERGED - {"XLORA"}))
def test_what_no_weight_can_hold_is_refused_before_anything_is_written(tmp_path, method) -> None:
    model = model_of(method)
    with pytest.raises(MergeError, match=method):
        model.save_merged(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=method):
        OfflineMerge(Request(str(tmp_path / "base"), str(tmp_path / "adapter")))


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=tied, **more)
    return LlamaForCausalLM(config).to(dtype)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)
    )


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, max_position_embeddings=32, num_labels=3)
    )


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


LM = {"r": 4, "task_type": "CAUSAL_LM"}
Q = {**LM, "target_modules": ["q_proj"]}
TEXT = {"input_ids": IDS}
PAIRS = {"input_ids": IDS, "decoder_input_ids": IDS}
# Sums in another order; a merge in bf16 rounds once more.
EXACT, ROUNDED = {"rtol": 1e-5, "atol": 1e-6}, {"rtol": 1e-2, "atol": 1e-3}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
# base, adapter, what opens it, its inputs, names that are written beside the base's.
CASES: dict[str, tuple] = {
    "tied, neither side": (lambda: llama(tied=True), LoraConfig(**Q), AutoModelForCausalLM, TEXT, set()),
    "tied, the embedding": (
        lambda: llama(tied=True),
        LoraConfig(**LM, target_modules=["embed_tokens"]),
        AutoModelForCausalLM,
        TEXT,
        {"lm_head.weight"},
    ),
    "tied, the head": (
        lambda: llama(tied=True),
        LoraConfig(**LM, target_modules=["lm_head"]),
        AutoModelForCausalLM,
        TEXT,
        {"lm_head.weight"},
    ),
    "tied, both apart": (
        lambda: llama(tied=True),
        LoraConfig(**LM, target_modules=["embed_tokens", "lm_head"]),
        AutoModelForCausalLM,
        TEXT,
        {"lm_head.weight"},
    ),
    "tied, both together": (
        lambda: llama(tied=True),
        LoraConfig(**LM, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        AutoModelForCausalLM,
        TEXT,
        set(),
    ),
    "tied, the head trained whole": (
        lambda: llama(tied=True),
        LoraConfig(**Q, modules_to_save=["lm_head"]),
        AutoModelForCausalLM,
        TEXT,
        {"lm_head.weight"},
    ),
    "tied, token rows": (
        lambda: llama(tied=True),
        TrainableTokensConfig(token_indices=[1, 2, 3], task_type="CAUSAL_LM"),
        AutoModelForCausalLM,
        TEXT,
        set(),
    ),
    "starts that change the base": (
        lambda: llama(),
        LoraConfig(**Q, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
        AutoModelForCausalLM,
        TEXT,
        set(),
    ),
    "pissa": (lambda: llama(), LoraConfig(**Q, init_lora_weights="pissa"), AutoModelForCausalLM, TEXT, set()),
    "dora": (lambda: llama(), LoraConfig(**Q, use_dora=True), AutoModelForCausalLM, TEXT, set()),
    "biases": (
        lambda: llama(attention_bias=True, mlp_bias=True),
        LoraConfig(**Q, bias="all"),
        AutoModelForCausalLM,
        TEXT,
        set(),
    ),
    "a bias of its own": (
        lambda: llama(attention_bias=True),
        LoraConfig(**Q, lora_bias=True),
        AutoModelForCausalLM,
        TEXT,
        set(),
    ),
    "layers that stand twice": (
        lambda: llama(),
        LoraConfig(**Q, layer_replication=[[0, 1], [0, 2]]),
        AutoModelForCausalLM,
        TEXT,
        {key.replace("layers.1.", "layers.2.") for key in llama().state_dict() if "layers.1." in key},
    ),
    "layers and their biases that stand twice": (
        lambda: llama(attention_bias=True),
        LoraConfig(**Q, lora_bias=True, layer_replication=[[0, 1], [0, 2]]),
        AutoModelForCausalLM,
        TEXT,
        {key.replace("layers.1.", "layers.2.") for key in llama().state_dict() if "layers.1." in key}
        | {f"model.layers.2.self_attn.{each}_proj.bias" for each in "qkvo"},
    ),
    "weights stored turned": (
        gpt2,
        LoraConfig(**LM, target_modules=["c_attn", "wte"], bias="all", fan_in_fan_out=True),
        AutoModelForCausalLM,
        TEXT,
        {"lm_head.weight"},
    ),
    "an encoder and a decoder": (
        t5,
        LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", target_modules=["q", "wo"]),
        AutoModelForSeq2SeqLM,
        PAIRS,
        set(),
    ),
    "an architecture that always ties": (
        t5,
        LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", target_modules=["lm_head"]),
        AutoModelForSeq2SeqLM,
        PAIRS,
        {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"},
    ),
    "experts left alone": (mixtral, LoraConfig(**Q), AutoModelForCausalLM, TEXT, set()),
    "experts": (
        mixtral,
        LoraConfig(**Q, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        AutoModelForCausalLM,
        TEXT,
        set(),
    ),
    "a classifier": (
        bert,
        LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"]),
        AutoModelForSequenceClassification,
        TEXT,
        set(),
    ),
    "norms": (
        bert,
        LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
        AutoModelForSequenceClassification,
        TEXT,
        set(),
    ),
    "no task": (
        bert,
        LoraConfig(r=4, target_modules=["query"]),
        AutoModelForSequenceClassification,
        TEXT,
        set(),
    ),
    "no head": (
        lambda: bert().bert,
        LoraConfig(r=4, task_type="FEATURE_EXTRACTION", target_modules=["query"]),
        AutoModel,
        TEXT,
        set(),
    ),
    "convolutions and their statistics": (
        resnet,
        LoraConfig(r=4, target_modules=["convolution"], modules_to_save=["classifier.1"]),
        AutoModelForImageClassification,
        PIXELS,
        set(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_the_base_and_wherever_the_adapter_sits(tmp_path, case) -> None:
    make, config, auto, given, more = CASES[case]
    base = make()
    base.save_pretrained(tmp_path / "base")
    model = disturbed(peft_dist.get_peft_model(auto.from_pretrained(tmp_path / "base"), config))
    want = logits(model, given)
    model.save_merged(tmp_path / "direct")
    model.save_pretrained(tmp_path / "adapter")
    out = offline(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    for folder in (tmp_path / "direct", out):
        opened, report = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        torch.testing.assert_close(logits(opened, given), want, rtol=1e-4, atol=1e-5)
        # Under the names of the checkpoint that it came from.
        assert tensors(folder).keys() == tensors(tmp_path / "base").keys() | more
    there, here = tensors(tmp_path / "direct"), tensors(out)
    assert all(torch.equal(there[key], here[key]) for key in there)


def test_a_tie_that_breaks_is_said_in_the_config(tmp_path) -> None:
    model = peft_dist.get_peft_model(llama(tied=True), LoraConfig(**LM, target_modules=["embed_tokens"]))
    model.save_merged(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    # The model at hand stays tied.
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("differ", [False, True])
def test_what_files_hold_twice(tmp_path, differ) -> None:
    base = tmp_path / "base"
    llama(tied=True).save_pretrained(base)
    held = tensors(base)
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + (1.0 if differ else 0.0)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    model = disturbed(peft_dist.get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**Q)))
    model.save_pretrained(tmp_path / "adapter")
    out = offline(base, tmp_path / "adapter", tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(opened, TEXT), logits(model, TEXT), rtol=1e-4, atol=1e-5)
    assert ("lm_head.weight" in tensors(out)) is differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, stored, dtype) -> None:
    llama(dtype=stored).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=stored)
    model = disturbed(peft_dist.get_peft_model(base, LoraConfig(**Q)))
    model.save_merged(tmp_path / "direct", dtype=dtype)
    model.save_pretrained(tmp_path / "adapter")
    out = offline(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=str(dtype).removeprefix("torch.")
    )
    there, here = tensors(tmp_path / "direct"), tensors(out)
    assert all(value.dtype == dtype and torch.equal(value, here[key]) for key, value in there.items())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype
    # Rounded once, from a sum in fp32.
    key = "model.layers.0.self_attn.q_proj"
    delta = model.get_base_model().get_submodule(key).get_delta_weight("default")
    want = (base.get_submodule(key).base_layer.weight.float() + delta.float()).to(dtype)
    assert torch.equal(there[f"{key}.weight"], want)


STORAGES = {"8-bit": bases.eight_bit, "4-bit": lambda: bases.four_bit(torch.bfloat16)}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("merges", [True, False])
def test_a_quantised_base_is_written_dequantised(tmp_path, storage, merges) -> None:
    bases.llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=STORAGES[storage](), device_map={"": "cpu"}
    )
    model = disturbed(peft_dist.get_peft_model(base, LoraConfig(**Q)))
    if merges:
        model.merge_adapter()
    before = {
        key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }
    model.save_merged(tmp_path / "out")
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    written, wrappers = tensors(tmp_path / "out"), dict(base.named_modules())
    dtype = torch.bfloat16 if storage == "4-bit" else base.model.embed_tokens.weight.dtype
    for key in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        layer = peft_dist.base_layer.door(getattr(wrappers[key], "base_layer", wrappers[key]), key)
        dense = layer.weight().float()
        if key.endswith("q_proj") and not merges:
            dense = dense + wrappers[key].get_delta_weight("default")
        assert torch.equal(written[f"{key}.weight"], dense.to(dtype))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # Nothing that is written is rounded once more when it is opened.
    assert opened.dtype == torch.float32 == base.model.embed_tokens.weight.dtype


def test_several_adapters_and_those_that_are_named(tmp_path) -> None:
    model = model_of("LORA", adapters=("a", "b"))
    model.base_model.set_adapter(["a", "b"])
    both = logits(model, TEXT)
    model.save_merged(tmp_path / "both")
    model.set_adapter("b")
    one = logits(model, TEXT)
    model.set_adapter("a")
    model.save_merged(tmp_path / "one", adapter_names="b")
    model.save_merged(tmp_path / "two", adapter_names=["a", "b"])
    for folder, want in (("both", both), ("two", both), ("one", one)):
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(opened, TEXT), want, rtol=1e-4, atol=2e-5)
    assert model.active_adapters == ["a"]
    with pytest.raises(AdapterError, match=r"none of this name"):
        model.save_merged(tmp_path / "none", adapter_names="c")


def test_an_adapter_that_is_merged_already(tmp_path) -> None:
    model = model_of("LORA", adapters=("a", "b"))
    want = logits(model, TEXT)
    model.merge_adapter(["a"])
    model.save_merged(tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(opened, TEXT), want, rtol=1e-4, atol=2e-5)
    with pytest.raises(MergeError, match=r"a are merged into the base now.*unmerge_adapter"):
        model.save_merged(tmp_path / "other", adapter_names="b")


def test_a_layer_without_a_bias_is_refused_before_anything_is_written(tmp_path) -> None:
    model = peft_dist.get_peft_model(llama(), LoraConfig(**Q, lora_bias=True))
    with pytest.raises(MergeError, match="q_proj: adapter 'default' adds to a bias, and this layer has none"):
        model.save_merged(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_change_that_no_checkpoint_can_hold_leaves_nothing(tmp_path) -> None:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    base = transformers.ConvNextForImageClassification(config)
    model = disturbed(peft_dist.get_peft_model(base, LoraConfig(r=16, target_modules=["dwconv"])))
    with pytest.raises(MergeError, match="crosses the layer's 8 groups"):
        model.save_merged(tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_or_do_not_fit_leave_nothing(tmp_path) -> None:
    model = peft_dist.get_peft_model(llama(), LoraConfig(**Q))
    with torch.no_grad():
        model.adapter_tensors()["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].fill_(
            float("nan")
        )
    with pytest.raises(MergeError, match="would not be finite"):
        model.save_merged(tmp_path / "out")
    base = llama()
    with torch.no_grad():
        base.model.norm.weight.fill_(1e6)
    with pytest.raises(MergeError, match=r"outside the range of torch\.float16"):
        peft_dist.get_peft_model(base, LoraConfig(**Q)).save_merged(tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_config_is_refused(tmp_path) -> None:
    model = peft_dist.get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(MergeError, match="no model of transformers"):
        model.save_merged(tmp_path / "out")


def test_an_existing_checkpoint_is_replaced_and_other_files_stay(tmp_path) -> None:
    out = tmp_path / "out"
    model = model_of("LORA")
    model.save_merged(out, max_shard_size="10KB")
    (out / "notes.txt").write_text("mine")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    model.save_merged(out)
    assert sorted(path.name for path in out.glob("*.safetensors*")) == ["model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine"
    AutoModelForCausalLM.from_pretrained(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(MergeError, match="is a file"):
        model.save_merged(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_the_tokenizer_goes_along(tmp_path) -> None:
    base = tmp_path / "base"
    llama().save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    model = peft_dist.get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**Q))
    model.save_merged(tmp_path / "direct")
    model.save_pretrained(tmp_path / "adapter")
    out = offline(base, tmp_path / "adapter", tmp_path / "out")
    for folder in (tmp_path / "direct", out):
        assert (folder / "tokenizer.json").read_text() == "{}" and (
            folder / "tokenizer_config.json"
        ).is_file()
        assert (folder / "generation_config.json").is_file()


def test_a_url(tmp_path) -> None:
    fsspec = pytest.importorskip("fsspec")
    model = model_of("LORA")
    model.save_merged("memory://merged-url/out", max_shard_size="20KB")
    fsspec.filesystem("memory").get("/merged-url/out", str(tmp_path / "out"), recursive=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(opened, TEXT), logits(model, TEXT), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("quantised", ["int8", "nf4"])
@pytest.mark.parametrize("case", ["llama", "mixture", "gpt2"])
def test_a_base_that_is_stored_quantised_is_written_dequantised(tmp_path, case, quantised) -> None:
    base, targets = {
        "llama": (llama, ["q_proj", "down_proj"]),
        "mixture": (mixtral, ["v_proj"]),
        "gpt2": (gpt2, ["c_attn", "c_fc"]),
    }[case]
    base().to(torch.bfloat16).save_pretrained(tmp_path / "full")
    stored = load_base(str(tmp_path / "full"), dtype=torch.bfloat16, quantization=quantised)
    stored.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    config = LoraConfig(r=4, use_dora=case == "llama", target_modules=targets)
    model = disturbed(peft_dist.get_peft_model(load_base(str(tmp_path / "base"), dtype="auto"), config))
    model.save_pretrained(tmp_path / "adapter")
    # The oracle: transformers' own dequantised base, merged in memory.
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").dequantize(torch.float32)
    with_adapter = peft_dist.PeftModel.from_pretrained(dense.float(), tmp_path / "adapter")
    merged = with_adapter.merge_and_unload()
    for number, dtype in enumerate(("float32", "bfloat16", None)):
        out = offline(tmp_path / "base", tmp_path / "adapter", tmp_path / f"out{number}", dtype=dtype)
        here, config_here = tensors(out), json.loads((out / "config.json").read_text())
        assert here.keys() == tensors(tmp_path / "full").keys() and "quantization_config" not in config_here
        if case != "gpt2":  # whose quantised layers keep their weights the other way round
            direct = tmp_path / f"direct{number}"
            model.save_merged(direct, dtype=dtype)
            there = tensors(direct)
            assert all(torch.equal(there[key], here[key]) for key in there)
            assert config_here == json.loads((direct / "config.json").read_text())
        opened, report = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, output_loading_info=True
        )
        assert not any(report.values())
        for (name, value), expected in zip(opened.named_parameters(), merged.parameters(), strict=True):
            turned = value.T if case == "gpt2" and ".c_" in name and value.ndim == 2 else value
            torch.testing.assert_close(
                turned, expected, **(EXACT if dtype == "float32" else ROUNDED), check_dtype=False
            )


def test_codes_of_another_library_are_refused(tmp_path) -> None:
    llama().save_pretrained(tmp_path / "base")
    peft_dist.get_peft_model(llama(), LoraConfig(**Q)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "base" / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(MergeError, match="is stored quantised, not by bitsandbytes"):
        OfflineMerge(Request(str(tmp_path / "base"), str(tmp_path / "adapter")))


def test_another_base_or_adapter_is_refused(tmp_path) -> None:
    llama().save_pretrained(tmp_path / "base")
    LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "hidden_size": 32})).save_pretrained(
        tmp_path / "other"
    )
    model = peft_dist.get_peft_model(llama(), LoraConfig(**Q))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"another shape|belongs to another base"):
        merge = OfflineMerge(Request(str(tmp_path / "other"), str(tmp_path / "adapter")))
        merge.check_adapter()
    held = load_file(tmp_path / "adapter/adapter_model.safetensors")
    held["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 16)
    save_file(held, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown to the base, 1 tensors, the first .*layers.7"):
        OfflineMerge(Request(str(tmp_path / "base"), str(tmp_path / "adapter"))).check_adapter()


def test_a_head_that_only_the_adapter_has(tmp_path) -> None:
    llama().save_pretrained(tmp_path / "base")
    auto = AutoModelForSequenceClassification
    torch.manual_seed(0)
    base = auto.from_pretrained(tmp_path / "base", num_labels=5, pad_token_id=0)
    model = disturbed(
        peft_dist.get_peft_model(base, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj"]))
    )
    model.save_pretrained(tmp_path / "adapter")
    out = offline(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    opened = auto.from_pretrained(out, pad_token_id=0)
    torch.testing.assert_close(logits(opened, TEXT), logits(model, TEXT), rtol=1e-4, atol=1e-5)
    assert "lm_head.weight" not in tensors(out)
    named = offline(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "named", labels=("a", "b", "c", "d", "e")
    )
    assert auto.from_pretrained(named).config.id2label == dict(enumerate("abcde"))


@pytest.mark.parametrize(
    ("size", "want"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5 gb", 1_500_000_000),
        ("12", 12),
        (7, 7),
    ],
)
def test_sizes(size, want) -> None:
    assert size_in_bytes(size) == want


@pytest.mark.parametrize("size", ["", "big", "-1GB", 0, "5 apples"])
def test_sizes_that_are_none(size) -> None:
    with pytest.raises(MergeError, match="max_shard_size"):
        size_in_bytes(size)


def test_a_large_tensor_stands_alone() -> None:
    entries = [Entry(name, torch.float32, (size,)) for name, size in (("a", 2), ("b", 9), ("c", 1), ("d", 1))]
    names = [[entry.key for entry in shard.entries] for shard in split(entries, 12)]
    assert names == [["a"], ["b"], ["c", "d"]]
