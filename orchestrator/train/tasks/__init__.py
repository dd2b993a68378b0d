"""The tasks, by the dataset types whose rows train them."""

from __future__ import annotations

from orchestrator.spec.job import JobSpec

from .causal import CausalLM
from .classification import Classification
from .embedding import Embedding
from .qa import QuestionAnswering
from .seq2seq import Seq2Seq
from .task import Answering, Batch, Facts, Row, Step, Task
from .token_classification import TokenClassification

__all__ = ["BY_TYPE", "Answering", "Batch", "Facts", "Row", "Step", "Task", "task_class"]

BY_TYPE: dict[str, type[Task]] = {
    **dict.fromkeys(("chat", "prompt_completion", "alpaca", "text"), CausalLM),
    "classification": Classification,
    "token-classification": TokenClassification,
    "qa": QuestionAnswering,
    "seq2seq": Seq2Seq,
    "embedding": Embedding,
}


def task_class(spec: JobSpec) -> type[Task]:
    """The task that the job's rows train."""
    return BY_TYPE[spec.data.datasets[0].type]
