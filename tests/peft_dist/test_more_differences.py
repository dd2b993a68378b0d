"""More of what differs from HF PEFT on purpose, found by running programs with both: both behaviours, side by
side."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import peft_dist
from peft_dist.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MergeError,
    PeftDistError,
    TargetError,
)
from tests.contract import bases

BOTH = (peft, peft_dist)
IDS = torch.arange(1, 7).view(1, 6)
LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(library, **values):
    config = library.LoraConfig(**{**LORA, "init_lora_weights": False, **values})
    return library.get_peft_model(bases.llama(), config).eval()


def two(library):
    model = adapted(library)
    model.add_adapter("b", library.LoraConfig(**LORA, init_lora_weights=False))
    return model


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def refuses(call, *errors: type[BaseException]) -> bool:
    try:
        call()
    except errors:
        return True
    return False


def test_each_adapter_trains_its_own_biases(tmp_path) -> None:
    base = {library: bases.llama() for library in BOTH}
    model = {lib: lib.get_peft_model(base[lib], lib.LoraConfig(**LORA, bias="lora_only")) for lib in BOTH}
    before = base[peft_dist](IDS).logits
    for each in model.values():
        with torch.no_grad():
            for name, p in each.named_parameters():
                if p.requires_grad and "bias" in name:
                    p.add_(1.0)
    off = {}
    for library, each in model.items():
        each.eval()
        with each.disable_adapter():
            off[library] = each(IDS).logits
    torch.testing.assert_close(off[peft_dist], before)
    assert (off[peft] - before).abs().max() > 1e-3
    more = {lib: lib.LoraConfig(**LORA, bias="lora_only") for lib in BOTH}
    assert [refuses(lambda lib=lib: model[lib].add_adapter("b", more[lib]), ValueError) for lib in BOTH] == [
        1,
        0,
    ]
    keys = [lib.get_peft_model_state_dict(each).keys() for lib, each in model.items()]
    assert keys[0] == keys[1]


def test_adapters_are_named_per_row_in_training_too() -> None:
    for library in BOTH:
        model = two(library).train()
        assert refuses(lambda m=model: m(IDS, adapter_names=["b"]), ValueError) is (library is peft)
    ia3 = {"feedforward_modules": [], "target_modules": ["k_proj"], "init_ia3_weights": False}
    same = []
    for library in BOTH:
        model = library.get_peft_model(bases.llama(), library.IA3Config(**ia3)).eval()
        same.append(torch.allclose(model(IDS, adapter_names=["__base__"]).logits, model(IDS).logits))
    assert same == [True, False]


def test_an_error_in_a_forward_leaves_no_names_behind() -> None:
    for library in BOTH:
        model = two(library)
        before = model(IDS).logits
        for names in (["b", "b"], ["b", "default"], []):
            for call in (model, partial(model.generate, max_new_tokens=1)):
                assert refuses(partial(call, IDS, adapter_names=names), ValueError) or (library, names) == (
                    peft,
                    [],
                )
        with pytest.raises(ValueError):
            model(inputs_embeds=torch.zeros(3, 2, 16), adapter_names=["b", "b"])
        if library is peft:
            assert refuses(lambda m=model: m(IDS), ValueError)
        else:
            assert torch.equal(model(IDS).logits, before)


def test_what_a_config_says() -> None:
    values = {lib: lib.LoraConfig(target_modules=("b", "a"), exclude_modules=["c"]).to_dict() for lib in BOTH}
    assert values[peft]["exclude_modules"] == {"c"} and values[peft]["target_modules"] == ("b", "a")
    assert json.loads(json.dumps(values[peft_dist]))["target_modules"] == ["a", "b"]
    names = [adapted(lib, target_modules="all-linear").peft_config["default"].target_modules for lib in BOTH]
    assert "model.layers.0.self_attn.q_proj" in names[0] and "q_proj" in names[1]
    assert [refuses(lambda lib=lib: adapted(lib, r=4000), ValueError) for lib in BOTH] == [False, True]


def test_classes_of_layers_and_of_what_holds_tensors() -> None:
    layers = [adapted(lib).get_base_model().model.layers[0].self_attn.q_proj for lib in BOTH]
    assert [type(layer).__name__ for layer in layers] == ["Linear", "Adapted"]
    assert all(str(layer).startswith("lora.Linear(") for layer in layers)
    factors = [type(layer.lora_A["default"]).__name__ for layer in layers]
    assert factors == ["Linear", "Tensors"]
    prompt = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    models = [lib.get_peft_model(bases.llama(), lib.PromptTuningConfig(**prompt)) for lib in BOTH]
    assert [type(m.prompt_encoder["default"]).__name__ for m in models] == ["PromptEmbedding", "Tensors"]
    assert [hasattr(m, "unload") for m in models] == [False, True]
    with pytest.raises(AttributeError):
        models[0].merge_and_unload()
    with pytest.raises(MergeError, match="changes no weight"):
        models[1].merge_and_unload()


def test_what_is_no_module() -> None:
    dropouts, scalings, ran = [], [], []
    for library in BOTH:
        model = adapted(library, lora_dropout=0.5, target_modules=["q_proj", "embed_tokens"])
        dropouts.append(any(isinstance(m, torch.nn.Dropout) for n, m in model.named_modules() if "lora" in n))
        base = model.get_base_model().model
        base.embed_tokens.scale_layer(3)
        scalings.append(base.embed_tokens.scaling["default"])
        hooked = []
        base.layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(
            lambda *_, h=hooked: h.append(1)
        )
        model(IDS)
        ran.append(bool(hooked))
    assert dropouts == ran == [True, False] and scalings[1] == 3 * scalings[0]


def test_mixed_models_are_saved(tmp_path) -> None:
    models = [lib.get_peft_model(bases.llama(), lib.LoraConfig(**LORA), mixed=True) for lib in BOTH]
    for call in ("save_pretrained", "get_model_status"):
        arguments = (tmp_path / call,) if call == "save_pretrained" else ()
        assert refuses(
            lambda m=models[0], c=call, a=arguments: getattr(m, c)(*a), NotImplementedError, TypeError
        )
        getattr(models[1], call)(*arguments)
    assert isinstance(models[1].base_model, peft_dist.tuners.mixed.MixedModel)
    again = [lib.PeftMixedModel.from_pretrained(bases.llama(), tmp_path / "save_pretrained") for lib in BOTH]
    assert [bool(trained(model)) for model in again] == [True, False]


def test_disabling_is_for_its_time() -> None:
    models = [two(lib) for lib in BOTH]
    merged, inside, after = [], [], []
    for model in models:
        with model.disable_adapter():
            inside.append(bool(trained(model)))
        model.merge_adapter(["b"])
        with model.disable_adapter():
            model(IDS)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        merged.append(layer.merged_adapters)
        after.append(model.base_model.active_adapters)
    assert inside == [False, True] and merged == [[], ["b"]]


def test_names_of_adapters() -> None:
    for library in BOTH:
        theirs, model = library is peft, two(library)
        assert refuses(lambda m=model: m.merge_adapter(["zz"]), AdapterError) is not theirs
        assert refuses(lambda m=model: m.merge_adapter("b"), TypeError) is theirs
    for library in BOTH:
        model = two(library)
        assert refuses(lambda m=model: m.set_adapter(["default", "b"]), TypeError) is (library is peft)


def test_an_active_adapter_that_is_deleted_leaves_one_that_is_there() -> None:
    for library in BOTH:
        model = adapted(library, target_modules=["q_proj"])
        model.add_adapter("b", library.LoraConfig(**{**LORA, "target_modules": ["v_proj"]}))
        model.delete_adapter("default")
        assert refuses(lambda m=model: m(IDS), KeyError) is (library is peft)


def test_checkpoints_that_do_not_fit(tmp_path) -> None:
    adapted(peft_dist).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    first, *rest = sorted(whole)
    cases = {
        "lacks 1 tensors": {key: whole[key] for key in rest},
        "has, unknown here, 1 tensors": whole | {"base_model.model.x.lora_A.weight": torch.zeros(1)},
        "NaN or infinite": whole | {first: torch.full_like(whole[first], torch.nan)},
        "none of the 1 tensors": {"x": torch.zeros(1)},
    }
    for message, tensors in cases.items():
        save_file(tensors, file)
        peft.PeftModel.from_pretrained(bases.llama(), tmp_path)
        base = bases.llama()
        names = list(base.state_dict())
        with pytest.raises(CheckpointError, match=message):
            peft_dist.PeftModel.from_pretrained(base, tmp_path)
        assert list(base.state_dict()) == names
    save_file(whole, file)
    results = []
    for library in BOTH:
        model = adapted(library)
        results.append(library.set_peft_model_state_dict(model, library.get_peft_model_state_dict(model)))
    assert results[0].missing_keys and not results[1].missing_keys
    save_file(whole | {first: torch.zeros(5, 5)}, file)
    for library, error in ((peft, RuntimeError), (peft_dist, CheckpointError)):
        with pytest.raises(error):
            library.PeftModel.from_pretrained(bases.llama(), tmp_path)
    file.unlink()
    torch.save(whole, tmp_path / "adapter_model.bin")
    peft.PeftModel.from_pretrained(bases.llama(), tmp_path)
    with pytest.raises(CheckpointError, match="runs code when it is read"):
        peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path)


def test_a_swap_changes_the_config(tmp_path) -> None:
    adapted(peft_dist, r=4).save_pretrained(tmp_path)
    ranks = []
    for library in BOTH:
        model = adapted(library)
        hotswap = __import__(f"{library.__name__}.utils.hotswap", fromlist=["hotswap_adapter"])
        hotswap.hotswap_adapter(model, str(tmp_path), "default")
        ranks.append(model.peft_config["default"].r)
    assert ranks == [2, 4]


def test_arguments_of_a_combination() -> None:
    for library in BOTH:
        model = two(library)
        call = partial(model.add_weighted_adapter, ["default", "b"], [0.5], "w", combination_type="linear")
        assert refuses(call, PeftDistError) is (library is peft_dist)


def tied_llama() -> LlamaForCausalLM:
    config = copy.copy(bases.llama().config)
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merging_a_tied_layer_unties_it(target) -> None:
    right = []
    for library in BOTH:
        base = tied_llama()
        config = library.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        model = library.get_peft_model(base, config).eval()
        expected = model(IDS).logits
        right.append(torch.allclose(model.merge_and_unload()(IDS).logits, expected, atol=1e-5))
    assert right == [False, True]


def test_merging_replicated_layers() -> None:
    right = []
    for library in BOTH:
        model = adapted(library, layer_replication=[[0, 2], [1, 2]])
        expected = model(IDS, use_cache=False).logits
        merged = model.merge_and_unload()(IDS, use_cache=False).logits
        right.append(torch.allclose(merged, expected, atol=1e-5))
    assert right == [False, True]


def test_names_in_memory() -> None:
    tokens = [adapted(lib, trainable_token_indices=[1, 2]) for lib in BOTH]
    names = [{n for n, _ in model.named_parameters() if "tokens_delta" in n} for model in tokens]
    assert {n.replace(".token_adapter", "") for n in names[0]} == names[1] != names[0]
    keys = [lib.get_peft_model_state_dict(model).keys() for lib, model in zip(BOTH, tokens, strict=True)]
    assert keys[0] == keys[1]
    vera = [lib.get_peft_model(bases.llama(), lib.VeraConfig(r=2, target_modules=["q_proj"])) for lib in BOTH]
    found = [[n for n, _ in model.named_buffers() if "vera_A" in n] for model in vera]
    assert found[0][0].endswith("q_proj.vera_A.default") and found[1] == ["base_model.vera_A.default"]


def test_adapters_made_without_memory_are_so_wholly() -> None:
    on_meta = []
    for library in BOTH:
        config = library.LoraConfig(**LORA, modules_to_save=["lm_head"])
        model = library.get_peft_model(bases.llama(), config, low_cpu_mem_usage=True)
        on_meta.append({"modules_to_save" in n for n, p in model.named_parameters() if p.is_meta})
    assert on_meta == [{False}, {True, False}]


def mixtral() -> MixtralForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 16}
    return MixtralForCausalLM(MixtralConfig(**sizes, **more))


def test_names_that_experts_had_before_they_were_stacked() -> None:
    configs = []
    for library in BOTH:
        config = library.LoraConfig(r=2, target_modules="all-linear")
        library.get_peft_model(mixtral(), config)
        configs.append(config)
    assert configs[0].target_parameters == {"down_proj", "gate.weight", "gate_up_proj"}
    assert configs[1].target_parameters is None and "q_proj" in configs[1].target_modules
    named = {"r": 2, "target_modules": ["q_proj", "w1", "w2", "w3"]}
    peft.get_peft_model(mixtral(), peft.LoraConfig(**named))
    with pytest.warns(UserWarning, match=r"target_modules: 'w1', 'w2', 'w3' matched no layer"):
        peft_dist.get_peft_model(mixtral(), peft_dist.LoraConfig(**named))
    with pytest.raises(TargetError, match="'w1'"):
        peft_dist.get_peft_model(mixtral(), peft_dist.LoraConfig(r=2, target_modules=["w1", "w3"]))
    assert refuses(lambda: peft.get_peft_model(mixtral(), peft.LoraConfig(r=2)), ValueError)
    peft_dist.get_peft_model(mixtral(), peft_dist.LoraConfig(r=2))


def test_a_card_lies_beside_its_adapter(tmp_path) -> None:
    cards = []
    for library in BOTH:
        folder = tmp_path / library.__name__
        model = library.get_peft_model(bases.llama(), library.LoraConfig(**LORA), adapter_name="b")
        model.save_pretrained(folder)
        cards.append([path.relative_to(folder) for path in folder.rglob("README.md")])
    assert cards == [[Path("README.md")], [Path("b/README.md")]]


def test_dictionaries_with_unknown_fields() -> None:
    values = {"peft_type": "LORA", "r": 2, "later": 3}
    with pytest.raises(TypeError):
        peft.get_peft_config(values)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert peft_dist.get_peft_config(values).unknown == {"later": 3}
    assert "unknown fields later" in str(said[0].message)
    with pytest.raises(KeyError):
        peft.get_peft_config({"peft_type": "NOPE"})
    with pytest.raises(ConfigError):
        peft_dist.get_peft_config({"peft_type": "NOPE"})
