"""The classes of the six tasks. Each says its task, and which heads are trained whole beside an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from peft_dist.checkpoint import read_config
from peft_dist.config import PeftConfig
from peft_dist.errors import ConfigError
from peft_dist.loading import load_base
from peft_dist.model import TASK_CLASSES, PeftModel


class _WithHead(PeftModel):
    """A task whose head is new on the base, so every adapter trains its own."""

    heads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module, peft_config: PeftConfig | None, *args: Any, **kwargs: Any) -> None:
        self._train_head(peft_config)
        super().__init__(model, peft_config, *args, **kwargs)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        self._train_head(peft_config)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def _train_head(self, config: Any) -> None:
        if config is not None:
            saved = list(config.modules_to_save or [])
            config.modules_to_save = saved + [name for name in self.heads if name not in saved]


class PeftModelForSequenceClassification(_WithHead):
    """SEQ_CLS."""

    task_type = "SEQ_CLS"
    heads = ("classifier", "score")


class PeftModelForTokenClassification(_WithHead):
    """TOKEN_CLS."""

    task_type = "TOKEN_CLS"
    heads = ("classifier", "score")


class PeftModelForQuestionAnswering(_WithHead):
    """QUESTION_ANS."""

    task_type = "QUESTION_ANS"
    heads = ("qa_outputs",)


class PeftModelForCausalLM(PeftModel):
    """CAUSAL_LM."""

    task_type = "CAUSAL_LM"


class PeftModelForSeq2SeqLM(PeftModel):
    """SEQ_2_SEQ_LM."""

    task_type = "SEQ_2_SEQ_LM"


class PeftModelForFeatureExtraction(PeftModel):
    """FEATURE_EXTRACTION."""

    task_type = "FEATURE_EXTRACTION"


class AutoPeftModelForCausalLM:
    """A base and its adapter at once, from the adapter's directory alone."""

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        dtype: Any = torch.float32,
    ) -> PeftModel:
        """The adapter of a directory on the base that its config names.

        Args:
            dtype: of the base; "auto" for the one it is stored in.

        Raises:
            ConfigError: the config names no base. BaseModelError: that base cannot be loaded.
        """
        config = read_config(model_id)
        if config.base_model_name_or_path is None:
            raise ConfigError(
                f"{model_id}: base_model_name_or_path is not given. Load the base, then the adapter on it."
            )
        base = load_base(config.base_model_name_or_path, dtype=dtype, revision=config.revision)
        return PeftModelForCausalLM.from_pretrained(base, model_id, adapter_name, is_trainable)


TASK_CLASSES.update(
    {
        kind.task_type: kind
        for kind in (
            PeftModelForSequenceClassification,
            PeftModelForTokenClassification,
            PeftModelForQuestionAnswering,
            PeftModelForCausalLM,
            PeftModelForSeq2SeqLM,
            PeftModelForFeatureExtraction,
        )
    }
)
