"""The examples in the documentation of the prompt methods, on tiny models made from configs: as printed but for
names of models on a hub, and their sizes.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

import peft_dist as peft
from peft_dist import (
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PeftModel,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_config,
    get_peft_model,
)
from tests.contract import bases
from tests.contract.vocabularies import saved_tokenizer

IDS = torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(2))
ANSWERS = torch.randint(3, 64, (4, 4), generator=torch.Generator().manual_seed(3))
PAIRS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": ANSWERS}


def t5(path):
    """`AutoModelForSeq2SeqLM.from_pretrained("t5-base")`."""
    bases.t5().save_pretrained(path / "t5-base")
    return AutoModelForSeq2SeqLM.from_pretrained(path / "t5-base")


def train(model, batch: dict, rate: float = 0.1) -> None:
    """The loop of the guides; the loss falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    model.train()
    for _ in range(8):
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0]
    model.eval()


def saved_and_loaded(model, base, path, **more) -> None:
    """`save_pretrained`, `PeftModel.from_pretrained`, `generate`: what is loaded says the same."""
    model.save_pretrained(path / "adapter")
    loaded = PeftModel.from_pretrained(base, path / "adapter").eval()
    how = {"input_ids": IDS, "attention_mask": PAIRS["attention_mask"], "max_new_tokens": 5, **more}
    assert torch.equal(loaded.generate(**how), model.generate(**how))


def test_prefix_tuning_for_conditional_generation(tmp_path, capsys) -> None:
    peft_config = PrefixTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, num_virtual_tokens=5
    )
    model = get_peft_model(t5(tmp_path), peft_config)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 320 || all params: ")
    train(model, PAIRS)
    saved_and_loaded(model, t5(tmp_path), tmp_path)
    assert (peft_config.num_layers, peft_config.token_dim, peft_config.num_attention_heads) == (2, 16, 2)


def test_prompt_tuning_of_t5_from_a_text(tmp_path) -> None:
    words = saved_tokenizer(tmp_path / "words", "Classify", "if", "the", "tweet", "is", "a", "complaint")
    peft_config = PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        prompt_tuning_init=PromptTuningInit.TEXT,
        num_virtual_tokens=8,
        prompt_tuning_init_text="Classify if the tweet is a complaint",
        tokenizer_name_or_path=words,
    )
    model = get_peft_model(t5(tmp_path), peft_config)
    table = model.get_input_embeddings().weight
    started = peft.get_peft_model_state_dict(model)["prompt_embeddings"]
    # Two submodules: the text again and again for both.
    assert torch.equal(started, table[torch.tensor([1, 2, 3, 4, 5, 6, 7] * 3)[:16]])
    train(model, PAIRS)
    saved_and_loaded(model, t5(tmp_path), tmp_path)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_of_t5(tmp_path, kind) -> None:
    peft_config = PromptEncoderConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=5,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=8,
    )
    model = get_peft_model(t5(tmp_path), peft_config)
    train(model, PAIRS, 0.003)
    saved_and_loaded(model, t5(tmp_path), tmp_path)


def test_p_tuning_for_sequence_classification() -> None:
    peft_config = PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=8)
    model = get_peft_model(bases.roberta(), peft_config)
    train(model, {"input_ids": IDS, "labels": torch.tensor([0, 1, 2, 0])}, 0.02)
    assert type(model) is peft.PeftModelForSequenceClassification


def test_multitask_prompt_tuning_of_t5_and_on_to_a_task(tmp_path) -> None:
    words = saved_tokenizer(tmp_path / "words", "classify", "the", "following", "into")
    peft_config = MultitaskPromptTuningConfig(
        tokenizer_name_or_path=words,
        num_tasks=2,
        task_type=TaskType.SEQ_2_SEQ_LM,
        prompt_tuning_init=MultitaskPromptTuningInit.TEXT,
        num_virtual_tokens=6,
        num_transformer_submodules=1,
        prompt_tuning_init_text="classify the following into",
    )
    model = get_peft_model(t5(tmp_path), peft_config)
    tasks = torch.tensor([0, 1, 1, 0])
    train(model, {**PAIRS, "task_ids": tasks}, 1e-5)
    saved_and_loaded(model, t5(tmp_path), tmp_path, task_ids=tasks)
    for start in ("EXACT_SOURCE_TASK", "AVERAGE_SOURCE_TASKS"):
        target = get_peft_model(
            t5(tmp_path),
            MultitaskPromptTuningConfig(
                num_tasks=1,
                task_type=TaskType.SEQ_2_SEQ_LM,
                prompt_tuning_init=MultitaskPromptTuningInit[start],
                prompt_tuning_init_state_dict_path=str(tmp_path / "adapter" / "adapter_model.safetensors"),
                num_virtual_tokens=6,
                num_transformer_submodules=1,
            ),
        )
        train(target, {**PAIRS, "task_ids": torch.zeros(4, dtype=torch.long)}, 1e-5)


def test_the_modules_docstrings() -> None:
    """Of `PromptEmbedding`, `PromptEncoder` and `PrefixEncoder`: peft_type among the arguments, as printed."""
    sizes = {
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": 20,
        "token_dim": 16,
        "num_transformer_submodules": 1,
        "num_attention_heads": 2,
        "num_layers": 2,
    }
    t5_model = bases.t5()
    prompt = PromptEmbedding(
        PromptTuningConfig(peft_type="PROMPT_TUNING", **sizes, prompt_tuning_init="SAMPLE_VOCAB"),
        t5_model.shared,
    )
    encoder = PromptEncoder(
        PromptEncoderConfig(
            peft_type="P_TUNING", **sizes, encoder_reparameterization_type="MLP", encoder_hidden_size=16
        )
    )
    prefix = PrefixEncoder(PrefixTuningConfig(peft_type="PREFIX_TUNING", **sizes, encoder_hidden_size=16))
    asked = torch.arange(20).expand(3, -1)
    assert prompt(asked).shape == encoder(asked).shape == (3, 20, 16)
    assert prefix(asked).shape == (3, 20, 2 * 2 * 16)


@pytest.mark.parametrize(
    ("base", "task", "batch"),
    [
        ("gpt2", "CAUSAL_LM", {"labels": IDS}),
        ("bert", "SEQ_CLS", {"labels": torch.tensor([0, 1, 2, 0])}),
        ("tagger", "TOKEN_CLS", {"labels": IDS % 3}),
    ],
)
def test_a_prefix_from_a_dictionary(base, task, batch) -> None:
    """Of `PeftModelForCausalLM`, `...ForSequenceClassification` and `...ForTokenClassification`: their last key, which
    older printings have, is no field of the config: it is said and has no effect."""
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": task,
        "inference_mode": False,
        "num_virtual_tokens": 20,
        "token_dim": 16,
        "num_transformer_submodules": 1,
        "num_attention_heads": 2,
        "num_layers": 2,
        "encoder_hidden_size": 16,
        "prefix_projection": False,
        "postprocess_past_key_value_function": None,
    }
    with pytest.warns(UserWarning, match="postprocess_past_key_value_function"):
        peft_config = get_peft_config(config)
    classes = {
        "CAUSAL_LM": peft.PeftModelForCausalLM,
        "SEQ_CLS": peft.PeftModelForSequenceClassification,
        "TOKEN_CLS": peft.PeftModelForTokenClassification,
    }
    model = classes[task](getattr(bases, base)(), peft_config)
    train(model, {"input_ids": IDS, **batch})


def test_prompt_tuning_of_a_causal_model(tmp_path) -> None:
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="RANDOM")
    model = get_peft_model(bases.llama(), peft_config)
    train(model, {"input_ids": IDS, "labels": IDS})
    saved_and_loaded(model, bases.llama(), tmp_path)


def test_cpt_with_a_context(tmp_path) -> None:
    context = [5, 6, 7, 8, 9, 10, 11, 12]
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=context,
        cpt_mask=[1] * 8,
        cpt_tokens_type_mask=[1, 2, 2, 3, 4, 5, 6, 8],
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.95,
        opt_projection_epsilon=0.2,
        opt_projection_format_epsilon=0.1,
        tokenizer_name_or_path="words",
    )
    model = get_peft_model(bases.llama(), config)
    kinds = torch.tensor([[1, 2, 3, 4, 4, 4]] * 4)
    train(model, {"input_ids": IDS, "labels": IDS, "input_type_mask": kinds})
    saved_and_loaded(model, bases.llama(), tmp_path)
    radius = 0.2 * (16 / 2048) ** 0.5
    moved = (
        peft.get_peft_model_state_dict(model)["prompt_embeddings"]
        - model.get_input_embeddings().weight[context]
    )
    assert (moved.norm(dim=1) <= radius * (1 + 1e-5)).all()
    assert (moved[[4, 7]] == 0).all() and (moved.norm(dim=1)[:4] > 0).all()


def test_llama_adapter() -> None:
    model = get_peft_model(
        bases.llama(), peft.AdaptionPromptConfig(adapter_layers=2, adapter_len=4, task_type="CAUSAL_LM")
    )
    train(model, {"input_ids": IDS, "labels": IDS}, 0.1)
    assert isinstance(model.base_model, nn.Module)
