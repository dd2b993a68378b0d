"""A tiny job of each task: rows of a few words, a base that trains in a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from orchestrator.spec.job import JobSpec

from .tiny import _tokenizer, job

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
KINDS = ("classification", "token-classification", "qa", "seq2seq", "embedding")


def save_encoder_decoder(folder: Path) -> Path:
    """A random T5 of 1 + 1 layers x 32 with a byte tokenizer."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4,
        dropout_rate=0.1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def row(kind: str, n: int) -> dict:
    """The n-th row of a dataset type."""
    first, second = WORDS[n % 11], WORDS[(3 * n + 1) % 11]
    text = f"{first} {second} and {n}"
    if kind == "classification":
        return {"text": text, "label": "odd" if n % 2 else "even"}
    if kind == "token-classification":
        return {"tokens": text.split(), "tags": ["B-N", "I-N" if n % 3 else "O", "O", "B-N"]}
    if kind == "qa":
        return {
            "question": "Which?",
            "context": text,
            "answers": {"text": [second], "answer_start": [len(first) + 1]},
        }
    if kind == "seq2seq":
        return {"source": text, "target": second[: 2 + n % 4]}
    more = {"negative": f"not {first}"} if n % 2 else {}
    return {"anchor": f"{first} {n}", "positive": text, **more}


def task_job(folder: Path, kind: str, *, rows: int = 17, adapter: dict | None = None, **sections) -> JobSpec:
    """A spec of one task over a base and data in `folder`, made where they are missing."""
    data = folder / f"{kind}.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row(kind, n)) + "\n" for n in range(rows)))
    if kind == "seq2seq" and not (folder / "pair").exists():
        save_encoder_decoder(folder / "pair")
    base = {"model": {"base_model": str(folder / "pair")}} if kind == "seq2seq" else {}
    parts = {
        **base,
        "data": {"datasets": [{"path": str(data), "type": kind}], "val_set_size": 5},
        "eval": {"max_new_tokens": 8},
        **sections,
    }
    return job(folder, adapter=adapter, **parts)
