"""The base of an endpoint, ready to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from orchestrator.chat_template import ensure_chat_template
from orchestrator.spec.job import ModelSpec
from orchestrator.train.rows.tokenizer import load_tokenizer
from peft_dist.loading import load_base

from ..desired import EngineOptions

_CONTEXT_WHERE_UNKNOWN = 2048
AS_IT_IS = EngineOptions()
"""Nothing is asked of the base."""
_QUANTIZED = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
}


@dataclass(frozen=True)
class Base:
    """A model in evaluation mode on its device, its tokenizer, and what the engine must know of them."""

    model: PreTrainedModel
    tokenizer: Any

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the base's generation config says them, else the tokenizer."""
        said = getattr(self.model.generation_config, "eos_token_id", None)
        if said is None:
            said = self.tokenizer.eos_token_id
        return frozenset([said] if isinstance(said, int) else said or ())

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together: the base's positions, else the tokenizer's limit."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limit = self.tokenizer.model_max_length
        if positions:
            return positions - _positions_before(self.model)
        return limit if limit < 10**9 else _CONTEXT_WHERE_UNKNOWN


def _positions_before(model: Any) -> int:
    """Rows of a table of positions that no token of a text has: RoBERTa's begin behind the padding's."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith(".position_embeddings") and padding is not None:
            return int(padding) + 1
    return 0


def load(spec: ModelSpec, threads: int, options: EngineOptions = AS_IT_IS, task: str = "CAUSAL_LM") -> Base:
    """The base in the dtype of its files, on the GPU that this process was given or else the CPU.

    Args:
        task: PEFT's name of what it is asked for, which decides its head.
        threads: CPU threads of the process, for good.
        options: may ask for its linear layers in 8 or 4 bits; `deterministic` takes it in fp32.
    """
    torch.set_num_threads(threads)
    model: Any = load_base(
        spec.base_model,
        task=task,
        dtype="float32" if options.deterministic else "auto",
        quantization=_QUANTIZED[options.quantization]() if options.quantization in _QUANTIZED else None,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(spec)
    return Base(model.to(device).eval().requires_grad_(False), ensure_chat_template(tokenizer))
