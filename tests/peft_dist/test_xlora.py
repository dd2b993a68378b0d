"""X-LoRA in a whole model, beside HF PEFT, which finds experts that are called by their numbers alone."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import peft_dist
from peft_dist.errors import CheckpointError, ConfigError, PeftDistError
from tests.contract import bases

IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))
TARGETS = (["q_proj", "down_proj"], ["q_proj", "embed_tokens"], ["q_proj", "v_proj"])


def base(make: str = "llama"):
    model = getattr(bases, make)()
    model.config.use_cache = False
    return model


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[str, str]:
    """Three LoRA adapters of different ranks and targets, by their numbers."""
    folder = tmp_path_factory.mktemp("experts")
    paths = {}
    for number, targets in enumerate(TARGETS):
        torch.manual_seed(number)
        config = peft_dist.LoraConfig(
            r=2 + number, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
        )
        model = peft_dist.get_peft_model(bases.llama(), config)
        model.save_pretrained(folder / str(number))
        paths[str(number)] = str(folder / str(number))
    return paths


def values(experts, **more) -> dict:
    return {"task_type": "CAUSAL_LM", "hidden_size": 16, "adapters": experts, **more}


def ours(experts, **more):
    return peft_dist.get_peft_model(base(), peft_dist.XLoraConfig(**values(experts, **more)))


def filled(model, seed: int = 1) -> None:
    """The same network in both libraries."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "internal_xlora_classifier" in name:
                p.copy_(torch.randn(p.shape, generator=generator))


def pair(experts, **more):
    mine = ours(experts, **more)
    theirs = peft.get_peft_model(base(), peft.XLoraConfig(**values(experts, **more)))
    for model in (mine, theirs):
        filled(model)
        model.eval()
    return mine, theirs


def logits(model, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def close(got, wanted, size=1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=size, atol=size)


SETTINGS = [
    {},
    {"xlora_depth": 3, "xlora_size": 8, "layerwise_scalings": True},
    {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0},
    {"top_k_lora": 2, "softmax_temperature": 0.5},
    {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    {"enable_softmax": False, "global_scaling_weight": 0.3},
    {"scaling_pass_value": 0.7, "top_k_lora": 1},
    {"use_trainable_adapters": True},
]


@pytest.mark.parametrize("more", SETTINGS, ids=str)
def test_it_is_theirs(experts, more) -> None:
    mine, theirs = pair(experts, **more)
    close(logits(mine), logits(theirs))
    close(mine.get_latest_scalings(), theirs.get_latest_scalings())
    embedded = base().get_input_embeddings()(IDS).detach()
    close(mine(inputs_embeds=embedded).logits, theirs(inputs_embeds=embedded).logits)
    with mine.disable_adapter():
        close(logits(mine), logits(base()), 0)
    for model in (mine, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    their_grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    my_grads = {n: p.grad for n, p in mine.named_parameters() if p.grad is not None}
    assert len(my_grads) == len(their_grads)
    total = sum(g.square().sum() for g in their_grads.values())
    close(sum(g.square().sum() for g in my_grads.values()), total, 1e-4)
    for name, gradient in my_grads.items():
        if "classifier" in name:
            close(gradient, their_grads[name.replace(".default", "")], 1e-4)
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_it_generates(experts) -> None:
    mine, theirs = pair(experts, layerwise_scalings=True)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    assert torch.equal(
        mine.generate(input_ids=IDS, attention_mask=mask, **how),
        theirs.generate(input_ids=IDS, attention_mask=mask, **how),
    )
    with pytest.raises(ConfigError, match="use_cache cannot be True"):
        mine.generate(input_ids=IDS, use_cache=True, **how)


def test_both_save_and_load(experts, tmp_path) -> None:
    mine, theirs = pair(experts, xlora_depth=2, xlora_size=8)
    wanted = logits(mine)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("mine", "theirs")]
    # HF PEFT takes the 0 of `layers.0` for the expert of that name, and leaves it out of the file.
    assert {key.rpartition("layers.")[2] for key in files[0]} == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert {key.rpartition("layers.")[2] for key in files[1]} == {"3.weight", "3.bias"}
    assert all(torch.equal(value, files[0][key]) for key, value in files[1].items())
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors, the first .*internal_xlora_classifier"):
        peft_dist.PeftModel.from_pretrained(base(), tmp_path / "theirs")
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("mine", "theirs")]
    assert configs[0] == configs[1]
    close(logits(peft.PeftModel.from_pretrained(base(), tmp_path / "mine").eval()), wanted)
    for lean in (False, True):
        again = peft_dist.PeftModel.from_pretrained(base(), tmp_path / "mine", low_cpu_mem_usage=lean)
        close(logits(again), wanted)
        assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    # The copies beside it are enough.
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    config["adapters"] = dict.fromkeys(config["adapters"], "nowhere")
    (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps(config))
    close(logits(peft_dist.PeftModel.from_pretrained(base(), tmp_path / "mine")), wanted)
    # Others may be named.
    moved = dict(zip("012", [experts["0"], experts["1"], experts["2"]], strict=True))
    close(logits(peft_dist.PeftModel.from_pretrained(base(), tmp_path / "mine", adapters=moved)), wanted)


def test_trained_experts_are_saved(experts, tmp_path) -> None:
    mine = ours(experts, use_trainable_adapters=True)
    filled(mine)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in mine.named_parameters():
            if p.requires_grad and "lora_" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    wanted = logits(mine.eval())
    mine.save_pretrained(tmp_path)
    close(logits(peft_dist.PeftModel.from_pretrained(base(), tmp_path)), wanted)
    close(logits(peft.PeftModel.from_pretrained(base(), tmp_path).eval()), wanted)
    alone = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "1")
    assert alone.peft_config["default"].r == 3


def test_experts_may_have_names(experts) -> None:
    """HF PEFT loads experts as 0, 1, ... whatever they are called, and then looks for their names."""
    named = {f"expert {key}": path for key, path in experts.items()}
    mine, (numbered, _) = ours(named), pair(experts)
    filled(mine)
    mine.eval()
    close(logits(mine), logits(numbered), 0)
    with pytest.raises(KeyError, match="expert 0"):
        peft.get_peft_model(base(), peft.XLoraConfig(**values(named)))(input_ids=IDS)
    assert (logits(mine) - logits(base())).abs().max() > 1e-2


def test_rows_may_name_mixtures(experts) -> None:
    mine = ours(experts)
    mine.add_adapter("other", peft_dist.XLoraConfig(**values(experts, top_k_lora=1, layerwise_scalings=True)))
    mine.add_adapter("lora", peft_dist.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    mine.eval()
    alone = []
    for row, name in enumerate(["other", "default", "lora"]):
        mine.set_adapter(name)
        alone.append(logits(mine)[row])
    close(logits(mine, adapter_names=["other", "default", "lora"]), torch.stack(alone))
    close(logits(mine, adapter_names=["other", "__base__", "default"])[1], logits(base())[1])
    mine.set_requires_grad(["other", "default"], True)
    mine(input_ids=IDS, adapter_names=["other"] * 3).logits.sum().backward()
    assert all(t.grad is None for t in mine.adapter_tensors("default").values())
    assert all(t.grad is not None for t in mine.adapter_tensors("other").values())


def test_checkpointed_layers_find_their_weights(experts) -> None:
    grads = []
    for checkpointed in (False, True):
        mine = ours(experts, layerwise_scalings=True)
        filled(mine)
        if checkpointed:
            mine.gradient_checkpointing_enable()
        mine.train()
        torch.manual_seed(0)
        mine(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([t.grad for t in mine.adapter_tensors().values()])
    for plain, again in zip(*grads, strict=True):
        close(again, plain)


def test_settings_of_a_running_mixture(experts) -> None:
    mine, theirs = pair(experts)
    assert mine.get_latest_scalings() is None
    for call, argument in (
        ("set_topk_lora", 1),
        ("set_global_scaling_weight", 0.5),
        ("set_scaling_pass_value", 0.4),
        ("set_scaling_pass_value", None),
        ("set_topk_lora", None),
    ):
        before = logits(mine)
        for model in (mine, theirs):
            getattr(model, call)(argument)
        close(logits(mine), logits(theirs))
        if argument is not None:
            assert (logits(mine) - before).abs().max() > 1e-5
    assert mine.get_global_scaling_weight() == 0.5
    assert mine.peft_config["default"].scaling_pass_value == pytest.approx(1 / 3)
    for model in (mine, theirs):
        model.enable_scalings_logging()
        logits(model)
        model(input_ids=IDS[:, :4])
        logits(model)
        model.disable_scalings_logging()
        logits(model)
    got, wanted = mine.get_scalings_log(), theirs.get_scalings_log()
    assert len(got) == len(wanted) == 3
    for mine_log, their_log in zip(got, wanted, strict=True):
        close(mine_log, their_log)
    buckets = mine.get_bucketed_scalings_log()
    assert {length: places for length, (places, _) in buckets.items()} == {7: [0, 2], 4: [1]}
    mine.clear_scalings_log()
    assert mine.get_scalings_log() == []
    twin = copy.deepcopy(mine)
    close(logits(twin), logits(mine), 0)


def test_on_meta_and_without_room(experts) -> None:
    ghost = base().to("meta")
    model = peft_dist.get_peft_model(ghost, peft_dist.XLoraConfig(**values(experts)))
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hidden_size": 8}, "hidden_size: 8; the base's hidden state has 16"),
        ({"top_k_lora": 4}, "top_k_lora: 4 of 3 adapters"),
        ({"top_k_lora": 0}, "top_k_lora: 0; it is at least 1"),
        ({"xlora_depth": 0}, "xlora_depth: 0; it is at least 1"),
        ({"softmax_temperature": 0.0}, "softmax_temperature: 0.0; it is above 0"),
        ({"xlora_dropout_p": 1.0}, r"xlora_dropout_p: 1.0; it lies in \[0, 1\)"),
        ({"adapters": {}}, "adapters: none are given"),
        ({"adapters": {"a": "nowhere/at/all"}}, "nowhere/at/all"),
    ],
)
def test_refusals_leave_the_model(experts, more, message) -> None:
    model = base()
    with pytest.raises(PeftDistError, match=message):
        peft_dist.get_peft_model(model, peft_dist.XLoraConfig(**{**values(experts), **more}))
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_what_cannot_be_mixed(experts, tmp_path) -> None:
    with pytest.raises(ConfigError, match="`use_cache` must be False"):
        peft_dist.get_peft_model(bases.llama(), peft_dist.XLoraConfig(**values(experts)))
    for more in ({"use_dora": True}, {"bias": "all"}):
        config = peft_dist.LoraConfig(r=2, task_type="CAUSAL_LM", **more)
        peft_dist.get_peft_model(bases.llama(), config).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="only LoRA without DoRA and biases"):
            ours({"a": str(tmp_path)})
    rows = peft_dist.LoraConfig(r=2, task_type="CAUSAL_LM", trainable_token_indices=[1])
    peft_dist.get_peft_model(bases.llama(), rows).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="trains more than the weights of layers"):
        ours({"a": str(tmp_path)})
    conv = peft_dist.get_peft_model(bases.convs(), peft_dist.LoraConfig(r=2, target_modules=["stem"]))
    conv.save_pretrained(tmp_path / "conv")
    with pytest.raises(PeftDistError, match="XLORA sits on embedding, linear"):
        peft_dist.get_peft_model(
            bases.convs(), peft_dist.XLoraConfig(hidden_size=16, adapters={"a": str(tmp_path / "conv")})
        )
    mine = ours(experts)
    with pytest.raises(PeftDistError, match="XLORA"):
        mine.merge_adapter()
    with pytest.raises(TypeError, match="XLoraModel does not support add_weighted_adapter"):
        mine.add_weighted_adapter(["default"], [1.0], "b")


def test_warnings() -> None:
    for more, message in (
        ({"hidden_size": None}, "hidden_size is not given: 4096"),
        ({"adapters": None}, "adapters is not given"),
        ({"enable_softmax_topk": True}, "top_k_lora is not set"),
        ({"enable_softmax_topk": True, "top_k_lora": 1}, "are both on"),
    ):
        with pytest.warns(UserWarning, match=message):
            peft_dist.XLoraConfig(**{**values({"a": "b"}), **more})
