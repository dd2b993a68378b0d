"""The examples in the documentation of the classes for layers, on tiny models made from configs: as printed but for
names of models on a hub, and their sizes. Those of the prompt methods are in `test_examples_prompt.py`; the list of
all of them, and of what had to be mended, is in docs/examples.md.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import peft_dist as peft
from peft_dist import (
    AdaLoraConfig,
    AdaLoraModel,
    BOFTConfig,
    BOFTModel,
    FourierFTConfig,
    HRAConfig,
    HRAModel,
    IA3Config,
    IA3Model,
    LNTuningConfig,
    LoHaConfig,
    LoHaModel,
    LoKrConfig,
    LoKrModel,
    LoraConfig,
    LoraModel,
    MissConfig,
    MissModel,
    OFTConfig,
    OFTModel,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PolyConfig,
    PolyModel,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_config,
    get_peft_model,
    prepare_model_for_int8_training,
    prepare_model_for_kbit_training,
)
from tests.contract import bases

IDS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(2))
SEQ2SEQ = {"input_ids": IDS, "labels": IDS[:, :4].contiguous()}


@pytest.fixture
def t5(tmp_path):
    """`AutoModelForSeq2SeqLM.from_pretrained("t5-base")`."""
    bases.t5().save_pretrained(tmp_path / "t5-base")
    return lambda: AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5-base")


def opt():
    """`AutoModelForCausalLM.from_pretrained("facebook/opt-125m")`."""
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0,
        )
    )  # fmt: skip


def learns(model, batch, rate: float = 0.05) -> None:
    """Eight steps; the loss falls and only what the adapter says is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {id(p): p.detach().clone() for p in model.parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[id(p)]) for p in model.parameters() if id(p) in frozen)


CAUSAL = {"input_ids": IDS, "labels": IDS}


def test_lora_of_t5(t5) -> None:
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=32, target_modules=["q", "v"], lora_dropout=0.01
    )
    lora_model = LoraModel(t5(), config, "default")
    assert isinstance(lora_model, peft.BaseTuner)
    learns(lora_model, SEQ2SEQ)


@pytest.mark.parametrize("prepare", [prepare_model_for_kbit_training, prepare_model_for_int8_training])
def test_lora_of_an_8_bit_gpt_j(prepare, tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}
    GPTJForCausalLM(
        GPTJConfig(**sizes, bos_token_id=1, eos_token_id=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ).save_pretrained(tmp_path)
    target_modules = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "wte"]
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=target_modules,
        lora_dropout=0.1,
        bias="none",
        task_type="CAUSAL_LM",
    )
    quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, pad_token_id=0, use_cache=False, quantization_config=quantization_config
    )
    if prepare is prepare_model_for_int8_training:
        with pytest.warns(FutureWarning, match="deprecated"):
            model = prepare(model)
    else:
        model = prepare(model)
    lora_model = get_peft_model(model, config)
    assert isinstance(lora_model.base_model, LoraModel)
    assert type(model.transformer.h[0].attn.q_proj.base_layer).__name__ == "Linear8bitLt"
    assert isinstance(model.transformer.h[0].attn.q_proj, peft.tuners.lora.LoraLayer)
    assert isinstance(model.transformer.wte, peft.tuners.lora.Embedding)
    learns(lora_model, CAUSAL, rate=0.01)


def test_ia3_of_t5_with_its_arguments_in_order(t5) -> None:
    config = IA3Config(
        peft_type="IA3", task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "w0"], feedforward_modules=["w0"]
    )
    with pytest.raises(TypeError, match=r"IA3Model\(model, config, adapter_name\).*swapped"):
        IA3Model(config, t5())
    with pytest.warns(UserWarning, match="'w0' matched no"):
        ia3_model = IA3Model(t5(), config, "default")
    learns(ia3_model, SEQ2SEQ)


def test_adalora_of_t5(t5) -> None:
    config = AdaLoraConfig(
        peft_type="ADALORA", task_type="SEQ_2_SEQ_LM", init_r=12, lora_alpha=32, target_modules=["q", "v"],
        lora_dropout=0.01, total_step=10,
    )  # fmt: skip
    model = AdaLoraModel(t5(), config, "default")
    loss = model(**SEQ2SEQ).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    model.update_and_allocate(0)


def test_poly_of_t5(t5) -> None:
    config = PolyConfig(poly_type="poly", n_tasks=3, n_skills=2, target_modules=["q", "v"], r=4)
    model = PolyModel(t5(), config, "default")
    learns(model, {**SEQ2SEQ, "task_ids": torch.tensor([0, 1, 2])})


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(r=128),
        RandLoraConfig(r=8),
        VBLoRAConfig(task_type="SEQ_CLS", r=4, target_modules=["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
                     num_vectors=60, vector_length=8, save_only_topk_weights=True),
        FourierFTConfig(n_frequency=50),
    ],
    ids=lambda config: config.peft_type,
)  # fmt: skip
def test_the_examples_with_opt(config, capsys) -> None:
    config.task_type = "CAUSAL_LM"
    if config.peft_type == "VERA":
        config.r = 16
    model = get_peft_model(opt(), config)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: ")
    learns(model, CAUSAL)


def test_layer_norms_of_a_llama() -> None:
    model = get_peft_model(bases.llama(), LNTuningConfig(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    learns(model, CAUSAL)


class TextEncoder(nn.Module):
    """The modules that the examples with Stable Diffusion name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("k_proj", "q_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(32, 32))
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        x = x + self.out_proj(torch.tanh(self.q_proj(x) * self.k_proj(x)) + self.v_proj(x))
        return self.fc2(torch.tanh(self.fc1(x)))


class Unet(nn.Module):
    """Likewise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj_in, self.proj_out = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)
        for name in ("to_k", "to_q", "to_v"):
            setattr(self, name, nn.Linear(32, 32))
        self.to_out = nn.ModuleList([nn.Linear(32, 32)])

    def forward(self, x):
        h = self.proj_in(x).flatten(2).mT
        h = self.to_out[0](torch.tanh(self.to_q(h) * self.to_k(h)) + self.to_v(h))
        return self.proj_out(h.mT.unflatten(2, x.shape[2:]))


TEXT = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0"]
LYCORIS = {"r": 8, "alpha": 32, "rank_dropout": 0.0, "module_dropout": 0.0}
BUTTERFLY = {"boft_block_size": 8, "boft_n_butterfly_factor": 1, "boft_dropout": 0.1, "bias": "boft_only"}
DIFFUSION = {
    "LoHa": (LoHaModel, LoHaConfig, LYCORIS, {"use_effective_conv2d": True}),
    "LoKr": (LoKrModel, LoKrConfig, LYCORIS, {"use_effective_conv2d": True}),
    "OFT": (OFTModel, OFTConfig, {"r": 8, "oft_block_size": 0, "module_dropout": 0.0}, {}),
    "BOFT": (BOFTModel, BOFTConfig, BUTTERFLY, {}),
    "HRA": (HRAModel, HRAConfig, {"r": 8, "init_weights": True}, {}),
    "MiSS": (MissModel, MissConfig, {"r": 8, "init_weights": True}, {}),
}


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_examples_with_stable_diffusion(name) -> None:
    """`Model(pipeline.text_encoder, config, "default")`, `Model(pipeline.unet, config, "default")`."""
    kind, config, values, more = DIFFUSION[name]
    unet = [target for target in UNET if name != "MiSS" or not target.startswith("proj")]
    for base, given, x in (
        (TextEncoder(), config(**values, target_modules=TEXT), torch.randn(2, 5, 32)),
        (Unet(), config(**values, **more, target_modules=unet), torch.randn(2, 32, 3, 3)),
    ):
        before = base(x)
        model = kind(base, given, "default").eval()
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
        model.train()(x).square().mean().backward()
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_model_for_each_task() -> None:
    """The examples of `PeftModelFor...`: a config from a dictionary, the class by its name."""
    values = {
        "peft_type": "LORA", "inference_mode": False, "r": 8, "target_modules": ["query", "value"], "lora_alpha": 16,
        "lora_dropout": 0.0, "fan_in_fan_out": False, "bias": "none",
    }  # fmt: skip
    spans = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([1, 2, 3])}
    for task, kind, base, batch in (
        ("SEQ_CLS", PeftModelForSequenceClassification, bases.bert(), {"labels": torch.tensor([0, 1, 0])}),
        ("TOKEN_CLS", PeftModelForTokenClassification, bases.tagger(), {"labels": IDS % 3}),
        ("QUESTION_ANS", PeftModelForQuestionAnswering, bases.answerer(), spans),
    ):
        peft_model = kind(base, get_peft_config({**values, "task_type": task}))
        peft_model.print_trainable_parameters()
        learns(peft_model, {"input_ids": IDS, **batch})
    features = PeftModelForFeatureExtraction(
        bases.features(), get_peft_config({**values, "task_type": "FEATURE_EXTRACTION"})
    )
    assert features(input_ids=IDS).last_hidden_state.shape[:2] == IDS.shape
    causal = get_peft_config(
        {**values, "task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    )
    learns(PeftModelForCausalLM(bases.gpt2(), causal), CAUSAL)
    seq2seq = get_peft_config({**values, "task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]})
    learns(PeftModelForSeq2SeqLM(bases.t5(), seq2seq), SEQ2SEQ)


def test_bert_for_sequences_is_saved_with_its_head(tmp_path) -> None:
    model = get_peft_model(
        bases.bert(), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    )
    learns(model, {"input_ids": IDS, "labels": torch.tensor([0, 1, 0])})
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bases.bert(), tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_a_mixed_model(tmp_path) -> None:
    base = bases.llama()
    peft_config = LoraConfig(r=4, target_modules=["q_proj"])
    peft_model = get_peft_model(base, peft_config, "adapter1", mixed=True)
    assert isinstance(peft_model, PeftMixedModel)
    peft_model.add_adapter("adapter2", LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]))
    peft_model.set_adapter(["adapter1", "adapter2"])
    assert peft_model.active_adapters == ["adapter1", "adapter2"]
    learns(peft_model, CAUSAL)
    peft_model.save_pretrained(tmp_path)
    again = PeftMixedModel.from_pretrained(bases.llama(), tmp_path / "adapter1", "adapter1")
    again.load_adapter(tmp_path / "adapter2", "adapter2")
    again.set_adapter(["adapter1", "adapter2"])
    want = peft_model.eval()(IDS).logits
    torch.testing.assert_close(again.eval()(IDS).logits, want)
    torch.testing.assert_close(again.merge_and_unload()(IDS).logits, want)


def test_the_examples_of_a_models_functions(tmp_path) -> None:
    """`load_adapter`, `set_adapter`, `disable_adapter`, `merge_and_unload`, `add_weighted_adapter`."""
    model = get_peft_model(bases.llama(), LoraConfig(task_type="CAUSAL_LM", r=4))
    learns(model, CAUSAL)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="other")
    model.set_adapter("other")
    want = model.eval()(IDS).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, bases.llama()(IDS).logits)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    assert torch.isfinite(model(IDS).logits).all()
    model.delete_adapter("both")
    model.set_adapter("other")
    torch.testing.assert_close(model(IDS).logits, want)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, want)
