"""A base as a task loads it: a language model's head left out, the task's own head put on top."""

from __future__ import annotations

from dataclasses import replace

from .model_sizes import ModelSizes

_KEEP = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def with_head(sizes: ModelSizes, task_type: str, num_labels: int | None) -> ModelSizes:
    """The sizes for a task.

    Args:
        num_labels: that the head tells apart; None: a new head is left out.
    """
    if task_type in _KEEP:
        return sizes
    heads = sizes.heads_of_output
    tensors = {name: shape for name, shape in sizes.tensors.items() if name.rpartition(".")[0] not in heads}
    kept = {name: shape for name, shape in sizes.tensors.items() if name not in tensors}
    reads_one_way = (
        any(word in sizes.architecture for word in ("CausalLM", "LMHead")) or "score.weight" in kept
    )
    outputs = 2 if task_type == "QUESTION_ANS" else num_labels
    if task_type != "FEATURE_EXTRACTION" and outputs is not None:
        name = "qa_outputs" if task_type == "QUESTION_ANS" else "score" if reads_one_way else "classifier"
        tensors[f"{name}.weight"] = (outputs, sizes.hidden)
        if not (task_type == "SEQ_CLS" and name == "score"):
            tensors[f"{name}.bias"] = (outputs,)
    gone = sum(_elements(shape) for shape in kept.values())
    new = sum(_elements(shape) for name, shape in tensors.items() if name not in sizes.tensors)
    return replace(sizes, tensors=tensors, tied=False, parameters=sizes.parameters - gone + new)


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
