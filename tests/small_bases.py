"""Small bases of random weights in folders, for what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Sizes:
    """Of the models: `of_all` as their configs call them; the width of an MLP and of an expert; GPT-2's, T5's own."""

    of_all: Mapping[str, int]
    middle: int
    expert: int
    gpt2: Mapping[str, int]
    t5: Mapping[str, int] = field(default_factory=dict)


def saved(sizes: Sizes, kind: str, folder: Path, **more: Any) -> str:
    """Saves "llama", "tied" (its head and embeddings are one), "mixture", "gpt2" or "t5"; `more` goes to
    `save_pretrained`. The weights are those of one seed."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, **sizes.gpt2))
    elif kind == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=1, **sizes.t5))
    elif kind == "mixture":
        config: Any = transformers.MixtralConfig(
            intermediate_size=sizes.expert, num_local_experts=4, **sizes.of_all
        )
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.LlamaConfig(
            intermediate_size=sizes.middle, tie_word_embeddings=kind == "tied", **sizes.of_all
        )
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, **more)
    return str(folder)
