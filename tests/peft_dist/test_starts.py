"""Starts of LoRA that read the base or data: beside HF PEFT, beside their formulas, saved and loaded."""

from __future__ import annotations

import copy
import warnings

import bitsandbytes
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_dist
from peft_dist.calibration import corda, eva
from peft_dist.errors import ConfigError, PeftDistError
from peft_dist.methods.lora.loftq import int8, nf4
from tests.contract import bases

LORA = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))


def disturb(model) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def close(got, wanted, size=1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=size, atol=size)


def residual(model, layer: str) -> torch.Tensor:
    """The base without what its start took: W - s B0 A0."""
    module = model.get_base_model().get_submodule(layer)
    p, site = module.tensors("default"), module.base.site
    return module.base.weight() - model.peft_config["default"].scaling(site) * p["B0"] @ p["A0"]


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"]
)
def test_starts_from_the_base_are_theirs(start, more, tmp_path) -> None:
    config = {**LORA, "init_lora_weights": start, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(bases.llama(), peft.LoraConfig(**config))
        ours = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**config))
    bare = bases.llama()
    assert torch.equal(
        ours.get_base_model().model.layers[0].self_attn.q_proj.weight,
        bare.model.layers[0].self_attn.q_proj.weight,
    )
    close(logits(ours), logits(bare))
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        their_layer = theirs.get_base_model().get_submodule(layer)
        close(residual(ours, layer), their_layer.base_layer.weight)
        mine = ours.get_base_model().get_submodule(layer).tensors("default")
        close(
            mine["B"] @ mine["A"], their_layer.lora_B["default"].weight @ their_layer.lora_A["default"].weight
        )
    disturb(ours), disturb(theirs)
    wanted = logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    close(logits(peft.PeftModel.from_pretrained(bases.llama(), tmp_path / "ours")), wanted, 2e-5)
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is decomposed again.
        for name in ("svd", "qr"):
            patch.setattr(torch.linalg, name, None)
        again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "ours")
        lean = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "ours", low_cpu_mem_usage=True)
    assert torch.equal(logits(again), wanted)
    assert torch.equal(logits(lean), wanted)
    assert not any(t.is_meta for t in (*lean.parameters(), *lean.buffers()))
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = logits(theirs)
    for lean_load in (False, True):
        loaded = peft_dist.PeftModel.from_pretrained(
            bases.llama(), tmp_path / "theirs", low_cpu_mem_usage=lean_load
        )
        close(logits(loaded), wanted, 2e-5)


def test_fast_pissa_saves_its_random_directions(tmp_path) -> None:
    config = peft_dist.LoraConfig(**LORA, init_lora_weights="pissa_niter_64")
    ours = peft_dist.get_peft_model(bases.llama(), config)
    close(logits(ours), logits(bases.llama()))
    exact = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA, init_lora_weights="pissa"))
    layer = "model.layers.0.self_attn.q_proj"
    # Sixty-four subspace iterations of a random 16 x 16 matrix, whose singular values lie close together.
    close(residual(ours, layer), residual(exact, layer), 5e-2)
    disturb(ours)
    ours.save_pretrained(tmp_path)
    torch.manual_seed(99)
    assert torch.equal(logits(peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path)), logits(ours))


def test_olora_on_conv1d() -> None:
    """HF PEFT decomposes the stored, transposed weight: the factors do not fit a layer that is not square."""
    config = {"r": 4, "init_lora_weights": "olora", "fan_in_fan_out": True, "target_modules": ["c_attn"]}
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|size of tensor"):
        peft.get_peft_model(bases.gpt2(), peft.LoraConfig(**config))(input_ids=IDS)
    ours = peft_dist.get_peft_model(bases.gpt2(), peft_dist.LoraConfig(**config))
    close(logits(ours), logits(bases.gpt2()))
    module = ours.get_base_model().transformer.h[0].attn.c_attn
    Q, R = torch.linalg.qr(module.base.weight())
    close(module.tensors("default")["B0"] @ module.tensors("default")["A0"], Q[:, :4] @ R[:4])


def test_orthogonal_factors_cancel_and_both_learn() -> None:
    ours = peft_dist.get_peft_model(
        bases.llama(), peft_dist.LoraConfig(**LORA, init_lora_weights="orthogonal")
    )
    close(logits(ours), logits(bases.llama()))
    ours(input_ids=IDS, labels=IDS).loss.backward()
    assert all(t.abs().sum() > 0 and t.grad.abs().sum() > 0 for t in ours.adapter_tensors().values())


@pytest.mark.parametrize(
    ("make", "target"),
    [(bases.llama, "q_proj"), (bases.llama, "embed_tokens"), (bases.gpt2, "c_attn"), (bases.gpt2, "wte")],
)
def test_mica_keeps_b_at_the_minor_directions(make, target) -> None:
    config = {"r": 3, "target_modules": [target], "init_lora_weights": "mica", "task_type": "CAUSAL_LM"}
    models = [library.get_peft_model(make(), library.LoraConfig(**config)) for library in (peft_dist, peft)]
    close(logits(models[0]), logits(make()))
    ours, theirs = (
        library.get_peft_model_state_dict(m) for library, m in zip((peft_dist, peft), models, strict=True)
    )
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        close(t.abs(), theirs[name].abs())  # which of a direction's two signs is left to the library
    assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()
    models[0](input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in models[0].named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, p in models[1].named_parameters() if p.requires_grad} != set()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"r": 20, "init_lora_weights": "pissa"},
            r"r: 20 at 'model.layers.0.self_attn.q_proj', which is 16 x 16",
        ),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "r: 3 at .* needs an even rank"),
        ({"init_lora_weights": "corda"}, "is not prepared. Call preprocess_corda"),
        ({"init_lora_weights": "pisa"}, "'pisa' is not one of .* Closest: 'pissa'"),
        ({"init_lora_weights": "pissa_niter_x"}, "'pissa_niter_x' is not one of"),
        ({"init_lora_weights": "loftq"}, "loftq_config: must be given"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}},
            "loftq_bits: 3 is not one of 4, 8",
        ),
        (
            {"lora_bias": True, "init_lora_weights": "pissa"},
            "lora_bias: goes with init_lora_weights True or False",
        ),
        ({"lora_bias": True, "use_dora": True}, "lora_bias: does not go with use_dora"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config: .* is not supported; only None is"),
        ({"r": 20, "init_lora_weights": "mica"}, "r: 20 at .*, which is 16 x 16"),
        ({"init_lora_weights": "mica", "use_dora": True}, "'mica' does not go with use_dora"),
        ({"target_parameters": "experts"}, "target_parameters: 'experts'; it is a list of names"),
        (
            {"eva_config": 3, "init_lora_weights": "eva"},
            "eva_config: 3; it is a EvaConfig, its dictionary, or None",
        ),
    ],
)
def test_refusals_leave_the_model(values, message) -> None:
    base = bases.llama()
    with warnings.catch_warnings(), pytest.raises(PeftDistError, match=message):
        warnings.simplefilter("ignore")
        peft_dist.get_peft_model(base, peft_dist.LoraConfig(**{**LORA, **values}))
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_settings_have_rules() -> None:
    with pytest.raises(ConfigError, match=r"EvaConfig.rho: 0.5; it is at least 1.0"):
        peft_dist.EvaConfig(rho=0.5)
    with pytest.raises(ConfigError, match=r"EvaConfig.tau: 2.0; it lies between"):
        peft_dist.EvaConfig(tau=2.0)
    for values in (
        {"loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "eva"},
        {"eva_config": peft_dist.EvaConfig()},
        {"init_lora_weights": "corda"},
        {"corda_config": peft_dist.CordaConfig()},
    ):
        with pytest.warns(UserWarning, match=r"has no effect|defaults are used"):
            peft_dist.LoraConfig(**values)


# LoftQ


def test_quantisers() -> None:
    torch.manual_seed(0)
    W = torch.randn(64, 128)
    codes, state = bitsandbytes.functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
    close(nf4(W), bitsandbytes.functional.dequantize_4bit(codes, state), 1e-6)
    close(nf4(nf4(W)), nf4(W), 1e-7)
    assert (int8(W) - W).abs().max() <= W.abs().max() / 127


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_replaces_the_base_and_mends_it(iterations, tmp_path) -> None:
    config = peft_dist.LoraConfig(
        **LORA, init_lora_weights="loftq", loftq_config=peft_dist.LoftQConfig(4, iterations)
    )
    bare, ours = bases.llama(), peft_dist.get_peft_model(bases.llama(), config)
    assert config.loftq_config == {"loftq_bits": 4, "loftq_iter": iterations}
    layer = "model.layers.0.self_attn.q_proj"
    W, module = bare.get_submodule(layer).weight, ours.get_base_model().get_submodule(layer)
    Q, p = module.base_layer.weight, module.tensors("default")
    s = 6 / 4
    close(Q, nf4(W - s * p["B0"] @ p["A0"]), 1e-6)
    U, S, Vh = torch.linalg.svd(W - Q)
    close(s * p["B"] @ p["A"], U[:, :4] * S[:4] @ Vh[:4])
    mended, spoiled = (W - Q - s * p["B"] @ p["A"]).norm(), (W - nf4(W)).norm()
    assert mended < 0.8 * spoiled
    disturb(ours)
    ours.save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", None)
        again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path)
        lean = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, low_cpu_mem_usage=True)
    close(again.get_base_model().get_submodule(layer).base_layer.weight, Q, 1e-6)
    close(logits(again), logits(ours))
    close(logits(lean), logits(ours))


# CorDA


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_corda_is_theirs(method, base, tmp_path) -> None:
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": "corda", "task_type": "CAUSAL_LM"}
    config |= {"target_modules": ["c_attn"], "fan_in_fan_out": True} if base == "gpt2" else LORA
    make = getattr(bases, base)
    layer = "transformer.h.0.attn.c_attn" if base == "gpt2" else "model.layers.1.mlp.down_proj"

    # One sample at a time, as HF PEFT's hook wants it.
    def run(model):
        return lambda: [model(input_ids=IDS[i : i + 1]) for i in range(3)]

    their_base, our_base = make().eval(), make().eval()
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    theirs_config = peft.LoraConfig(**config, corda_config=CordaConfig(corda_method=method))
    preprocess_corda(their_base, theirs_config, run_model=run(their_base))
    theirs = peft.get_peft_model(their_base, theirs_config)
    files = {
        "cache_file": str(tmp_path / "c" / "cache"),
        "covariance_file": str(tmp_path / "c" / "covariance"),
    }
    ours_config = peft_dist.LoraConfig(
        **config, corda_config=peft_dist.CordaConfig(corda_method=method, **files)
    )
    corda.preprocess_corda(our_base, ours_config, run_model=run(our_base))
    ours = peft_dist.get_peft_model(our_base, ours_config)
    close(logits(ours), logits(make()))
    their_layer = theirs.get_base_model().get_submodule(layer)
    W = their_layer.base_layer.weight
    # The inverse of a covariance of 21 rows: fp32 leaves four digits.
    close(residual(ours, layer), W.T if base == "gpt2" else W, 1e-3)
    disturb(ours)
    ours.save_pretrained(tmp_path / "ours")
    close(logits(peft_dist.PeftModel.from_pretrained(make(), tmp_path / "ours")), logits(ours), 1e-6)
    # From the cache, and from the covariances, without another run.
    for left_out in ("covariance_file", "cache_file"):
        only = peft_dist.CordaConfig(corda_method=method, **{k: v for k, v in files.items() if k != left_out})
        again = peft_dist.LoraConfig(**config, corda_config=only)
        fresh = make()
        corda.preprocess_corda(fresh, again)
        close(residual(peft_dist.get_peft_model(fresh, again), layer), residual(ours, layer), 1e-4)


def test_corda_says_what_it_lacks() -> None:
    config = peft_dist.LoraConfig(**LORA, init_lora_weights="corda", corda_config=peft_dist.CordaConfig())
    with pytest.raises(ConfigError, match="give run_model, or a file"):
        corda.preprocess_corda(bases.llama(), config)
    with pytest.raises(ConfigError, match="ran 4 of 4 layers never"):
        corda.preprocess_corda(bases.llama(), config, run_model=lambda: None)
    with pytest.raises(ConfigError, match="corda_config must be given"):
        corda.preprocess_corda(bases.llama(), peft_dist.LoraConfig(**LORA))
    config.corda_config.corda_method = "other"
    with pytest.raises(ConfigError, match="'other' is not one of ipm, kpm"):
        corda.preprocess_corda(bases.llama(), config)


# EVA


def loader(num: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(num):
        ids = torch.randint(1, 64, (8, 16), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 12:] = 0
        labels = ids.clone()
        labels[:, :3] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


EVA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": "eva"}
EVA_TARGETS = {"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}


@pytest.mark.parametrize(
    "values", [{"rho": 1.0}, {"rho": 2.0}, {"rho": 1.0, "whiten": True, "use_label_mask": False}]
)
def test_eva_is_theirs(values) -> None:
    settings = {"tau": 0.9, **values}
    theirs = peft.get_peft_model(
        bases.llama(), peft.LoraConfig(**EVA, **EVA_TARGETS, eva_config=peft.EvaConfig(**settings))
    )
    ours = peft_dist.get_peft_model(
        bases.llama(), peft_dist.LoraConfig(**EVA, **EVA_TARGETS, eva_config=peft_dist.EvaConfig(**settings))
    )
    wanted = peft.get_eva_state_dict(theirs, loader(), show_progress_bar=False)
    got = eva.get_eva_state_dict(ours, loader(), show_progress_bar=False)
    assert got.keys() == wanted.keys()
    assert sum(len(A) for A in got.values()) == sum(len(A) for A in wanted.values())
    for name, A in got.items():
        B = wanted[name]
        k = min(len(A), len(B))
        # HF PEFT's decomposition is of a random subspace, and batches end where directions stop turning.
        cosine = torch.nn.functional.cosine_similarity(A[:k], B[:k]).abs()
        assert (cosine > 0.9).all(), (name, cosine)
        if values["rho"] == 1.0:
            assert len(A) == len(B) == 4
        shared = name.endswith(("q_proj", "k_proj"))
        if values["rho"] == 1.0 and shared and values.get("whiten"):
            # HF PEFT divides what layers with one input share in place, once for each of them.
            torch.testing.assert_close(A.norm(dim=1) ** 2, B.norm(dim=1).float(), rtol=0.1, atol=0)
        elif values["rho"] == 1.0:
            torch.testing.assert_close(A.norm(dim=1), B.norm(dim=1).float(), rtol=0.05, atol=0)


def test_eva_starts_an_adapter(tmp_path, capsys) -> None:
    config = peft_dist.LoraConfig(**EVA, **EVA_TARGETS, eva_config=peft_dist.EvaConfig(rho=2.0, tau=0.9))
    ours = peft_dist.get_peft_model(bases.llama(), config)
    found = eva.get_eva_state_dict(ours, loader())
    assert "layers" not in capsys.readouterr().err
    eva.initialize_lora_eva_weights(ours, eva_state_dict=copy.deepcopy(found), show_progress_bar=False)
    close(logits(ours), logits(bases.llama()))
    tensors = ours.adapter_tensors()
    for name, A in found.items():
        if len(A):
            assert torch.equal(tensors[f"{name}.lora_A.weight"], A)
            assert not tensors[f"{name}.lora_B.weight"].any()
            site = ours.get_base_model().get_submodule(name.removeprefix("base_model.model.")).base.site
            # alpha grows with the rank, so that the scaling stays.
            assert ours.peft_config["default"].scaling(site) == pytest.approx(8 / 4)
        else:
            assert f"{name}.lora_A.weight" not in tensors
    assert all(t.requires_grad for t in tensors.values())
    disturb(ours)
    ours.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(bases.llama(), tmp_path)), logits(ours))
    close(logits(peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path)), logits(ours))
    lean = peft_dist.get_peft_model(bases.llama(), copy.deepcopy(config), low_cpu_mem_usage=True)
    eva.initialize_lora_eva_weights(lean, loader(), show_progress_bar=False)
    assert not any(p.is_meta for p in lean.parameters())


def test_eva_of_a_bare_base_and_functions_of_ones_own() -> None:
    config = peft_dist.LoraConfig(**EVA, **EVA_TARGETS, eva_config=peft_dist.EvaConfig(rho=1.0, tau=0.8))
    seen = []

    def rows(layer_input, model_input, name):
        seen.append(name)
        return layer_input[0].flatten(0, -2)

    found = eva.get_eva_state_dict(
        bases.llama(),
        loader(),
        config,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=rows,
        show_progress_bar=False,
    )
    assert found.keys() == {
        f"model.layers.{i}.{name}"
        for i in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
    }
    # q and k take in the same tensor: its directions are found once.
    assert "model.layers.0.self_attn.q_proj" in seen and "model.layers.0.self_attn.k_proj" not in seen
    assert torch.equal(found["model.layers.0.self_attn.q_proj"], found["model.layers.0.self_attn.k_proj"])
    A = found["model.layers.0.self_attn.q_proj"]
    close(A @ A.T, torch.eye(4))


def test_eva_says_what_it_lacks() -> None:
    config = peft_dist.LoraConfig(**EVA, **EVA_TARGETS, eva_config=peft_dist.EvaConfig())
    with pytest.raises(ConfigError, match="must be a PeftModel"):
        eva.initialize_lora_eva_weights(bases.llama(), loader())
    with pytest.raises(ConfigError, match="peft_config must be given"):
        eva.get_eva_state_dict(bases.llama(), loader())
    ours = peft_dist.get_peft_model(bases.llama(), config)
    with pytest.raises(ConfigError, match="give a dataloader, or an eva_state_dict"):
        eva.initialize_lora_eva_weights(ours)
    with pytest.raises(ConfigError, match="the dataloader is empty"):
        eva.get_eva_state_dict(ours, [])
    with pytest.raises(ConfigError, match="nowhere are no layers"):
        eva.get_eva_state_dict(ours, loader(), prepare_layer_inputs_fn={"nowhere": lambda *a: a})
    plain = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA))
    with pytest.raises(ConfigError, match="needs init_lora_weights 'eva'"):
        eva.initialize_lora_eva_weights(plain, loader())


def test_saved_starts_stand_beside_the_factors(tmp_path) -> None:
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA, init_lora_weights="pissa"))
    ours.save_pretrained(tmp_path)
    keys = {key.rpartition("proj.")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert keys == {"lora_A.weight", "lora_B.weight", "lora_start_A", "lora_start_B"}


def four_bit(folder):
    """A llama on disk, and loaded from there in 4 bits."""
    transformers = pytest.importorskip("transformers")
    sizes = {**bases.LLAMA, "hidden_size": 64, "intermediate_size": 128}
    torch.manual_seed(0)
    whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    whole.save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return whole, transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_loftq_on_a_quantised_base(tmp_path) -> None:
    whole, base = four_bit(tmp_path)
    config = peft_dist.LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ours = peft_dist.get_peft_model(base, config)
    peft_dist.replace_lora_weights_loftq(ours, str(tmp_path))
    for i in (0, 1):
        W = whole.model.layers[i].self_attn.q_proj.weight
        module = ours.get_base_model().model.layers[i].self_attn.q_proj
        Q, (dW, _) = module.base.weight().float(), module.change(["default"])
        U, S, Vh = torch.linalg.svd(W - Q)
        close(dW, U[:, :16] * S[:16] @ Vh[:16], 1e-4)
    before = {key: t.clone() for key, t in ours.adapter_tensors().items()}
    with torch.no_grad():
        for t in ours.adapter_tensors().values():
            t.add_(1.0)
    asked = []
    peft_dist.replace_lora_weights_loftq(
        ours,
        str(tmp_path / "model.safetensors"),
        callback=lambda model, name: asked.append(name) or len(asked) > 1,
    )
    assert asked == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    for key, t in ours.adapter_tensors().items():
        close(t, before[key] + (1.0 if "layers.0" in key else 0.0), 1e-4)


def test_loftq_says_what_it_lacks(tmp_path) -> None:
    plain = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA))
    with pytest.raises(ConfigError, match="has LoRA on no 4-bit layer of this base"):
        peft_dist.replace_lora_weights_loftq(plain, str(tmp_path))
    _, base = four_bit(tmp_path)
    ours = peft_dist.get_peft_model(base, peft_dist.LoraConfig(**LORA))
    with pytest.raises(PeftDistError, match=r"has no model.safetensors"):
        peft_dist.replace_lora_weights_loftq(ours, str(tmp_path / "nowhere"))


def test_two_dora_adapters_sum_what_each_changes() -> None:
    """HF PEFT's second adapter stretches what the first one made of the layer."""
    models = []
    for library in (peft_dist, peft):
        config = {**LORA, "use_dora": True, "init_lora_weights": False}
        model = library.get_peft_model(bases.llama(), library.LoraConfig(**config), adapter_name="a")
        model.add_adapter("b", library.LoraConfig(**config))
        (model if library is peft_dist else model.base_model).set_adapter(["a", "b"])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if "lora_A" in name or "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        models.append(model.eval())
    ours, theirs = (model.get_base_model().model.layers[0].self_attn.q_proj for model in models)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    W, b = ours.base.weight(), ours.base.bias()
    deltas = [ours.change([name])[0] for name in "ab"]
    close(ours(x), x @ (W + deltas[0] + deltas[1]).T + b)
    factor = theirs.lora_magnitude_vector["b"].weight / (W + low_rank(theirs, "b")).norm(dim=1)
    chained = factor[:, None] * (W + deltas[0] + low_rank(theirs, "b"))
    close(theirs(x), x @ chained.T + b, 1e-4)
    assert (theirs(x) - ours(x)).abs().max() > 0.1


def low_rank(module, name: str) -> torch.Tensor:
    return module.scaling[name] * module.lora_B[name].weight @ module.lora_A[name].weight


def test_a_bias_on_a_layer_without_one_is_said() -> None:
    config = peft_dist.LoraConfig(**{**LORA, "target_modules": ["down_proj"]}, lora_bias=True)
    with pytest.warns(
        UserWarning, match=r"'model.layers.0.mlp.down_proj' has no bias, so that it cannot be merged"
    ):
        ours = peft_dist.get_peft_model(bases.llama(), config)
    with pytest.raises(PeftDistError, match="has no bias to add to"):
        ours.merge_adapter()


@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_files_that_are_half_or_hold_more_are_refused(more, tmp_path) -> None:
    config = peft_dist.LoraConfig(**LORA, init_lora_weights="pissa", **more)
    peft_dist.get_peft_model(bases.llama(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    start = next(key for key in tensors if key.endswith("lora_start_A"))
    for changed, message in (
        ({key: t for key, t in tensors.items() if key != start}, "has lora_start_B without its counterpart"),
        (
            {**tensors, start.replace("start_A", "other"): torch.zeros(2)},
            r"unknown here, 1 tensors, .*lora_other",
        ),
    ):
        save_file(changed, file)
        with pytest.raises(PeftDistError, match=message):
            peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path)
