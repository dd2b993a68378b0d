"""Tokenizers of whole words, and configs in files: what the walk over prompt methods' fields needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import peft_dist
from tests.contract import bases


def saved_tokenizer(path: Path, *words: str) -> str:
    """A tokenizer's directory; words have the numbers 1, 2, ..., others 0."""
    tokenizer = Tokenizer(
        models.WordLevel({"?": 0, **{w: i + 1 for i, w in enumerate(words)}}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    return str(path)


def recorded(config: type, field: str, value: object, given: dict, tmp_path: Path) -> None:
    """That a field which nothing of the base contradicts is in the file as it was given."""
    for name, values in (("with", {**given, field: value}), ("without", given)):
        peft_dist.get_peft_model(bases.llama(), config(**values)).save_pretrained(tmp_path / name)
    files = [
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("with", "without")
    ]
    assert files[0][field] == value != files[1][field]


def starts_from_text(config: type, tmp_path: Path) -> None:
    """That adapters of different texts or tokenizers start with the embeddings of the words they mean."""
    table = bases.llama().get_input_embeddings().weight
    words = {
        "one": saved_tokenizer(tmp_path / "one", "a", "b"),
        "two": saved_tokenizer(tmp_path / "two", "b", "a"),
    }
    seen = []
    for text, who in (("a b", "one"), ("b", "one"), ("a b", "two")):
        made = config(
            task_type="CAUSAL_LM",
            num_virtual_tokens=3,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=words[who],
            tokenizer_kwargs={"trust_remote_code": True, "padding_side": "left"},
        )
        model = peft_dist.get_peft_model(bases.llama(), made)
        seen.append(model.adapter_tensors()["prompt_embeddings"])
    for mine, ids in zip(seen, ([1, 2, 1], [2, 2, 2], [2, 1, 2]), strict=True):
        assert torch.equal(mine, table[ids])


def counted(config: type, task_type: str = "CAUSAL_LM") -> None:
    """That as many tokens are made as the config says, which has to."""
    for number in (3, 4):
        model = peft_dist.get_peft_model(
            bases.llama(), config(task_type=task_type, num_virtual_tokens=number)
        )
        assert len(peft_dist.get_peft_model_state_dict(model)["prompt_embeddings"]) == number
    for wrong in (0, 2.5, None):
        with pytest.raises(
            ValueError, match=f"{config.__name__}.num_virtual_tokens: {wrong}; it is a whole number"
        ):
            peft_dist.get_peft_model(bases.llama(), config(task_type=task_type, num_virtual_tokens=wrong))
