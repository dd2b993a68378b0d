"""The embedded encoder-decoder: a small T5 trained from scratch to restore text, over tiny-llama's tokenizer.

A piece of the corpus of `documents.py` loses spans of its tokens, each replaced by one `<|system|>`; the decoder
writes the piece whole. No row is ever seen. Weights are stored in bfloat16, and loaded in float32.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
import training
from base import END, ROLES, save
from tokenizers import processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

SEED = 11
LENGTH, BATCH = 48, 32
STEPS = int(os.environ.get("STEPS", "3000"))
LEARNING_RATE, WARMUP = 4e-3, 100
SHARE_HIDDEN, SPAN = 0.15, 3
HELD_OUT_EVERY = 50
WORST_LOSS = 3.0
"""A rebuilt base must do at least this well on the held-out pieces (a uniform guess is at 8.3)."""


def new_model(tokenizer) -> T5ForConditionalGeneration:
    """1.3 million parameters: two layers of 128 on either side, four heads, tied embeddings."""
    torch.manual_seed(SEED)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=384,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        n_positions=512,
        dtype="float32",
    )
    return T5ForConditionalGeneration(config)


def text_tokenizer(folder: Path):
    """tiny-llama's tokenizer without chats; it ends every text and begins none, as T5's do."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B:1 {END}:1", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    return tokenizer


def pieces(texts: list[str], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held-out) int64 pieces of LENGTH tokens, documents one after another."""
    ids = [
        token for document in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in document
    ]
    return training.pieces(ids, LENGTH, HELD_OUT_EVERY)


def spoilt(data: torch.Tensor, tokenizer, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch: pieces (B, LENGTH) with spans hidden as input, the pieces with their end as labels."""
    mask, end, pad = (
        tokenizer.convert_tokens_to_ids(ROLES[0]),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    starts = torch.rand(data.shape, generator=generator) < SHARE_HIDDEN / SPAN
    hidden = starts.clone()
    for shift in range(1, SPAN):
        hidden[:, shift:] |= starts[:, :-shift]
    rows = []
    for piece, gone in zip(data.tolist(), hidden.tolist(), strict=True):
        row: list[int] = []
        for place, (token, is_gone) in enumerate(zip(piece, gone, strict=True)):
            if not is_gone:
                row.append(token)
            elif not (place and gone[place - 1]):
                row.append(mask)
        rows.append([*row, end])
    longest = max(map(len, rows))
    labels = torch.cat([data, torch.full((len(data), 1), end)], dim=1)
    return {
        "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": labels,
    }


def train(model: T5ForConditionalGeneration, data: torch.Tensor, tokenizer) -> None:
    """STEPS steps of AdamW with a cosine rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        falling = 0.02 + 0.98 * (1 + math.cos(math.pi * step / STEPS)) / 2
        return LEARNING_RATE * (min(1.0, (step + 1) / WARMUP) * falling)

    training.train(
        model,
        data,
        optimizer,
        name="encoder-decoder",
        steps=STEPS,
        batch_size=BATCH,
        seed=SEED,
        rate=rate,
        loss_of=lambda batch, generator: model(**spoilt(batch, tokenizer, generator)).loss,
        say_every=100,
    )


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, data: torch.Tensor, tokenizer) -> float:
    """The mean loss of a token of `data`, spoilt in one fixed way."""
    generator = torch.Generator().manual_seed(0)
    model.eval()
    batches = data.split(BATCH)
    losses = [model(**spoilt(batch, tokenizer, generator)).loss.item() * len(batch) for batch in batches]
    return sum(losses) / len(data)


def build(texts: list[str], folder: Path, tokenizer_folder: Path) -> float:
    """Trains, checks and writes the base; returns its held-out loss, and raises SystemExit where that is worse
    than WORST_LOSS."""
    with training.built(folder) as aside:
        tokenizer = text_tokenizer(tokenizer_folder)
        data, held_out = pieces(texts, tokenizer)
        model = new_model(tokenizer)
        print(f"encoder-decoder: {model.num_parameters():,} parameters, {data.numel():,} tokens to train on")
        train(model, data, tokenizer)
        save(model, tokenizer, aside)
        reached = held_out_loss(AutoModelForSeq2SeqLM.from_pretrained(aside), held_out, tokenizer)
        print(f"encoder-decoder: held-out loss {reached:.3f} (at most {WORST_LOSS})")
        training.check(reached, WORST_LOSS, aside)
    return reached
