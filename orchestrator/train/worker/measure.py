"""`raypeft eval`: an adapter that is there already, measured on data in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from orchestrator.spec.adapter import AdapterSpec, method_fields
from orchestrator.spec.job import JobSpec
from orchestrator.spec.tasks import measured_metrics
from peft_dist.config import PeftConfig
from peft_dist.loading import load_config

from ..rows.task_ids import task_numbers
from ..rows.tokenizer import load_tokenizer
from ..task_file import read_task_file
from ..tasks import Facts, task_class
from ..tasks.task import pad_id
from .data import load_evaluation
from .evaluate import evaluate_adapter
from .inspection import max_positions
from .model import load_frozen_base


def measure_adapter(spec: JobSpec, adapter_dir: str) -> dict[str, float]:
    """Metrics over the rows of the job's first evaluation dataset: the adapter's, and the bare base's as
    `base.NAME`.

    Raises:
        DataError: rows that cannot be read, or name labels that the adapter does not tell apart.
    """
    folder = Path(adapter_dir)
    known = read_task_file(folder)
    facts = known.facts if known else Facts()
    model = spec.model
    tokenizer = load_tokenizer(model)
    config = load_config(model.base_model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    with_adapter = spec.model_copy(update={"adapter": _adapter(folder)})
    rows = load_evaluation(
        spec.eval.datasets[0],
        with_adapter,
        tokenizer,
        max_len=max_positions(config.to_dict(), with_adapter),
    )
    kind = task_class(spec)
    if kind.has_labels and not facts.labels:
        facts = kind.facts(rows)
    task = kind(tokenizer, facts, takes_task_ids=task_numbers(with_adapter.adapter) is not None)
    task.check(rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = facts.labels if kind.has_labels else None
    base = load_frozen_base(spec, "fp32", device, labels=labels, pad_token_id=pad_id(tokenizer))
    metrics = measured_metrics(spec)
    bare = evaluate_adapter(base, task, None, rows, spec.eval, metrics, device=device)
    adapted = evaluate_adapter(base, task, adapter_dir, rows, spec.eval, metrics, device=device)
    return adapted | {f"base.{name}": value for name, value in bare.items()}


def _adapter(folder: Path) -> AdapterSpec:
    """The adapter's own config as a job would write it."""
    config: Any = PeftConfig.from_pretrained(folder)
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    given = {name: getattr(config, name) for name in method_fields(kind)}
    return AdapterSpec(type=kind, **{name: value for name, value in given.items() if value is not None})
