"""Tiny bases of each kind, and adapters of several methods for each task, written by HF PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CLASSES = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def save_base(folder: Path, kind: str, *, context: int = 64) -> Path:
    """A random base of `kind` (llama, bert, roberta, distilbert, t5) without any head, with a tokenizer of bytes."""
    tokenizer = _tokenizer("[CLS]" if kind in ("bert", "roberta", "distilbert") else None)
    tokenizer.model_max_length = context
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model: Any
    match kind:
        case "llama":
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    **SHAPE,
                    **ids,
                    num_key_value_heads=2,
                    max_position_embeddings=context,
                    initializer_range=0.3,
                )
            )
        case "bert":
            model = transformers.BertModel(
                transformers.BertConfig(
                    **SHAPE, **ids, max_position_embeddings=context, initializer_range=0.3
                )
            )
        case "roberta":
            model = transformers.RobertaModel(
                transformers.RobertaConfig(
                    **SHAPE,
                    **ids,
                    max_position_embeddings=context + ids["pad_token_id"] + 1,
                    initializer_range=0.3,
                )
            )
        case "distilbert":
            model = transformers.DistilBertModel(
                transformers.DistilBertConfig(
                    **ids, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=context
                )
            )
        case "t5":
            model = transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, **ids,
                    decoder_start_token_id=ids["pad_token_id"], eos_token_id=tokenizer.eos_token_id,
                    initializer_factor=3.0,
                )
            )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(cls: str | None) -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "</s>", *([cls] if cls else [])]
    letters = {symbol: number for number, symbol in enumerate([*specials, *symbols])}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = {"pad_token": "<pad>", "eos_token": "</s>"}
    if cls:
        pieces |= {"cls_token": cls, "sep_token": "</s>"}
        core.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A </s>",
            pair=f"{cls} $A </s> $B:1 </s>:1",
            special_tokens=[(cls, letters[cls]), ("</s>", letters["</s>"])],
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **pieces)


TARGETS = {
    "llama": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "bert": (["query", "value", "output.dense"], ["output.dense"]),
    "roberta": (["query", "value", "output.dense"], ["output.dense"]),
    "t5": (["q", "v", "wo"], ["wo"]),
}


def config(method: str, kind: str, task: str) -> Any:
    """The config of a method on a base."""
    targets, feedforward = TARGETS[kind]
    said = {"task_type": task}
    match method:
        case "lora":
            return peft.LoraConfig(**said, r=4, target_modules=targets)
        case "dora":
            return peft.LoraConfig(**said, r=2, target_modules=targets[:2], use_dora=True)
        case "ia3":
            return peft.IA3Config(**said, target_modules=targets, feedforward_modules=feedforward)
        case "prompt":
            return peft.PromptTuningConfig(**said, num_virtual_tokens=5)
        case "prefix":
            return peft.PrefixTuningConfig(**said, num_virtual_tokens=3)
    raise ValueError(method)


def alone(base: Path, task: str, method: str | None, num_labels: int = 2, *, seed: int = 1) -> Any:
    """HF PEFT's model of one adapter with random weights and a random head; the bare base where `method` is None."""
    torch.manual_seed(seed)
    sized = {"num_labels": num_labels} if task in ("SEQ_CLS", "TOKEN_CLS") else {}
    loaded: Any = CLASSES[task].from_pretrained(base, **sized)
    if task == "QUESTION_ANS" and hasattr(loaded, "transformer"):
        # transformers finds no weights of a decoder under the name that this class gives it
        loaded.transformer.load_state_dict(transformers.AutoModel.from_pretrained(base).state_dict())
    if method is None:
        return loaded.eval()
    kind = loaded.config.model_type
    model = peft.get_peft_model(loaded, config(method, kind, task))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * (0.1 if "magnitude" in name else 0.4)
    return model.eval()


def save(
    model: Any, folder: Path, task: str, labels: tuple[str, ...] = (), *, may_be_empty: bool = False
) -> Path:
    """Writes it as a run of ours does, its labels beside it."""
    model.save_pretrained(folder)
    said = {"format": 1, "task": task, "labels": list(labels), "may_be_empty": may_be_empty}
    (folder / "raypeft_task.json").write_text(json.dumps(said))
    return folder
