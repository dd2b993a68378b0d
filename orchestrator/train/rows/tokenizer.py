"""The base's tokenizer, from wherever the base is."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from orchestrator.errors import ModelError
from orchestrator.spec.job import ModelSpec
from peft_dist.errors import PeftDistError
from peft_dist.folder import local_folder

FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.jinja", "chat_template*", "config.json",
)  # fmt: skip


def load_tokenizer(model: ModelSpec) -> Any:
    """The tokenizer that lies beside the base's weights, with a padding token.

    Raises:
        ModelError: the base is nowhere, or has no tokenizer that can be loaded.
    """
    try:
        folder = local_folder(model.base_model, FILES, revision=model.revision)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (PeftDistError, OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the base '{model.base_model}' has no tokenizer that can be loaded: {text[0]}",
            where="model.base_model",
            hint="Save one beside the weights with tokenizer.save_pretrained(DIRECTORY).",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
