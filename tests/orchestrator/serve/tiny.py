"""A base, adapters of several methods, and a registry with them: small enough to answer in milliseconds."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.identity import base_identity
from orchestrator.lineage import Lineage
from orchestrator.registry import AdapterVersion, Registry

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 96


def save_base(folder: Path, *, seed: int = 0) -> Path:
    """A random Llama of 2 layers x 32 with a byte tokenizer and a chat template."""
    torch.manual_seed(seed)
    letters = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CONFIGS = {
    "lora": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"]
    ),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}

TASKED = {
    "poly": lambda: peft.PolyConfig(
        task_type="CAUSAL_LM", r=4, n_tasks=3, n_skills=3, target_modules=["q_proj", "v_proj", "down_proj"]
    ),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=2
    ),
    "one task": lambda: peft.PolyConfig(
        task_type="CAUSAL_LM", r=4, n_tasks=1, target_modules=["q_proj", "v_proj"]
    ),
}
"""Methods that learn several tasks."""


def save_adapter(base: Path, folder: Path, method: str = "lora", *, seed: int = 1) -> Path:
    """An adapter with random weights, large enough that the answers differ; written by HF PEFT itself."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), (CONFIGS | TASKED)[method]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.5
    model.save_pretrained(folder)
    return folder


def register(
    registry: Registry,
    name: str,
    base: Path,
    scratch: Path,
    method: str = "lora",
    *,
    seed: int = 1,
    gate_passed: bool | None = True,
) -> AdapterVersion:
    """The next version of `name`, with new random weights."""
    folder = save_adapter(base, scratch / f"{name}-{method}-{seed}", method, seed=seed)
    lineage = Lineage(
        base=base_identity(str(base)), gate_passed=gate_passed, gate_reasons=("eval_loss is 3 > 2",)
    )
    return registry.register(name, folder, lineage)
