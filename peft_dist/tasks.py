"""The classes of the six tasks. Each says its task, and which heads are trained whole beside an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from peft_dist.config import PeftConfig
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

    def _told_by(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        # The configs of some methods have no field for it, and HF PEFT trains no head beside those.
        parts = {part for key in tensors for part in key.split(".")}
        _train_whole(config, [name for name in self.heads if name in parts])

    def _train_head(self, config: Any) -> None:
        if config is not None:
            _train_whole(config, self.heads)


def _train_whole(config: Any, names: Sequence[str]) -> None:
    saved = list(config.modules_to_save or [])
    config.modules_to_save = saved + [name for name in names if name not in saved] or None


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
