"""Weighted combinations of adapters: of their changes of W, and HF PEFT's where it combines those too."""

from __future__ import annotations

import peft
import pytest
import torch

import peft_dist
from peft_dist.arithmetic import combine
from peft_dist.arithmetic.weighted import COMBINATIONS
from peft_dist.errors import AdapterError, ConfigError
from tests.contract import bases

IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))
LORA = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
WEIGHTS = [0.7, -0.4]


def filled(model, seed: int = 5) -> None:
    """Random values, the same in both libraries."""
    generator = torch.Generator().manual_seed(seed)
    named = sorted((n, p) for n, p in model.named_parameters() if "lora_" in n or "ia3_" in n)
    with torch.no_grad():
        for _, p in named:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def pair(first=None, second=None, base="llama"):
    configs = [{**LORA, **(first or {})}, {**LORA, **(second or {})}]
    models = []
    for library in (peft_dist, peft):
        model = library.get_peft_model(
            getattr(bases, base)(), library.LoraConfig(**configs[0]), adapter_name="a"
        )
        model.add_adapter("b", library.LoraConfig(**configs[1]))
        filled(model)
        models.append(model)
    return models


def changes(model, name: str) -> dict[str, torch.Tensor]:
    """dW of each layer that the adapter sits on."""
    found = {}
    for layer, module in model.get_base_model().named_modules():
        if name in getattr(module, "adapters", ()):
            found[layer] = module.change([name])[0]
    return found


def summed(model, weights=WEIGHTS) -> dict[str, torch.Tensor]:
    parts = [changes(model, name) for name in "ab"]
    layers = dict.fromkeys([*parts[0], *parts[1]])
    return {
        layer: sum(w * part[layer] for w, part in zip(weights, parts, strict=True) if layer in part)
        for layer in layers
    }


def close(got, wanted, size=1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=size, atol=size)


@pytest.mark.parametrize("kind", ["linear", "cat"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"use_rslora": True}, {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}}, {"use_rslora": True}),
        ({"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens"]}),
        ({"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}),
        ({"target_modules": r".*\.q_proj"}, {"target_modules": r".*\.k_proj"}),
        ({"target_modules": r".*\.q_proj"}, {"target_modules": ["k_proj"]}),
    ],
    ids=["plain", "rslora and ranks", "patterns", "embedding", "starts", "two regexes", "a regex and a list"],
)
def test_the_sum_of_changes_is_exact(kind, first, second, tmp_path) -> None:
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**{**LORA, **first}), "a")
    ours.add_adapter("b", peft_dist.LoraConfig(**{**LORA, **second}))
    filled(ours)
    ours.add_weighted_adapter(["a", "b"], WEIGHTS, "both", kind)
    wanted, got = summed(ours), changes(ours, "both")
    assert got.keys() == wanted.keys()
    for layer, change in wanted.items():
        close(got[layer], change)
    assert not any(t.requires_grad for t in ours.adapter_tensors("both").values())
    assert ours.active_adapters == ["a"]
    ours.set_adapter("both")
    logits = ours(input_ids=IDS).logits
    ours.save_pretrained(tmp_path, selected_adapters=["both"])
    theirs = peft.PeftModel.from_pretrained(bases.llama(), tmp_path / "both")
    close(theirs(input_ids=IDS).logits, logits, 5e-5)


def test_theirs_mixes_factors() -> None:
    """HF PEFT's `linear` multiplies the sum of the B by the sum of the A: one adapter's B meets another's A."""
    ours, theirs = pair()
    ours.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", "linear")
    theirs.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", "linear")
    layer = "model.layers.0.self_attn.q_proj"
    wanted = summed(ours, [0.5, 0.5])[layer]
    close(changes(ours, "both")[layer], wanted)
    module = theirs.get_base_model().get_submodule(layer)
    assert (module.get_delta_weight("both") - wanted).norm() > 0.5 * wanted.norm()


def test_theirs_scales_rslora_by_the_root_of_the_rank() -> None:
    ours, theirs = pair({"use_rslora": True}, {"use_rslora": True})
    for model in (ours, theirs):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "both", "cat")
    layer = "model.layers.0.self_attn.q_proj"
    wanted = summed(ours)[layer]
    close(changes(ours, "both")[layer], wanted)
    close(theirs.get_base_model().get_submodule(layer).get_delta_weight("both"), wanted * 8**0.5)


@pytest.mark.parametrize("kind", [k for k in COMBINATIONS if k.endswith("svd")])
@pytest.mark.parametrize("more", [{}, {"svd_rank": 2}, {"svd_rank": 6, "svd_clamp": 0.9}], ids=str)
def test_svd_types_are_theirs(kind, more, monkeypatch) -> None:
    # Chance is drawn at other times in the two libraries.
    monkeypatch.setattr(
        torch, "bernoulli", lambda t: (torch.arange(t.numel()) * 7 % 5 > 1).float().view_as(t)
    )
    ours, theirs = pair()
    arguments = {} if kind == "svd" else {"density": 0.6}
    if "ties" in kind:
        arguments["majority_sign_method"] = "frequency"
    for model in (ours, theirs):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "both", kind, **arguments, **more)
    for layer, change in changes(ours, "both").items():
        close(change, theirs.get_base_model().get_submodule(layer).get_delta_weight("both"), 1e-4)
        assert ours.get_base_model().get_submodule(layer).tensors("both")["A"].shape[0] == more.get(
            "svd_rank", 4
        )


@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_other_types_combine_changes_too(kind) -> None:
    ours, _ = pair({"r": 8}, {"r": 8})
    torch.manual_seed(0)
    ours.add_weighted_adapter(["a", "b"], WEIGHTS, "both", kind, density=0.5)
    torch.manual_seed(0)
    for module in ours.get_base_model().modules():
        if "both" not in getattr(module, "adapters", ()):
            continue
        deltas = [module.change([name])[0] for name in "ab"]
        wanted = getattr(combine, kind)(deltas, torch.tensor(WEIGHTS), 0.5)
        # The ranks' sum is all that these layers have.
        assert len(module.tensors("both")["A"]) == 16
        close(module.change(["both"])[0], wanted, 1e-4)


@pytest.mark.parametrize("name", ["task_arithmetic", "magnitude_prune", "dare_linear", "ties", "dare_ties"])
def test_combinations_of_tensors_are_theirs(name) -> None:
    from peft.utils import merge_utils

    tensors = list(torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)))
    weights = torch.tensor([0.5, -1.0, 2.0])
    arguments = {} if name == "task_arithmetic" else {"density": 0.4}
    for sign in ("total", "frequency") if "ties" in name else (None,):
        more = {} if sign is None else {"majority_sign_method": sign}
        results = []
        for library in (combine, merge_utils):
            torch.manual_seed(0)
            results.append(getattr(library, name)(tensors, weights, **arguments, **more))
        assert torch.equal(*results)


def test_one_adapter_is_scaled_and_dora_needs_svd() -> None:
    ours, _ = pair({}, {"use_dora": True})
    ours.add_weighted_adapter(["a"], [-2.0], "scaled")
    for layer, change in changes(ours, "scaled").items():
        close(change, -2 * changes(ours, "a")[layer])
    with pytest.raises(
        ConfigError, match=r"change of adapter 'b' is not of low rank.*Use combination_type 'svd'"
    ):
        ours.add_weighted_adapter(["a", "b"], WEIGHTS, "both", "cat")
    assert "both" not in ours.peft_config
    ours.add_weighted_adapter(["a", "b"], WEIGHTS, "both", "svd", svd_rank=16)
    for layer, change in summed(ours).items():
        close(changes(ours, "both")[layer], change, 1e-4)


def test_biases_and_modules_come_along() -> None:
    ours, _ = pair({"lora_bias": True, "modules_to_save": ["lm_head"]}, {"lora_bias": True})
    with torch.no_grad():
        ours.get_base_model().lm_head.tensors("a")["weight"].add_(1.0)
    ours.add_weighted_adapter(["a", "b"], WEIGHTS, "both", "cat")
    module = ours.get_base_model().model.layers[0].self_attn.q_proj
    db = [module.change([name])[1] for name in "ab"]
    close(module.change(["both"])[1], WEIGHTS[0] * db[0] + WEIGHTS[1] * db[1])
    head = ours.get_base_model().lm_head
    assert torch.equal(head.tensors("both")["weight"], head.tensors("a")["weight"])


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_ia3_is_theirs(base) -> None:
    models = []
    for library in (peft_dist, peft):
        config = {"task_type": "CAUSAL_LM", "fan_in_fan_out": base == "gpt2"}
        model = library.get_peft_model(getattr(bases, base)(), library.IA3Config(**config), adapter_name="a")
        model.add_adapter("b", library.IA3Config(**config))
        filled(model)
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "both")
        model.set_adapter("both")
        models.append(model.eval()(input_ids=IDS).logits)
    close(*models)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"adapters": ["a", "c"]}, AdapterError, "adapter 'c' does not exist; there are: a, b"),
        ({"adapters": []}, AdapterError, "no adapter is named"),
        ({"weights": [1.0]}, ConfigError, "1 weights for 2 adapters"),
        ({"adapter_name": "a"}, AdapterError, "has an adapter 'a' already"),
        ({"combination_type": "tie"}, ConfigError, "'tie' is not one of .* Closest: 'ties'"),
        ({"combination_type": "ties"}, ConfigError, "density: None; ties needs a share"),
        ({"combination_type": "ties", "density": 2}, ConfigError, "density: 2; ties needs a share"),
    ],
)
def test_refusals(arguments, error, message) -> None:
    ours, _ = pair()
    given = {"adapters": ["a", "b"], "weights": WEIGHTS, "adapter_name": "both", **arguments}
    with pytest.raises(error, match=message):
        ours.add_weighted_adapter(**given)
    assert list(ours.peft_config) == ["a", "b"]


def test_learned_tokens_are_not_left_out_of_a_combination() -> None:
    tokens = {"trainable_token_indices": [3, 5]}
    ours, theirs = pair(tokens, tokens)
    with pytest.raises(
        ConfigError, match="adapter 'a' has trainable_token_indices, which cannot be combined"
    ):
        ours.add_weighted_adapter(["a", "b"], WEIGHTS, "both")
    theirs.add_weighted_adapter(["a", "b"], WEIGHTS, "both", combination_type="linear")
    theirs.set_adapter("both")
    layer, ids = theirs.get_base_model().model.embed_tokens, torch.tensor([3, 5])
    assert theirs.peft_config["both"].trainable_token_indices == [3, 5]
    assert torch.equal(layer(ids), layer.token_adapter.base_layer(ids))


def test_what_cannot_be_combined() -> None:
    ours, _ = pair({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]})
    with pytest.raises(ConfigError, match="a, b each train 'lm_head' whole"):
        ours.add_weighted_adapter(["a", "b"], WEIGHTS, "both")
    ours, _ = pair({"bias": "all"})
    with pytest.raises(ConfigError, match="adapter 'a' has bias, which cannot be combined"):
        ours.add_weighted_adapter(["a", "b"], WEIGHTS, "both")
    ours = peft_dist.get_peft_model(
        bases.llama(), peft_dist.AdaLoraConfig(total_step=10, task_type="CAUSAL_LM"), "a"
    )
    with pytest.raises(TypeError, match="AdaLoraModel does not support add_weighted_adapter"):
        ours.add_weighted_adapter(["a"], [1.0], "b")
