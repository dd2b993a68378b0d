"""PeftModel: adapters added, set, deleted, disabled, merged, unloaded, saved and named per row."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import peft_dist
from peft_dist.adapted import Adapted, Replaced
from peft_dist.catalog import METHODS
from peft_dist.errors import AdapterError, CheckpointError, ConfigError, MergeError, RowsError
from tests.contract import pairs

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
IDS = torch.randint(1, 64, (4, 7), generator=torch.Generator().manual_seed(3))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def lora(**more) -> peft_dist.LoraConfig:
    return peft_dist.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **more})


def ia3(**more) -> peft_dist.IA3Config:
    return peft_dist.IA3Config(task_type="CAUSAL_LM", **more)


def prompt(n: int = 3, **more) -> peft_dist.PromptTuningConfig:
    return peft_dist.PromptTuningConfig(num_virtual_tokens=n, task_type="CAUSAL_LM", **more)


def disturb(model: peft_dist.PeftModel, *names: str) -> peft_dist.PeftModel:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name in names or tuple(model.peft_config):
            for p in model.adapter_tensors(name).values():
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def two(config=lora, other=None) -> peft_dist.PeftModel:
    model = peft_dist.get_peft_model(llama(), config(), "a")
    model.add_adapter("b", (other or config)())
    return disturb(model)


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_adding_leaves_what_is_active() -> None:
    model = two()
    assert model.active_adapters == ["a"] and model.active_adapter == "a"
    assert trained(model) and all(".a." in name for name in trained(model))
    before = model(IDS).logits
    model.set_adapter("b")
    assert all(".b." in name for name in trained(model))
    assert not torch.allclose(model(IDS).logits, before)
    model.set_adapter("a", inference_mode=True)
    assert trained(model) == set()
    assert torch.equal(model(IDS).logits, before)


def test_several_active_adapters_of_one_kind_add_up() -> None:
    model = two()
    model.set_adapter(["a", "b"])
    assert len(trained(model)) == 16
    got = model(IDS).logits
    whole = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(whole(IDS).logits, got, rtol=1e-5, atol=1e-5)


def test_methods_compose_in_the_order_set() -> None:
    model = peft_dist.get_peft_model(llama(), lora(target_modules=["v_proj", "down_proj"]), "a", mixed=True)
    assert type(model) is peft_dist.PeftMixedModel
    model.add_adapter("b", ia3())
    disturb(model)
    outputs = []
    for names in (["a", "b"], ["b", "a"]):
        model.set_adapter(names)
        outputs.append(model(IDS).logits)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, outputs[-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*outputs)
    with pytest.raises(ConfigError, match="it adds virtual tokens and sits on no layer"):
        model.add_adapter("c", prompt())


def test_disabling_gives_the_base() -> None:
    base = llama()(IDS).logits
    for model in (two(), two(ia3), two(prompt), two(lambda: lora(bias="all", modules_to_save=["lm_head"]))):
        before = model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, base)
            with model.disable_adapter():
                pass
            assert torch.equal(model(IDS).logits, base)
        assert torch.equal(model(IDS).logits, before)


def test_disabling_unmerges_for_its_time() -> None:
    model, base = two(), llama()(IDS).logits
    before = model(IDS).logits
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, before)


def test_activating_unmerges() -> None:
    model = two()
    model.merge_adapter()
    with pytest.warns(
        UserWarning, match="Adapters are merged; they are unmerged before others become active"
    ):
        model.set_adapter("b")
    other = two()
    other.set_adapter("b")
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    with pytest.raises(AdapterError):
        model.merge_adapter()
        model.set_adapter("c")
    assert model.get_model_status().merged_adapters == ["b"]


@pytest.mark.parametrize(
    "arguments", ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}), ids=str
)
@pytest.mark.parametrize("kind", ("decoder", "encoder and decoder"))
def test_beams_have_the_adapter_of_their_row(kind, arguments) -> None:
    """One adapter at a time is the oracle."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    base, targets = llama(), ["q_proj", "down_proj"]
    if kind != "decoder":
        base = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0, decoder_start_token_id=0)).eval()
        targets = ["q", "v", "wo"]
    model = peft_dist.get_peft_model(base, peft_dist.LoraConfig(r=2, target_modules=targets), "a")
    model.add_adapter("b", peft_dist.LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.7)
    ids, arguments = torch.randint(3, 30, (3, 5)), {"max_new_tokens": 5, "min_new_tokens": 5, **arguments}
    names = ["a", "__base__", "b"]
    rows = model.generate(input_ids=ids, adapter_names=names, do_sample=False, **arguments)
    each = len(rows) // 3
    for i, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            alone = model.generate(input_ids=ids[i : i + 1], do_sample=False, **arguments)
        assert torch.equal(rows[each * i : each * (i + 1)], alone)


def test_deleting() -> None:
    model = two()
    model.delete_adapter("a")
    assert model.active_adapters == ["b"] and list(model.peft_config) == ["b"]
    assert not [name for name, _ in model.named_parameters() if ".a." in name]
    model.delete_adapter("b")
    assert not [m for m in model.modules() if isinstance(m, Adapted)]
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    model.add_adapter("b", lora())
    model.set_adapter("b")


def test_unloading_restores_the_base() -> None:
    wanted = dict(llama().named_parameters())
    model = two(lambda: lora(bias="all", modules_to_save=["lm_head"]))
    model.merge_adapter()
    base = model.unload()
    assert type(base) is LlamaForCausalLM
    assert base.state_dict().keys() == llama().state_dict().keys()
    for name, p in base.named_parameters():
        assert torch.equal(p, wanted[name])


def test_merging_into_a_plain_model() -> None:
    for config in (lora, ia3, lambda: lora(bias="all", modules_to_save=["lm_head"])):
        model = two(config)
        before = model(IDS).logits
        merged = model.merge_and_unload()
        assert type(merged) is LlamaForCausalLM and merged.state_dict().keys() == llama().state_dict().keys()
        torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(MergeError, match="adds tokens before the input"):
        two(prompt).merge_and_unload()


NAMES = ("b", "__base__", "a", None)


@pytest.mark.parametrize(
    "config",
    [
        lora,
        ia3,
        prompt,
        lambda: lora(bias="all", modules_to_save=["lm_head"], target_modules=["embed_tokens", "q_proj"]),
    ],
    ids=["lora", "ia3", "prompt", "lora with all else"],
)
def test_rows_name_adapters(config) -> None:
    model = two(config).eval()
    model.set_requires_grad(["a", "b"], True)
    expected = []
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                expected.append(model(IDS[row : row + 1]).logits[:, -7:])
        else:
            model.set_adapter(name or "a")
            expected.append(model(IDS[row : row + 1]).logits[:, -7:])
    model.set_adapter("a")
    got = model(IDS, adapter_names=NAMES).logits[:, -7:]
    # fp32: rows in one batch are summed by other kernels than alone.
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-4)
    with model.using(peft_dist.Rows(adapters=NAMES)):
        torch.testing.assert_close(model(IDS).logits[:, -7:], got)


@pytest.mark.parametrize("config", [lora, ia3, prompt, lambda: lora(bias="all", modules_to_save=["lm_head"])])
def test_rows_over_a_half_precision_base(config) -> None:
    model = peft_dist.get_peft_model(llama().bfloat16(), config(), "a")
    model.add_adapter("b", config())
    disturb(model).eval()
    assert {p.dtype for p in model.adapter_tensors("b").values()} == {torch.float32}
    got = model(IDS, adapter_names=["a", "b", "b", "a"]).logits
    assert got.dtype == torch.bfloat16
    for row, name in enumerate("abba"):
        model.set_adapter(name)
        alone = model(IDS[row : row + 1]).logits[0]
        # A batch is summed by other kernels than a row; a few of bf16's steps (2^-8) of the largest logit.
        assert (got[row] - alone).abs().max() <= 2**-5 * alone.abs().max()


def test_under_autocast_layers_give_what_the_base_gives() -> None:
    for config in (lora, lambda: lora(bias="all", modules_to_save=["lm_head"])):
        model = two(config).eval()
        wanted = model(IDS).logits
        with torch.autocast("cpu", torch.bfloat16):
            got = model(IDS).logits
            mixed = model(IDS, adapter_names=["a", "a", "b", "a"]).logits
        assert got.dtype == torch.bfloat16
        # bf16 products through two layers: within a tenth of the largest logit.
        assert (got - wanted).abs().max() <= 0.1 * wanted.abs().max()
        assert (mixed[[0, 1, 3]] - wanted[[0, 1, 3]]).abs().max() <= 0.1 * wanted.abs().max()


def test_each_row_trains_its_own_adapter() -> None:
    model = two()
    alone = {}
    for row, name in ((0, "b"), (1, "a")):
        model.set_adapter(name)
        model.zero_grad()
        model(IDS[row : row + 1]).logits.square().sum().backward()
        alone[name] = {key: p.grad.clone() for key, p in model.adapter_tensors(name).items()}
    model.set_requires_grad(["a", "b"], True)
    model.zero_grad()
    model(IDS[:2], adapter_names=["b", "a"]).logits.square().sum().backward()
    for name, gradients in alone.items():
        for key, p in model.adapter_tensors(name).items():
            # fp32 sums in another order: 1e-5 of the largest entry.
            assert (p.grad - gradients[key]).abs().max() <= 1e-5 * gradients[key].abs().max()


def test_prompts_of_different_lengths_in_one_batch() -> None:
    model = peft_dist.get_peft_model(llama(), prompt(3), "a")
    model.add_adapter("b", prompt(5))
    disturb(model).eval()
    names = ("a", "b", "__base__", "b")
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    got = model(IDS, attention_mask=mask, labels=labels, adapter_names=names)
    assert got.logits.shape[1] == 5 + 7
    for row, name in enumerate(names):
        one = {"attention_mask": mask[row : row + 1], "labels": labels[row : row + 1]}
        if name == "__base__":
            with model.disable_adapter():
                alone = model(IDS[row : row + 1], **one)
        else:
            model.set_adapter(name)
            alone = model(IDS[row : row + 1], **one)
        shown = mask[row].bool()
        torch.testing.assert_close(
            got.logits[row, 5:][shown], alone.logits[0, -7:][shown], rtol=1e-4, atol=1e-4
        )
    # Only the rows' own labels count: the loss is what the shown logits say.
    targets = torch.cat([labels.new_full((4, 5), -100), labels], dim=1)[:, 1:]
    # Nothing stands before the first token of a row without virtual ones.
    targets[2, 4] = -100
    wanted = nn.functional.cross_entropy(got.logits[:, :-1].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(got.loss, wanted)


def test_generating_with_named_adapters() -> None:
    model = two().eval()
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), adapter_names=list(NAMES), **how
    )
    for row, name in enumerate(NAMES):
        model.set_adapter("b" if name == "b" else "a")
        one = {"input_ids": IDS[row : row + 1], "attention_mask": torch.ones(1, 7, dtype=torch.long), **how}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**one)
        else:
            alone = model.generate(**one)
        assert torch.equal(together[row], alone[0])


def test_merged_adapters_cannot_be_named() -> None:
    model = two()
    model.merge_adapter(["a"])
    with pytest.raises(RowsError, match=r"are merged. Unmerge to name adapters per row"):
        model(IDS, adapter_names=["b"] * 4)
    with pytest.raises(AdapterError, match=r"is merged\. Unmerge it before deleting it"):
        model.delete_adapter("a")
    with pytest.raises(AdapterError, match=r"are merged. Unmerge before adding 'c'"):
        model.add_adapter("c", lora())
    assert list(model.peft_config) == ["a", "b"]


ERRORS = {
    "unknown": (
        lambda m: m.set_adapter("aa"),
        "adapter 'aa': the model has none of this name. Closest: 'a'. It has: a, b.",
    ),
    "near": (
        lambda m: m.delete_adapter("aB"),
        "adapter 'aB': the model has none of this name. Closest: 'a'. It has: a, b.",
    ),
    "taken": (
        lambda m: m.add_adapter("a", lora()),
        "adapter 'a': the model has one of this name. Delete it first, or choose another.",
    ),
    "folder": (
        lambda m: m.add_adapter("../x", lora()),
        "adapter '../x': a name has no '/' or '\\', is more than dots, and is not '__base__'. Choose another.",
    ),
    "dots": (
        lambda m: m.add_adapter("..", lora()),
        "adapter '..': a name has no '/' or '\\', is more than dots, and is not '__base__'. Choose another.",
    ),
    "in rows": (
        lambda m: m(IDS, adapter_names=["a", "x", "b", "a"]),
        "adapter 'x': the model has none of this name. It has: a, b.",
    ),
    "too few rows": (
        lambda m: m(IDS, adapter_names=["a", "b"]),
        "adapter_names: 2 names for 4 rows. Name one for each; '__base__' is the bare base.",
    ),
    "two prompts": (
        lambda m: (
            m.add_adapter("p", prompt()),
            m.add_adapter("q", prompt()),
            m.set_adapter(["p", "q"]),
            m(IDS),
        ),
        "prompt adapters p, q are active at once. Activate one of them.",
    ),
    "pickle": (
        lambda m: m.save_pretrained("/nowhere", safe_serialization=False),
        "save_pretrained: safe_serialization=False would write a pickle; only safetensors are.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name) -> None:
    act, message = ERRORS[name]
    with pytest.raises(peft_dist.PeftDistError) as raised:
        act(two())
    assert str(raised.value) == message


@pytest.mark.parametrize("name", ["qwen2.5-docs@3", "keys", "train", "weight", "a b"])
def test_names_that_modules_would_refuse(name, tmp_path) -> None:
    for config in (
        lora,
        ia3,
        prompt,
        lambda: lora(target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
    ):
        model = disturb(peft_dist.get_peft_model(llama(), config(), name)).eval()
        wanted = model(IDS).logits
        model.save_pretrained(tmp_path)
        other = peft_dist.PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name)
        assert torch.equal(other(IDS).logits, wanted)
        assert torch.equal(copy.deepcopy(other)(IDS).logits, wanted)
        other.half().float().delete_adapter(name)
        assert torch.allclose(other(IDS).logits, llama().half().float()(IDS).logits)
        assert not [key for key in other.state_dict() if "lora" in key or "ia3" in key]


def test_a_failed_add_leaves_the_model(tmp_path) -> None:
    model = two()
    names = {name for name, _ in model.named_modules()}
    before = model(IDS).logits
    with pytest.raises(peft_dist.PeftDistError):
        model.add_adapter("c", lora(target_modules=["nothing"]))
    wide = peft_dist.get_peft_model(llama(), lora(target_modules=["q_proj"]))
    wide.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace('"q_proj"', '"q_proj", "k_proj"')
    )
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks 4 tensors, the first .*k_proj.lora_A"):
        model.load_adapter(tmp_path, "c")
    assert {name for name, _ in model.named_modules()} == names
    assert torch.equal(model(IDS).logits, before)
    base = llama()
    with pytest.raises(CheckpointError):
        peft_dist.PeftModel.from_pretrained(base, tmp_path)
    assert base.state_dict().keys() == llama().state_dict().keys()


def test_loading_several(tmp_path) -> None:
    model = two(lora, ia3)
    outputs = {}
    for name in "ab":
        model.set_adapter(name)
        outputs[name] = model.eval()(IDS).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "a" / "adapter_config.json").exists()
    other = peft_dist.PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a")
    assert not other.training and trained(other) == set()
    other.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=True)
    assert other.active_adapters == ["a"]
    assert not any(p.is_meta for p in other.parameters())
    for name in "ab":
        other.set_adapter(name)
        assert torch.equal(other(IDS).logits, outputs[name])
    state = peft_dist.get_peft_model_state_dict(model, adapter_name="a")
    disturb(other, "a")
    peft_dist.set_peft_model_state_dict(other, state, adapter_name="a")
    other.set_adapter("a")
    assert torch.equal(other(IDS).logits, outputs["a"])


@pytest.mark.parametrize("name", METHODS)
def test_injecting_on_meta_materialises_nothing(name) -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**SIZES))
    base.config.use_cache = False
    model = peft_dist.get_peft_model(base, pairs.config(name, task_type="CAUSAL_LM"))
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("start", ["SAMPLE_VOCAB", "TEXT"])
def test_prompts_start_from_the_vocabulary(start, monkeypatch) -> None:
    class Tokenizer:
        @classmethod
        def from_pretrained(cls, name, **kwargs):
            assert name == "somewhere" and "trust_remote_code" not in kwargs
            return lambda text: {"input_ids": [ord(c) % 64 for c in text]}

    monkeypatch.setattr("transformers.AutoTokenizer", Tokenizer)
    more = (
        {
            "prompt_tuning_init_text": "ab",
            "tokenizer_name_or_path": "somewhere",
            "tokenizer_kwargs": {"trust_remote_code": True},
        }
        if start == "TEXT"
        else {}
    )
    model = peft_dist.get_peft_model(llama(), prompt(5, prompt_tuning_init=start, **more))
    table = model.get_input_embeddings().weight
    (embeddings,) = model.adapter_tensors().values()
    assert all(any(torch.equal(e, row) for row in table) for e in embeddings)
    if start == "TEXT":
        assert torch.equal(embeddings, table[torch.tensor([97 % 64, 98 % 64] * 3)[:5]])


def test_tasks_have_their_classes_and_heads() -> None:
    torch.manual_seed(0)
    model = peft_dist.get_peft_model(
        LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)), lora(task_type="SEQ_CLS")
    )
    assert type(model) is peft_dist.PeftModelForSequenceClassification
    assert isinstance(model.get_base_model().score, Replaced)
    model(IDS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert model.get_base_model().score.tensors("default")["weight"].grad.abs().sum() > 0
    assert model.get_base_model().score.original_module.weight.grad is None
    tiny = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForSequenceClassification(BertConfig(vocab_size=64, **tiny))
    assert isinstance(
        peft_dist.get_peft_model(bert, lora(task_type="SEQ_CLS")).get_base_model().classifier, Replaced
    )
    for task in peft_dist.TaskType:
        made = peft_dist.get_peft_model(llama(), lora(task_type=task))
        assert made.task_type == task
    assert type(peft_dist.get_peft_model(llama(), lora(task_type=None))) is peft_dist.PeftModel


def test_an_encoder_decoder_base() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0,
    )
    model = peft_dist.get_peft_model(T5ForConditionalGeneration(config), lora(task_type="SEQ_2_SEQ_LM"), "a")
    model.add_adapter("b", lora(task_type="SEQ_2_SEQ_LM"))
    disturb(model)
    labels = IDS[:, :5].contiguous()
    wanted = []
    for row, name in enumerate("abba"):
        model.set_adapter(name)
        wanted.append(model(input_ids=IDS[row : row + 1], labels=labels[row : row + 1]).logits)
    got = model(input_ids=IDS, labels=labels, adapter_names=list("abba")).logits
    torch.testing.assert_close(got, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    model.add_adapter("p", peft_dist.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM"))
    prompted = model(input_ids=IDS, labels=labels, adapter_names=["p", "b", "b", "a"]).logits
    torch.testing.assert_close(prompted[1:], torch.cat(wanted[1:]), rtol=1e-4, atol=1e-4)


def test_prompts_need_a_task_and_embeddings() -> None:
    with pytest.raises(ConfigError) as raised:
        peft_dist.get_peft_model(llama(), peft_dist.PromptTuningConfig(num_virtual_tokens=2))
    assert str(raised.value) == "PromptTuningConfig.task_type: a prompt method needs one, such as CAUSAL_LM."
    with pytest.raises(ConfigError, match="Linear has no input embeddings, which a prompt method needs"):
        peft_dist.get_peft_model(nn.Linear(2, 2), prompt())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = disturb(peft_dist.get_peft_model(llama(), lora(lora_dropout=0.3)))
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        with model.using(peft_dist.Rows(samples=torch.arange(4), seed=1, step=5)):
            model(IDS).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.adapter_tensors().values()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_injecting_without_a_class() -> None:
    base = llama()
    before = base(IDS).logits
    assert peft_dist.inject_adapter_in_model(lora(), base, "a") is base
    assert isinstance(base.model.layers[0].self_attn.q_proj, Adapted)
    assert torch.equal(base(IDS).logits, before)
    assert all("lora_" in name for name in trained(base))
    with pytest.raises(ConfigError, match=r"a prompt method cannot be injected\. Use get_peft_model"):
        peft_dist.inject_adapter_in_model(prompt(), base, "b")


def test_a_second_get_peft_model_warns() -> None:
    base = llama()
    peft_dist.get_peft_model(base, lora())
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        peft_dist.get_peft_model(base, lora(), "other")


def test_a_model_without_adapters_serves_the_base() -> None:
    model = peft_dist.PeftModel(llama(), None)
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    with pytest.raises(AdapterError, match="no adapter is active"):
        _ = model.active_adapter


def test_configs_cost_no_torch() -> None:
    code = (
        "import sys, peft_dist\n"
        "from peft_dist.catalog import METHODS, config_class\n"
        "for name in METHODS: config_class(name)\n"
        "peft_dist.LoraConfig(r=4, target_modules='all-linear').to_dict()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'torch came along'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves() -> None:
    for name in peft_dist.__all__:
        assert getattr(peft_dist, name) is not None
    with pytest.raises(AttributeError, match="module 'peft_dist' has no attribute 'Nothing'"):
        _ = peft_dist.Nothing
