"""The embedded base: a byte-level BPE tokenizer with a chat template, and a small Llama trained from scratch.

Plain next-token loss on the corpus of `documents.py`; no row of `python-docs.jsonl` is ever seen, nor is the
chat form. Weights are stored in bfloat16 to stay small, and `config.json` says float32, the dtype they load
in.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
import training
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
CONTEXT = 512
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
{%- else %}
{{- message['content'] + eos_token }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}
"""

SEED = 7
LENGTH, BATCH, STEPS = 512, 8, 1000
LEARNING_RATE, WARMUP = 3e-3, 50
HELD_OUT_EVERY = 25
"""Every 25th chunk of the corpus is kept for the perplexity."""
WORST_PERPLEXITY = 50.0
"""A rebuilt base must do at least this well on the held-out chunks."""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the base's corpus; begins every plain text with `<|begin|>`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [BEGIN, END, PAD, *ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B:1",
        special_tokens=[(BEGIN, bpe.token_to_id(BEGIN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """3.3 million parameters: 4 layers of 256, eight heads over two key/value heads, tied embeddings."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def chunks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held-out) int64 chunks of LENGTH + 1 tokens; documents follow one another, each begun and
    ended."""
    ids: list[int] = []
    for document in tokenizer(texts)["input_ids"]:
        ids += [*document, tokenizer.eos_token_id]
    return training.pieces(ids, LENGTH + 1, HELD_OUT_EVERY)


def train(model: LlamaForCausalLM, data: torch.Tensor) -> None:
    """STEPS steps of AdamW over shuffled chunks, with a cosine rate."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )

    def rate(step: int) -> float:
        falling = 0.05 + 0.95 * (1 + math.cos(math.pi * (step / STEPS))) / 2
        return LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * falling

    training.train(
        model,
        data,
        optimizer,
        name="base",
        steps=STEPS,
        batch_size=BATCH,
        seed=SEED,
        rate=rate,
        loss_of=lambda batch, _: _loss(model, batch),
        say_every=20,
    )


def _loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: torch.nn.Module, data: torch.Tensor) -> float:
    """exp of the mean loss per token over `data` (chunks, LENGTH + 1)."""
    model.eval()
    losses = [_loss(model, batch).item() * len(batch) for batch in data.split(BATCH)]
    return math.exp(sum(losses) / len(data))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a directory that `AutoModelForCausalLM` and `AutoTokenizer` load as it is."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    stored = {name: value.to(torch.bfloat16).contiguous() for name, value in load_file(weights).items()}
    save_file(stored, weights, metadata={"format": "pt"})


def build(documents: dict[str, str], texts: list[str], folder: Path) -> float:
    """Trains, checks and writes the base; `documents` (name -> sha256) is recorded as `corpus.json`.

    Returns the held-out perplexity of what was written; raises SystemExit where it is worse than
    WORST_PERPLEXITY.
    """
    with training.built(folder) as aside:
        tokenizer = train_tokenizer(texts)
        data, held_out = chunks(texts, tokenizer)
        model = new_model(tokenizer)
        size, tokens = model.num_parameters(), data.numel()
        print(f"base: {size:,} parameters, {tokens:,} tokens to train on, {len(held_out)} chunks held out")
        train(model, data)
        save(model, tokenizer, aside)
        (aside / "corpus.json").write_text(json.dumps(documents, indent=0, sort_keys=True) + "\n")
        reached = perplexity(AutoModelForCausalLM.from_pretrained(aside), held_out)
        print(f"base: held-out perplexity {reached:.2f} (at most {WORST_PERPLEXITY:.0f})")
        training.check(reached, WORST_PERPLEXITY, aside)
    return reached


def text_hash(text: str) -> str:
    """sha256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
