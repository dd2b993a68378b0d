"""What each dataset type trains, and what is measured of it: one row a type."""

from __future__ import annotations

from dataclasses import dataclass

from .job import JobSpec


@dataclass(frozen=True)
class TaskRow:
    """One dataset type.

    Args:
        task: PEFT's name of the task that its rows train.
        metrics: what may be measured of it beside `eval_loss`.
        by_default: those that are measured where `eval.metrics` names none.
    """

    task: str
    metrics: tuple[str, ...] = ()
    by_default: tuple[str, ...] = ()


_GENERATED = ("exact_match", "contains")
_CLASSES = ("accuracy", "f1")
_ENTITIES = ("precision", "recall", "f1", "accuracy")
_SPANS = ("exact_match", "f1")
_TEXTS = ("chrf", "rouge1", "rouge2", "rougeL", "exact_match", "contains")
_RETRIEVED = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")

TASKS: dict[str, TaskRow] = {
    "chat": TaskRow("CAUSAL_LM", _GENERATED),
    "prompt_completion": TaskRow("CAUSAL_LM", _GENERATED),
    "alpaca": TaskRow("CAUSAL_LM", _GENERATED),
    "text": TaskRow("CAUSAL_LM"),
    "classification": TaskRow("SEQ_CLS", _CLASSES, _CLASSES),
    "token-classification": TaskRow("TOKEN_CLS", _ENTITIES, _ENTITIES),
    "qa": TaskRow("QUESTION_ANS", _SPANS, _SPANS),
    "seq2seq": TaskRow("SEQ_2_SEQ_LM", _TEXTS, _TEXTS[:4]),
    "embedding": TaskRow("FEATURE_EXTRACTION", _RETRIEVED, _RETRIEVED),
}

SERVED = tuple(dict.fromkeys(row.task for row in TASKS.values()))
"""Tasks whose adapters an endpoint answers with."""


def task_type(spec: JobSpec) -> str:
    """The PEFT task that the job's rows train."""
    return TASKS[spec.data.datasets[0].type].task


def evaluated_types(spec: JobSpec) -> list[str]:
    """The types of the datasets whose rows are evaluated."""
    return [each.type for each in spec.eval.datasets or spec.data.datasets]


def measured_metrics(spec: JobSpec) -> tuple[str, ...]:
    """What is measured beside `eval_loss`: what the job names, else the task's own."""
    return spec.eval.metrics or TASKS[evaluated_types(spec)[0]].by_default
