"""Small bases, equal at every call: what two libraries are compared on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.utils import ModelOutput

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    quiet = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**sizes, **quiet))


class Convs(nn.Module):
    """Convolutions in a row, of one and two dimensions, with groups, strides and kernels of one; ids in, logits
    out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 48)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 12, (3, 2), stride=2, groups=2)
        self.point = nn.Conv2d(12, 8, 1)
        self.wave = nn.Conv1d(8, 12, 3, padding=1)
        self.narrow = nn.Conv1d(12, 6, 1, groups=3)
        self.head = nn.Linear(6, 5)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: object
    ) -> ModelOutput:
        x = self.embed(input_ids).unflatten(-1, (3, 16)).transpose(1, 2)
        x = self.point(torch.tanh(self.depth(torch.tanh(self.stem(x)))))
        x = self.narrow(torch.tanh(self.wave(torch.tanh(x).flatten(2))))
        logits = self.head(torch.tanh(x).mean(-1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels[:, 0] % 5)
        return ModelOutput(loss=loss, logits=logits)


def convs() -> Convs:
    torch.manual_seed(0)
    return Convs()
