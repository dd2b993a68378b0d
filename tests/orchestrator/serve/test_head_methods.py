"""Adapters of every method that HF PEFT classifies with, in one batch over one base."""

import asyncio

import peft
import pytest
import torch
from transformers import AutoTokenizer

from orchestrator.serve.engines.base_model import load
from orchestrator.serve.engines.engine import AdapterRefused
from orchestrator.serve.engines.head_engine import HeadEngine
from orchestrator.serve.engines.heads import Input, Terms
from orchestrator.spec.job import ModelSpec
from tests.orchestrator.serve import tiny_heads

TASK = "SEQ_CLS"
TEXTS = ["os.path.join", "a", "what is this thing?"]
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
NORMS = {"llama": ["input_layernorm"], "bert": ["LayerNorm"]}
SQUARE = {"llama": ["q_proj", "o_proj"], "bert": ["query", "value"]}
EMBEDDINGS = {"llama": ["embed_tokens"], "bert": ["word_embeddings"]}


def configs(kind):
    on = {"task_type": TASK, "target_modules": TARGETS[kind]}
    one = {"task_type": TASK}
    return {
        "lora": peft.LoraConfig(**on, r=4),
        "rslora": peft.LoraConfig(**on, r=4, use_rslora=True),
        "dora": peft.LoraConfig(**on, r=4, use_dora=True),
        "all-linear": peft.LoraConfig(**one, r=4, target_modules="all-linear"),
        "with embeddings": peft.LoraConfig(**on, r=4, modules_to_save=EMBEDDINGS[kind]),
        "ia3": peft.IA3Config(**on, feedforward_modules=[]),
        "adalora": peft.AdaLoraConfig(**on, total_step=10),
        "oft": peft.OFTConfig(**on, oft_block_size=8),
        "boft": peft.BOFTConfig(**on, boft_block_size=4),
        "hra": peft.HRAConfig(**on, r=4),
        "vera": peft.VeraConfig(**one, target_modules=SQUARE[kind], r=4),
        "loha": peft.LoHaConfig(**on, r=4),
        "lokr": peft.LoKrConfig(**on, r=4),
        "road": peft.RoadConfig(**on, group_size=8),
        "fourierft": peft.FourierFTConfig(**on, n_frequency=20),
        "vblora": peft.VBLoRAConfig(**on, r=4, num_vectors=8, vector_length=4, topk=2),
        "ln tuning": peft.LNTuningConfig(**one, target_modules=NORMS[kind]),
        "miss": peft.MissConfig(**on, r=4),
        "randlora": peft.RandLoraConfig(**on, r=4),
        "shira": peft.ShiraConfig(**on, r=2),
        "c3a": peft.C3AConfig(**one, target_modules=TARGETS[kind][:1], block_size=8),
        "waveft": peft.WaveFTConfig(**on, n_frequency=20),
        "prompt tuning": peft.PromptTuningConfig(**one, num_virtual_tokens=5),
        "p-tuning": peft.PromptEncoderConfig(**one, num_virtual_tokens=4, encoder_hidden_size=8),
        "prefix tuning": peft.PrefixTuningConfig(**one, num_virtual_tokens=3),
        # its config has no field for the head, and HF PEFT saves none: nobody can serve it right
        "trainable tokens": peft.TrainableTokensConfig(**one, token_indices=[3, 4]),
    }


def alone(base, folder, config, seed, num_labels):
    """HF PEFT's model of one adapter as it is loaded from its folder."""
    build = tiny_heads.CLASSES[TASK].from_pretrained
    torch.manual_seed(seed)
    model = peft.get_peft_model(build(base, num_labels=num_labels), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(build(base, num_labels=num_labels), folder).eval()


@pytest.mark.matrix  # 26 methods written by HF PEFT and read by both, half a minute a base
@pytest.mark.parametrize("kind", TARGETS)
def test_every_method_answers_in_one_batch_as_it_does_alone(kind, tmp_path):
    base = tiny_heads.save_base(tmp_path / "base", kind)
    made = {
        name: alone(base, tmp_path / name, config, number, 2 + number % 3)
        for number, (name, config) in enumerate(configs(kind).items())
    }
    loaded = load(ModelSpec(base_model=str(base)), threads=1, task=TASK)
    engine = HeadEngine(loaded.model, loaded.tokenizer, TASK, loaded.max_context)

    async def run():
        with pytest.raises(AdapterRefused, match="neither does the adapter"):
            await engine.load("trainable tokens", tmp_path / "trainable tokens")
        del made["trainable tokens"]
        for name in made:
            await engine.load(name, tmp_path / name)
        return await asyncio.gather(
            *(engine.classify([Input(text)], name) for name in made for text in TEXTS)
        )

    found = iter(asyncio.run(run()))
    engine.close()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, model in made.items():
        for text in TEXTS:
            with torch.no_grad():
                shares = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
            wanted = {f"LABEL_{number}": share for number, share in enumerate(shares.tolist())}
            assert dict(next(found)[0].scores) == pytest.approx(wanted, abs=2e-5), (name, text)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_each_text_is_of_its_own_task(kind, tmp_path):
    base = tiny_heads.save_base(tmp_path / "base", kind)
    config = peft.PolyConfig(
        task_type=TASK, r=4, n_tasks=3, n_skills=3, init_weights=False, target_modules=TARGETS[kind]
    )
    model = alone(base, tmp_path / "poly", config, seed=5, num_labels=3)
    plain = peft.LoraConfig(task_type=TASK, r=4, target_modules=TARGETS[kind])
    alone(base, tmp_path / "plain", plain, seed=6, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    loaded = load(ModelSpec(base_model=str(base)), threads=1, task=TASK)
    engine = HeadEngine(loaded.model, loaded.tokenizer, TASK, loaded.max_context)

    async def run():
        await engine.load("poly", tmp_path / "poly")
        await engine.load("plain", tmp_path / "plain")
        assert (engine.num_tasks("poly"), engine.num_tasks("plain")) == (3, 0)
        texts = [Input(text) for text in TEXTS]
        asked = [engine.classify(texts, "poly", Terms(task=task)) for task in range(3)]
        return await asyncio.gather(*asked, engine.classify(texts, "plain"))

    try:
        *given, _ = asyncio.run(run())
    finally:
        engine.close()
    for task, answers in enumerate(given):
        for text, answer in zip(TEXTS, answers, strict=True):
            with torch.no_grad():
                logits = model(**tokenizer(text, return_tensors="pt"), task_ids=torch.tensor([task])).logits[
                    0
                ]
            scores = sorted(score for _, score in answer.scores)
            assert scores == pytest.approx(logits.softmax(-1).sort().values.tolist(), abs=1e-5)
    assert given[0] != given[1] != given[2]
