"""Adapters as plain LoRA: starts from the base's own directions, and other methods."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

import peft_dist
from peft_dist.errors import ConfigError, ConversionError
from peft_dist.methods.lora.plain import as_plain
from tests.contract import bases

IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))
LORA = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}


def disturb(model, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * size)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def close(got, wanted, size=2e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=size, atol=size)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}},
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "dora", "embedding"],
)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_become_plain(start, more, tmp_path) -> None:
    config = peft_dist.LoraConfig(**{**LORA, "init_lora_weights": start, **more})
    ours = peft_dist.get_peft_model(bases.llama(), config)
    # As HF PEFT's guide has it: what is saved before the training must not say that it starts from the base.
    config.init_lora_weights = True
    ours.save_pretrained(tmp_path / "initial")
    config.init_lora_weights = start
    disturb(ours)
    ours.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    for library in (peft_dist, peft):
        plain = library.PeftModel.from_pretrained(bases.llama(), tmp_path / "plain")
        assert plain.peft_config["default"].init_lora_weights is True
        assert plain.peft_config["default"].r == 8
        close(logits(plain), logits(ours))


def test_a_plain_form_is_theirs(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(bases.llama(), peft.LoraConfig(**LORA, init_lora_weights="pissa"))
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "initial")
        theirs.peft_config["default"].init_lora_weights = "pissa"
        disturb(theirs)
        theirs.save_pretrained(tmp_path / "pissa")
        theirs.save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    ours = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "pissa")
    ours.save_pretrained(tmp_path / "ours", path_initial_model_for_weight_conversion=tmp_path / "initial")
    wanted = logits(peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "plain"))
    close(logits(peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "ours")), wanted)


def test_what_cannot_become_plain(tmp_path) -> None:
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA, init_lora_weights="pissa"))
    ours.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has init_lora_weights 'pissa', so its factors"):
        ours.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path)
    assert not (tmp_path / "plain").exists()
    tensors = peft_dist.get_peft_model_state_dict(ours)
    config = ours.peft_config["default"]
    plain, made = as_plain(config, tensors)
    assert plain.r == 8 and config.r == 4
    with pytest.raises(ConfigError, match="has no start that could be taken out"):
        as_plain(plain, made)
    with pytest.raises(ConfigError, match="the adapter there has no 'base_model"):
        as_plain(config, tensors, {})
    ia3 = peft_dist.get_peft_model(bases.llama(), peft_dist.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="converts adapters of LORA, not of IA3"):
        as_plain(ia3.peft_config["default"], {})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("IA3Config", {}),
        ("LoHaConfig", {"r": 2}),
        ("HRAConfig", {"r": 2}),
        ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
        ("LoraConfig", {"r": 4, "use_dora": True}),
    ],
)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_any_change_of_linear_layers_becomes_lora(name, values, base, tmp_path) -> None:
    targets = {"target_modules": ["c_attn"] if base == "gpt2" else ["q_proj", "down_proj"]}
    # IA3 on what a layer gives would scale its bias too.
    more = {"feedforward_modules": targets["target_modules"]} if name == "IA3Config" else {}
    config = getattr(peft_dist, name)(**values, **targets, **more, task_type="CAUSAL_LM")
    ours = peft_dist.get_peft_model(getattr(bases, base)(), config)
    disturb(ours, 0.3)
    peft_dist.save_as_lora(tmp_path, ours, 16)
    for library in (peft_dist, peft):
        lora = library.PeftModel.from_pretrained(getattr(bases, base)(), tmp_path)
        close(logits(lora), logits(ours), 1e-4)


def test_a_share_of_the_strength_decides_the_ranks() -> None:
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA))
    disturb(ours, 0.3)
    config, tensors = peft_dist.convert_to_lora(ours, 0.9)
    for name, module in ours.get_base_model().named_modules():
        if "default" in getattr(module, "adapters", ()):
            S = torch.linalg.svdvals(module.change(["default"])[0])
            k = len(tensors[f"base_model.model.{name}.lora_A.weight"])
            energy = S.square().cumsum(0) / S.square().sum()
            assert energy[k - 1] >= 0.9 > (energy[k - 2] if k > 1 else 0)
            assert config.rank_pattern.get(name, config.r) == k


def test_a_conversion_shows_how_far_it_is(capsys) -> None:
    config = peft_dist.LoKrConfig(r=2, target_modules=["q_proj"], init_weights=False)
    model = peft_dist.get_peft_model(bases.llama(), config)
    for progressbar in (False, True):
        peft_dist.convert_to_lora(model, 2, progressbar=progressbar)
        said = capsys.readouterr()
        assert not said.out and ("Converting to LoRA: 100%" in said.err) == progressbar


def test_conversions_that_are_refused() -> None:
    scaled = peft_dist.get_peft_model(bases.llama(), peft_dist.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ConversionError, match=r"IA3Config changes more of .* than its weight"):
        peft_dist.convert_to_lora(scaled, 2)
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA))
    for rank, message in (
        (0, "rank 0; it is at least 1"),
        (1.5, "rank 1.5; as a float"),
        (99, "99 is larger"),
    ):
        with pytest.raises(ConfigError, match=message):
            peft_dist.convert_to_lora(ours, rank)
    embedded = peft_dist.get_peft_model(
        bases.llama(), peft_dist.LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    )
    with pytest.raises(ConversionError, match=r"'model.embed_tokens' is no linear layer"):
        peft_dist.convert_to_lora(embedded, 2)
    biased = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA, bias="all"))
    with pytest.raises(ConfigError, match="trains biases"):
        peft_dist.convert_to_lora(biased, 2)
    with pytest.raises(ConversionError, match="adapter 'other' changes no layer here"):
        peft_dist.convert_to_lora(ours, 2, "other")


def test_tensors_without_their_start() -> None:
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA, init_lora_weights="olora"))
    ours.add_adapter("initial", peft_dist.LoraConfig(**LORA))
    with torch.no_grad():
        mine, start = ours.adapter_tensors(), ours.adapter_tensors("initial")
        for key, tensor in start.items():
            tensor.copy_(mine[key])
    disturb(ours)
    now = peft_dist.get_peft_model_state_dict(ours)
    plain = ours.base_model.subtract_mutated_init(now, "initial")
    wanted = as_plain(ours.peft_config["default"], now)[1]
    assert plain.keys() == wanted.keys()
    assert all(torch.equal(plain[key], tensor) for key, tensor in wanted.items())
