"""Adapters for sharded bases, under HF PEFT's public names. Each name is imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

from peft_dist import compat

_NAMES = {
    "peft_dist.auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "peft_dist.catalog": ("PeftType", "TaskType"),
    "peft_dist.compat": ("install",),
    "peft_dist.config": ("PeftConfig", "PromptLearningConfig", "get_peft_config"),
    "peft_dist.arithmetic.convert": ("convert_to_lora", "save_as_lora"),
    "peft_dist.calibration.corda": ("preprocess_corda",),
    "peft_dist.calibration.eva": ("get_eva_state_dict", "initialize_lora_eva_weights"),
    "peft_dist.errors": ("PeftDistError",),
    "peft_dist.kbit": ("prepare_model_for_int8_training", "prepare_model_for_kbit_training"),
    "peft_dist.calibration.loftq": ("replace_lora_weights_loftq",),
    "peft_dist.lora_optimizers.loraplus": ("create_loraplus_optimizer",),
    "peft_dist.loading": ("load_base", "meta_base"),
    "peft_dist.methods.activation.boft": ("BOFTConfig",),
    "peft_dist.methods.activation.hra": ("HRAConfig",),
    "peft_dist.methods.activation.ia3": ("IA3Config",),
    "peft_dist.methods.activation.oft": ("OFTConfig",),
    "peft_dist.methods.activation.road": ("RoadConfig",),
    "peft_dist.methods.block.adaption_prompt": ("AdaptionPromptConfig",),
    "peft_dist.methods.prompt.cpt": ("CPTConfig",),
    "peft_dist.methods.prompt.multitask_prompt_tuning": (
        "MultitaskPromptTuningConfig",
        "MultitaskPromptTuningInit",
    ),
    "peft_dist.methods.prompt.p_tuning": ("PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "peft_dist.methods.prompt.prefix_tuning": ("PrefixTuningConfig",),
    "peft_dist.methods.prompt.prompt_tuning": ("PromptTuningConfig", "PromptTuningInit"),
    "peft_dist.methods.lora.settings": ("CordaConfig", "EvaConfig", "LoftQConfig", "LoraRuntimeConfig"),
    "peft_dist.methods.replace.ln_tuning": ("LNTuningConfig",),
    "peft_dist.methods.replace.trainable_tokens": ("TrainableTokensConfig",),
    "peft_dist.methods.weight.adalora": ("AdaLoraConfig",),
    "peft_dist.methods.weight.bone": ("BoneConfig",),
    "peft_dist.methods.weight.c3a": ("C3AConfig",),
    "peft_dist.methods.weight.fourierft": ("FourierFTConfig",),
    "peft_dist.methods.weight.lora": ("LoraConfig",),
    "peft_dist.methods.weight.delora": ("DeloraConfig",),
    "peft_dist.methods.weight.gralora": ("GraloraConfig",),
    "peft_dist.methods.weight.loha": ("LoHaConfig",),
    "peft_dist.methods.weight.lokr": ("LoKrConfig",),
    "peft_dist.methods.weight.miss": ("MissConfig",),
    "peft_dist.methods.weight.osf": ("OSFConfig",),
    "peft_dist.methods.weight.poly": ("PolyConfig",),
    "peft_dist.methods.weight.randlora": ("RandLoraConfig",),
    "peft_dist.methods.weight.shira": ("ShiraConfig",),
    "peft_dist.methods.weight.vblora": ("VBLoRAConfig",),
    "peft_dist.methods.weight.vera": ("VeraConfig",),
    "peft_dist.methods.weight.waveft": ("WaveFTConfig",),
    "peft_dist.methods.weight.xlora": ("XLoraConfig",),
    "peft_dist.mixed": ("PeftMixedModel",),
    "peft_dist.entry": (
        "get_peft_model",
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "set_peft_model_state_dict",
    ),
    "peft_dist.model": ("PeftModel",),
    "peft_dist.optim": ("AdapterOptimizer", "Hyper"),
    "peft_dist.registry": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "register_peft_method",
    ),
    "peft_dist.prompt_encoders": (
        "CPTEmbedding",
        "MultitaskPromptEmbedding",
        "PrefixEncoder",
        "PromptEmbedding",
        "PromptEncoder",
    ),
    "peft_dist.rows": ("Rows",),
    "peft_dist.status": ("get_layer_status", "get_model_status"),
    "peft_dist.tasks": (
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
    "peft_dist.tuner": ("BaseTuner",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
# The classes of the tasks register themselves with the model's file when they are imported.
_WITH_TASKS = frozenset({"PeftModel", "get_peft_model"})

__all__ = sorted({*_HOMES, *compat.TOP})
compat.enter()


def __getattr__(name: str) -> Any:
    if name in _WITH_TASKS:
        importlib.import_module("peft_dist.tasks")
        importlib.import_module("peft_dist.mixed")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in compat.PATHS:
        value = importlib.import_module(f"peft_dist.{name}")
    else:
        value = compat.at_top(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
