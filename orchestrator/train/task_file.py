"""`raypeft_task.json` beside an adapter: its task and what its head's outputs mean."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ModelError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.tasks import task_type

from .tasks import Facts

NAME = "raypeft_task.json"
FORMAT = 1


@dataclass(frozen=True)
class TaskFile:
    """What stands in it."""

    task: str
    facts: Facts


def write_task_file(folder: Path, spec: JobSpec, facts: Facts) -> None:
    """Writes it into an adapter's folder."""
    values = {
        "format": FORMAT,
        "task": task_type(spec),
        "dataset_type": spec.data.datasets[0].type,
        "labels": list(facts.labels),
        "may_be_empty": facts.may_be_empty,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_task_file(folder: Path) -> TaskFile | None:
    """What an adapter's folder says of its task; None where another program wrote it.

    Raises:
        ModelError: it is damaged, or of a newer format.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format", 0) > FORMAT:
            raise ModelError(f"{path} was written in format {values['format']}; this version reads {FORMAT}.")
        labels = tuple(str(label) for label in values["labels"])
        return TaskFile(str(values["task"]), Facts(labels, bool(values["may_be_empty"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {error}.", hint="Fetch or train the adapter again.") from error


def check_labels(folder: Path, facts: Facts, where: str) -> None:
    """Raises ModelError where the adapter in `folder` tells other labels apart than the job's rows name."""
    found = read_task_file(folder)
    if found is not None and found.facts.labels != facts.labels:
        raise ModelError(
            f"the adapter's labels are {', '.join(found.facts.labels) or 'none'}, those of the rows "
            f"{', '.join(facts.labels) or 'none'}.",
            where=where,
            hint="Train on rows with the same labels, or begin a fresh adapter.",
        )
