"""The task of each row, for methods that learn several at once (POLY, multitask prompt tuning): the integer in its
column `task_id`, else the place of its dataset in the job's list."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import DataError
from orchestrator.spec.adapter import method_fields
from orchestrator.spec.job import AdapterSpec
from peft_dist.catalog import config_class

from .records import kind_of
from .sources import SourceRow

COLUMN = "task_id"
ARGUMENT = "task_ids"
"""Of the model's forward."""
SIZES = ("n_tasks", "num_tasks")


@dataclass(frozen=True)
class TaskNumbers:
    """How many tasks the adapter's method learns, and the field of its config that says so."""

    count: int
    field: str

    def of(self, row: SourceRow, number: int) -> int:
        """The row's task; `number` is its dataset's place in the list.

        Raises:
            DataError: it is no whole number, or the method learns fewer tasks.
        """
        value = row.values.get(COLUMN, number)
        if isinstance(value, str) and value.strip().isdigit():  # CSV has only text
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise DataError(
                f"column '{COLUMN}' holds {kind_of(value)}; it must be a whole number.", where=row.where
            )
        if not 0 <= value < self.count:
            has = (
                f"column '{COLUMN}' holds {value}"
                if COLUMN in row.values
                else f"its dataset is number {value}"
            )
            raise DataError(
                f"{has}, and the adapter learns {self.count} task{'s' * (self.count != 1)}, numbered from 0.",
                where=row.where,
                hint=f"Set adapter.{self.field} to {value + 1} or more, or write a column '{COLUMN}'."
                if value >= 0
                else None,
            )
        return value


def task_numbers(adapter: AdapterSpec) -> TaskNumbers | None:
    """What to number the rows by; None for a method that learns one task."""
    reads = getattr(config_class(adapter.type.upper()), "reads", ())
    if (
        not isinstance(reads, tuple) or ARGUMENT not in reads
    ):  # what follows from the instance is its own affair
        return None
    known = method_fields(adapter.type)
    field = next(name for name in SIZES if name in known)
    return TaskNumbers(int(adapter.fields.get(field, known[field].default)), field)
