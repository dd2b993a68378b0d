"""The table of methods: from a PEFT type to its config class, without importing torch."""

from __future__ import annotations

import enum
import importlib
from dataclasses import dataclass
from typing import Any

from peft_dist.errors import ConfigError, suggest


class PeftType(enum.StrEnum):
    """The methods, by HF PEFT's names. Members compare to strings and serialise as such."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    LORA = "LORA"
    ADALORA = "ADALORA"
    XLORA = "XLORA"
    VBLORA = "VBLORA"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    LOHA = "LOHA"
    LOKR = "LOKR"
    POLY = "POLY"
    OFT = "OFT"
    BOFT = "BOFT"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    FOURIERFT = "FOURIERFT"
    WAVEFT = "WAVEFT"
    VERA = "VERA"
    SHIRA = "SHIRA"
    HRA = "HRA"
    BONE = "BONE"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    C3A = "C3A"
    ROAD = "ROAD"
    OSF = "OSF"
    CPT = "CPT"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"


class TaskType(enum.StrEnum):
    """What the base is trained for, by HF PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class Entry:
    """One method.

    Args:
        config: `module:Class` of its config, which is the method.
        prefix: what its tensors' names in a checkpoint start with.
        task_types: the tasks that it serves.
        merges: whether it can be merged into the base.
        summary: one line for `raypeft methods`.
    """

    config: str
    prefix: str
    task_types: tuple[str, ...]
    merges: bool
    summary: str


ALL_TASKS = tuple(task.value for task in TaskType)
DECODER_TASKS = tuple(task for task in ALL_TASKS if task != "SEQ_2_SEQ_LM")

METHODS: dict[str, Entry] = {
    "LORA": Entry(
        "peft_dist.methods.weight.lora:LoraConfig",
        "lora_",
        ALL_TASKS,
        True,
        "low-rank update of each target's weight (arXiv:2106.09685)",
    ),
    "IA3": Entry(
        "peft_dist.methods.activation.ia3:IA3Config",
        "ia3_",
        ALL_TASKS,
        True,
        "a learned scale per channel of each target (arXiv:2205.05638)",
    ),
    "PROMPT_TUNING": Entry(
        "peft_dist.methods.prompt.prompt_tuning:PromptTuningConfig",
        "prompt_",
        DECODER_TASKS,
        False,
        "learned embeddings before the input (arXiv:2104.08691)",
    ),
}


def entry(peft_type: str) -> Entry:
    """The row of `peft_type` (either case).

    Raises:
        ConfigError: there is no such method; names the closest one.
    """
    name = str(peft_type).upper()
    if name not in METHODS:
        lower = [known.lower() for known in METHODS]
        raise ConfigError(f"{str(peft_type)!r} is not a method.{suggest(name.lower(), lower)}")
    return METHODS[name]


def config_class(peft_type: str) -> Any:
    """The config class of `peft_type`; imports its file, which imports no torch."""
    module, _, name = entry(peft_type).config.partition(":")
    return getattr(importlib.import_module(module), name)
