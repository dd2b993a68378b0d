"""Small bases, equal at every call: what two libraries are compared on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
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


def grouped() -> LlamaForCausalLM:
    """Keys and values of fewer heads than queries."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**{**LLAMA, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 6})
    )


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**{**LLAMA, "num_attention_heads": 4, "head_dim": 4}))


EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**LLAMA, **EXPERTS, num_local_experts=4))


def qwen2_moe() -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**LLAMA, **EXPERTS, **sizes))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    more = {"decoder_start_token_id": 0, "dropout_rate": 0, "initializer_factor": 3.0}
    return T5ForConditionalGeneration(T5Config(**sizes, **more))


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    both = {"layers": 2, "ffn_dim": 24, "attention_heads": 2}
    sizes = {f"{stack}_{name}": size for name, size in both.items() for stack in ("encoder", "decoder")}
    quiet = {"dropout": 0.0, "init_std": 0.3, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    more = {"vocab_size": 64, "d_model": 16, "max_position_embeddings": 40, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**sizes, **more, **quiet, forced_eos_token_id=None))


BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=3))


def roberta() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**BERT, num_labels=3))


def tagger() -> BertForTokenClassification:
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**BERT, num_labels=3))


def answerer() -> BertForQuestionAnswering:
    torch.manual_seed(0)
    return BertForQuestionAnswering(BertConfig(**BERT))


def features() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**BERT))


def tied_llama() -> LlamaForCausalLM:
    """Its head shares the embedding's weight."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))


def eight_bit() -> BitsAndBytesConfig:
    """How a base is loaded in 8-bit."""
    return BitsAndBytesConfig(load_in_8bit=True)


def four_bit(computes_in: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    """How a base is loaded in 4-bit, its statistics quantised once more."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computes_in,
    )
