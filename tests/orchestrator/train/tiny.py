"""A base, data and a plan small enough to train in a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.plan import Plan
from orchestrator.runner import TrainRequest
from orchestrator.spec.job import JobSpec


def save_base(folder: Path, *, dropout: float = 0.0, seed: int = 0) -> Path:
    """A random Llama of 2 layers x 32 with a byte tokenizer."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_dropout=dropout,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    return tokenizer


def save_rows(path: Path, count: int = 23) -> Path:
    """Prompts and completions of different lengths."""
    rows = [
        {"prompt": f"{n} + {n + 1} = ", "completion": str(2 * n + 1) + "!" * (n % 5)} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(folder: Path, *, rows: int = 23, adapter: dict | None = None, **sections: dict) -> JobSpec:
    """A spec over a base and data in `folder`, made where they are missing."""
    base, data = folder / "base", folder / "rows.jsonl"
    if not base.exists():
        save_base(base)
    if not data.exists():
        save_rows(data, rows)
    training = {"micro_batch_size": 2, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    return JobSpec.model_validate({
        "name": "tiny",
        "model": {"base_model": str(base)},
        "data": {"datasets": [{"path": str(data), "type": "prompt_completion"}], "val_set_size": 5},
        "adapter": adapter if "type" in (adapter or {}) else {"type": "lora", "r": 4, **(adapter or {})},
        **sections,
        "training": {**training, **sections.get("training", {})},
    })  # fmt: skip


def plan(*, workers: int = 1, stage: int = 2, micro: int = 2, accumulation: int = 1, **changes) -> Plan:
    """A plan for CPU workers."""
    facts = {
        "num_workers": workers,
        "bundle": {"CPU": 1.0},
        "placement": "PACK",
        "labels": {},
        "zero_stage": stage,
        "deepspeed": {
            "train_micro_batch_size_per_gpu": micro,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "global_batch_size": workers * micro * accumulation,
        "memory": None,
        "fits": None,
    }
    return Plan(**{**facts, **changes})


def request(
    folder: Path, spec: JobSpec, made_plan: Plan | None = None, run: str = "run", **fields
) -> TrainRequest:
    """A request whose run lives in `folder/run`."""
    return TrainRequest(spec, made_plan or plan(), str(folder / run), run_id=run, data_hash="0" * 8, **fields)
