"""HF PEFT's module paths and names resolve here, and its classes answer `isinstance` for this package's layers."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer as TheirLayer

import peft_dist
from peft_dist.adapted import AdapterModule
from peft_dist.catalog import METHODS, config_class
from peft_dist.errors import AdapterError, ConfigError
from tests.contract import bases
from tests.contract.test_fields import base_values
from tests.contract.test_peft_parity import PARITY

LINES = [
    line.split()
    for line in (Path(__file__).parent / "hf_names.txt").read_text().splitlines()
    if not line.startswith("#")
]


def module_of(path: str):
    return importlib.import_module("peft_dist" if path == "." else f"peft_dist.{path}")


@pytest.mark.parametrize("path", sorted({line[0] for line in LINES}))
def test_the_names_of_their_module_resolve(path) -> None:
    module = module_of(path)
    names = [line[1] for line in LINES if line[0] == path and len(line) == 2]
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing


def test_the_list_holds_all_that_they_make_public() -> None:
    """But for the methods that come later, and what `hf_names.txt` says it leaves out."""
    later = "adamss beft cartridge deft frod glora hira lily peanut psoft pvera shadow supertuning tinylora unilora"
    folders = later.split()
    foreign = {n for f in folders for n in importlib.import_module(f"peft.tuners.{f}").__all__}
    listed = {(line[0], line[1]) for line in LINES if len(line) == 2}
    for path in (".", "tuners", "tuners.lora", "functional", "utils"):
        theirs = importlib.import_module("peft" if path == "." else f"peft.{path}")
        for name in theirs.__all__:
            mapped = name.startswith("TRANSFORMERS_MODELS_TO_") and name.split("_")[3].lower() in folders
            home = getattr(getattr(theirs, name), "__module__", "") or ""
            if name not in foreign and not mapped and ".cartridge" not in home:
                assert (path, name) in listed


CLASSES = sorted(
    {
        (path, name)
        for path, name in (line for line in LINES if len(line) == 2)
        if path.startswith("tuners.") and (path.endswith(".layer") or name == "BaseTunerLayer")
        and isinstance(getattr(importlib.import_module(f"peft.{path}"), name), type)
    }
    | {("utils.other", "ModulesToSaveWrapper"), ("utils.other", "AuxiliaryTrainingWrapper")}
)  # fmt: skip
ON_LAYERS = [
    name
    for name in METHODS
    if name not in ("BONE", "ADAPTION_PROMPT", "XLORA") and not config_class(name).is_prompt_learning
]


def instances(model, library: str) -> dict[tuple[str, str], set[str]]:
    """Class -> names of the modules that are instances of it."""
    found = {}
    for path, name in CLASSES:
        cls = getattr(importlib.import_module(f"{library}.{path}"), name)
        names = {key for key, module in model.get_base_model().named_modules() if isinstance(module, cls)}
        if names:
            found[path, name] = names
    return found


def both(name: str, base: str = "llama", **more):
    values = {**base_values(name), **more}
    theirs = peft.get_peft_model(
        getattr(bases, base)(), peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)](**values)
    )
    return peft_dist.get_peft_model(getattr(bases, base)(), config_class(name)(**values)), theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ON_LAYERS)
def test_isinstance_answers_as_theirs(name) -> None:
    more = {} if name in ("TRAINABLE_TOKENS", "OSF") else {"modules_to_save": ["lm_head"]}
    ours, theirs = both(name, **more)
    assert instances(ours, "peft_dist") == instances(theirs, "peft")
    assert type(ours.base_model).__name__ == type(theirs.base_model).__name__
    assert isinstance(ours.base_model, getattr(peft_dist, type(theirs.base_model).__name__))


@pytest.mark.filterwarnings("ignore")
def test_isinstance_on_other_kinds_of_layers() -> None:
    for name in ("LORA", "IA3", "LOHA", "OFT"):
        targets = ["0", "1", "2"] if name in ("LORA", "OFT") else ["1", "2"]
        values = {"target_modules": targets, **({"feedforward_modules": []} if name == "IA3" else {})}

        def base():
            return torch.nn.Sequential(
                torch.nn.Embedding(6, 32), torch.nn.Linear(32, 32), torch.nn.Conv2d(32, 32, 1)
            )

        ours = peft_dist.get_peft_model(base(), config_class(name)(**values))
        theirs = peft.get_peft_model(base(), peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)](**values))
        assert instances(ours, "peft_dist") == instances(theirs, "peft"), name
    assert TheirLayer is not peft_dist.tuners.tuners_utils.BaseTunerLayer


def test_a_class_derived_from_a_layers_stands_for_itself() -> None:
    LoraLayer = peft_dist.tuners.lora.LoraLayer

    class Mine(torch.nn.Module, LoraLayer):
        pass

    model = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraLayer) and not isinstance(layer, Mine) and isinstance(Mine(), LoraLayer)


def test_programs_ask_a_layer_where_its_tensors_are() -> None:
    """Also for what it has none of: `if name in layer.lora_A` is asked of embeddings too."""
    ours, theirs = both("LORA", r=3, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    mine, other = (
        (m.get_base_model().model.layers[0].self_attn.q_proj, m.get_base_model().model.embed_tokens)
        for m in (ours, theirs)
    )
    for layer, same in zip(mine, other, strict=True):
        assert set(layer.adapter_layer_names) == set(same.adapter_layer_names)
        for name in same.adapter_layer_names:
            assert list(getattr(layer, name)) == list(getattr(same, name)), name
        for name in ("lora_bias", "fan_in_fan_out", "_disable_adapters", "_active_adapter"):
            assert getattr(layer, name) == getattr(same, name), name
        assert set(layer.other_param_names) <= {*same.other_param_names}
        assert repr(layer).partition("(")[0] == repr(same).partition("(")[0]
    a, b = mine[0].lora_A["default"], mine[0].lora_B["default"]
    x = torch.randn(2, a.in_features)
    torch.testing.assert_close(b(a(x)), x @ a.weight.T @ b.weight.T)
    assert a.bias is None and b.bias is None is other[0].lora_B["default"].bias
    assert (a.out_features, b.out_features) == (3, 16) and not hasattr(mine[1].base_layer, "in_features")
    with pytest.raises(AttributeError, match="no_such_thing"):
        mine[0].no_such_thing  # noqa: B018
    for model in (ours, theirs):
        head = model.get_base_model().lm_head
        assert (
            head.active_adapter == "default"
            and head.modules_to_save[head.active_adapter].weight.requires_grad
        )
        head.set_adapter([])
        assert head.active_adapter == []


def _settings(layer) -> dict[str, dict]:
    """What HF PEFT's layers say of their adapters in plain values."""
    told = {name: getattr(layer, name) for name in layer.other_param_names if name.isidentifier()}
    return {
        name: each
        for name, each in told.items()
        if type(each) is dict
        and each
        and all(isinstance(value, (str, int, float)) for value in each.values())
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", [k for k, v in PARITY.items() if hasattr(peft, v.config)])
def test_what_a_layer_says_of_its_adapters_is_theirs(label) -> None:
    """r, scaling, block sizes, numbers of frequencies and the like, layer by layer."""
    parity = PARITY[label]
    ours, theirs = (
        library.get_peft_model(
            getattr(bases, parity.base)(), getattr(library, parity.config)(**copy.deepcopy(parity.values))
        )
        for library in (peft_dist, peft)
    )
    assert ours.peft_type == theirs.peft_type
    layers = dict(ours.named_modules())
    for name, theirs_here in theirs.named_modules():
        # HF PEFT puts the wrappers of one module's parameters into one another in another order.
        if not isinstance(theirs_here, TheirLayer) or hasattr(theirs_here, "parameter_name"):
            continue
        for attribute, told in _settings(theirs_here).items():
            # HF PEFT divides AdaLoRA's by the rank later.
            if (parity.config, attribute) != ("AdaLoraConfig", "scaling"):
                assert dict(getattr(layers[name], attribute)) == told, (name, attribute)


def test_a_factor_with_a_bias_has_it() -> None:
    for model in both("LORA", r=3, target_modules=["q_proj"], lora_bias=True):
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.lora_A["default"].bias is None and layer.lora_B["default"].bias.shape == (16,)


def test_what_programs_set_of_frozen_tensors_serves_and_is_saved(tmp_path) -> None:
    ids = torch.arange(1, 7).view(1, 6)
    ours, theirs = both("VERA", r=3, target_modules=["q_proj", "o_proj"], d_initial=1.0)
    for model in (ours, theirs):
        held = model.eval().base_model.vera_A
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.fill_(0.5)
            before = model(ids).logits
            held["default"] += 1
            added = model(ids).logits
            held["default"] = held["default"] * 2
        assert not held["default"].requires_grad
        assert not torch.allclose(before, added) and not torch.allclose(added, model(ids).logits)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path)
    loaded = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits)


def test_what_programs_set_of_a_layer_has_theirs_effect() -> None:
    ids = torch.arange(1, 7).view(1, 6)
    ours, theirs = both("LORA", r=3, lora_alpha=6, lora_dropout=0.5, target_modules=["q_proj", "up_proj"])
    with torch.no_grad():
        values = {
            name: torch.randn(p.shape) * 0.3 for name, p in theirs.named_parameters() if p.requires_grad
        }
        for model in (ours, theirs):
            model.eval()
            for name, p in model.named_parameters():
                if name in values:
                    p.copy_(values[name])
    steps = {
        "written": lambda layer: layer.scaling.__setitem__("default", layer.scaling["default"] * 0.5),
        "set": lambda layer: layer.set_scale("default", 3),
        "of another": lambda layer: layer.set_scale("zz", 3),
        "scaled": lambda layer: layer.scale_layer(0.7),
        "divided": lambda layer: layer.unscale_layer(2),
        "none": lambda layer: layer.set_scale("default", 0),
        "as configured": lambda layer: layer.unscale_layer(),
        "disabled": lambda layer: setattr(layer, "_disable_adapters", True),
        "enabled": lambda layer: setattr(layer, "_disable_adapters", False),
        "inactive": lambda layer: setattr(layer, "_active_adapter", []),
    }
    before = ours(ids).logits
    for name, step in steps.items():
        for model, library in ((ours, peft_dist), (theirs, peft)):
            for layer in model.modules():
                if isinstance(layer, library.tuners.lora.LoraLayer):
                    step(layer)
                    assert layer.lora_alpha == {"default": 6}
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4, msg=name)
        assert torch.equal(ours(ids).logits, before) == (name in ("as configured", "enabled"))
    layer = ours.get_base_model().model.layers[0].self_attn.q_proj
    layer._active_adapter = "default"
    layer.train()
    x = torch.randn(2, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.lora_dropout["default"].p = 0.0
    assert (
        torch.equal(layer(x), layer(x))
        and layer.lora_dropout["default"].p == 0
        and layer.lora_alpha["default"] == 6
    )
    with pytest.raises(AdapterError, match="cannot be replaced by a module"):
        layer.lora_A["default"] = torch.nn.Linear(16, 3)
    ia3 = peft_dist.get_peft_model(bases.llama(), peft_dist.VBLoRAConfig(**base_values("VBLORA")))
    other = next(m for m in ia3.modules() if isinstance(m, AdapterModule) and m.adapters)
    with pytest.raises(AdapterError, match="is not to be set"):
        other.take_scaling("default", 2.0)


def test_attributes_of_a_layer_are_theirs() -> None:
    values = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["q_proj"], "rank_pattern": {}}
    ours, theirs = both("LORA", **values)
    mine, other = (m.get_base_model().model.layers[0].self_attn.q_proj for m in (ours, theirs))
    for name in (
        "r", "lora_alpha", "scaling", "active_adapters", "active_adapter", "merged", "merged_adapters",
        "disable_adapters", "in_features", "out_features", "use_dora", "use_rslora",
    ):  # fmt: skip
        if name not in ("use_dora", "use_rslora", "active_adapter"):
            assert getattr(mine, name) == getattr(other, name), name
        assert hasattr(mine, name)
    assert mine.use_dora == {"default": False} and mine.active_adapter == ["default"]
    assert isinstance(mine.lora_dropout["default"], type(other.lora_dropout["default"]))
    assert torch.equal(mine.weight, other.weight) and torch.equal(mine.bias, other.bias)
    assert mine.lora_A["default"].weight.shape == other.lora_A["default"].weight.shape
    assert mine.get_base_layer() is mine.base_layer and type(mine.get_base_layer()) is torch.nn.Linear
    with torch.no_grad():
        mine.lora_B["default"].weight.normal_()
    change = mine.lora_B["default"].weight @ mine.lora_A["default"].weight * 2
    torch.testing.assert_close(mine.get_delta_weight("default"), change)
    x, stored = torch.randn(2, 16), mine.base_layer.weight.clone()
    mine.eval()
    y = mine(x)
    mine.merge(safe_merge=True)
    assert mine.merged and mine.merged_adapters == ["default"]
    torch.testing.assert_close(mine.base_layer.weight, stored + change)
    torch.testing.assert_close(mine(x), y)
    mine.unmerge()
    assert not mine.merged and torch.equal(mine.base_layer.weight, stored)
    mine.set_adapter([])
    assert not mine.lora_A["default"].weight.requires_grad
    torch.testing.assert_close(mine(x), mine.base_layer(x))
    mine.set_adapter("default")
    mine.enable_adapters(False)
    assert mine.disable_adapters
    torch.testing.assert_close(mine(x), mine.base_layer(x))
    with pytest.raises(AttributeError):
        _ = mine.no_such_thing


def test_what_is_not_here_says_so_when_used() -> None:
    from peft_dist.tuners.lora.config import LoraGAConfig

    assert LoraGAConfig is peft_dist.LoraGAConfig
    for made in (lambda: LoraGAConfig(), lambda: peft_dist.create_arrow_model("x")):
        with pytest.raises(ConfigError, match="this package does not have it"):
            made()
    with pytest.raises(ImportError):
        importlib.import_module("peft_dist.tuners.nothing")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = peft_dist.tuners.lora.nothing
    assert json.dumps(peft_dist.utils.peft_types.PeftType.LORA) == '"LORA"'
    assert not any(isinstance(m, AdapterModule) for m in bases.llama().modules())


def of_both(path: str, name: str) -> tuple:
    return tuple(
        getattr(importlib.import_module(f"{library}.{path}"), name) for library in ("peft_dist", "peft")
    )


CONSTANTS = (
    "WEIGHTS_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "SEQ_CLS_HEAD_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "TOKENIZER_CONFIG_NAME",
    "DUMMY_TARGET_MODULES",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
)


def test_functions_give_what_theirs_give(tmp_path) -> None:
    ids = torch.tensor([[5, 6, -100, 7]])
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 4, generator=generator)
    cache = tuple(torch.randn(2, 3, 4, 5, 6, generator=generator) for _ in range(4))
    for path, name, arguments in (
        ("utils", "shift_tokens_right", (ids, 1, 0)),
        ("utils.other", "transpose", (W, True)),
        ("utils.other", "get_pattern_key", (["q.*", "v"], "layers.0.qkv")),
        ("utils.other", "get_pattern_key", (["x"], "layers.0.qkv")),
        ("utils.other", "match_target_against_key", ("a.*", "b")),
        ("utils", "infer_device", ()),
        ("tuners.osf.utils", "decompose_weight_matrix", (W, 2)),
        ("utils.constants", "bloom_model_postprocess_past_key_value", (cache,)),
        ("utils.constants", "starcoder_model_postprocess_past_key_value", (cache,)),
    ):
        ours, theirs = of_both(path, name)
        mine, other = ours(*arguments), theirs(*arguments)
        torch.testing.assert_close(mine, other, msg=name) if not isinstance(mine, (str, type(None))) else None
        assert isinstance(mine, torch.Tensor | dict | tuple) or mine == other, name
    for name in CONSTANTS:
        mine, other = of_both("utils.constants", name)
        assert mine == other, name
    model = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    mine, other = (library.load_peft_weights(tmp_path, device="cpu") for library in (peft_dist, peft))
    torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", ["lm_head", "model.layers.1.self_attn.q_proj"])
def test_modules_are_found_by_name(name) -> None:
    """The private functions of `peft.utils` that programs which merge by hand import."""
    model = peft_dist.get_peft_model(
        bases.llama(), peft_dist.LoraConfig(target_modules=["q_proj"])
    ).get_base_model()
    for function in ("_get_submodules", "_get_submodules_with_grandparent"):
        ours, theirs = of_both("utils.other", function)
        assert ours(model, name) == theirs(model, name)
    for function, arguments in (
        ("_is_valid_match", ("a.b", "b")),
        ("_is_valid_match", ("ab", "b")),
        ("_get_input_embeddings_name", (model,)),
        ("_get_batch_size", (torch.zeros(3, 2), None)),
    ):
        ours, theirs = of_both("utils.other", function)
        assert ours(*arguments) == theirs(*arguments)
    freeze, _ = of_both("utils", "_freeze_adapter")
    freeze(model, "default")
    assert not any(p.requires_grad for p in model.parameters())


def test_projected_gradients_are_theirs() -> None:
    ours, theirs = of_both("tuners.osf.utils", "project_gradient_to_orthogonal_space")
    taken_apart = [
        of_both("tuners.osf.utils", "decompose_weight_matrix")[0](torch.eye(6)[:, :4] * 2 + 0.1, 2)
        for _ in "ab"
    ]
    for parts, project in zip(taken_apart, (ours, theirs), strict=True):
        for key in ("U_low", "S_low", "V_low"):
            parts[key].grad = torch.ones_like(parts[key])
        project(parts)
    for key in ("U_low", "S_low", "V_low"):
        torch.testing.assert_close(taken_apart[0][key].grad, taken_apart[1][key].grad)


def test_what_reads_pickles_is_refused() -> None:
    with pytest.raises(ValueError, match="only safetensors are read"):
        peft_dist.utils.save_and_load.torch_load("x")
    with pytest.raises(ValueError, match="modules_to_save"):
        peft_dist.utils.other.set_additional_trainable_modules()
