"""The job's data: every dataset read, rendered and split, with an account of what became of each row."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.errors import DataError
from orchestrator.spec.job import DatasetSpec, JobSpec
from orchestrator.spec.tasks import TASKS

from ..rows.sources import read_rows
from ..rows.split import held_out, repeats
from ..rows.task_ids import TaskNumbers, task_numbers
from ..tasks import BY_TYPE, Facts, Row, task_class

LONGEST_DEFAULT = 2048
"""Tokens a row, where neither the spec nor the base says less."""


@dataclass(frozen=True)
class DataReport:
    """What became of the rows. `rows` = those read = kept + dropped; duplicates stay, on their twin's
    side."""

    sequence_len: int
    rows: int
    """Rows read, all datasets together."""
    rows_by_dataset: dict[str, int]
    train_rows: int
    """Examples of one epoch, weights applied."""
    evaluation_rows: int
    train_tokens: int
    trained_tokens: int
    """Tokens of one epoch that the loss counts."""
    longest: int
    """Tokens of the longest row before anything was cut."""
    truncated: int
    dropped_overlong: int
    dropped_without_answer: int
    """Rows without a trained token, as rendered or once cut."""
    duplicates: int
    """Rows whose content had been read before."""
    kept_from_training: int
    """Rows of the training data that are also evaluation rows, and so are not trained on."""
    task: str = "CAUSAL_LM"
    labels: tuple[str, ...] = ()
    """The classes that the rows name, in the order of the head's outputs."""

    @property
    def dropped(self) -> int:
        """Rows that are in neither side."""
        return self.dropped_overlong + self.dropped_without_answer

    def to_dict(self) -> dict[str, Any]:
        """For events and `--json`."""
        return asdict(self)

    def sentence(self) -> str:
        """One line for people; what did not happen is not mentioned."""
        parts = [
            f"{self.train_rows} rows to train on, {self.evaluation_rows} to evaluate",
            self._tokens(),
        ]
        if self.labels:
            more = ", ..." if len(self.labels) > 10 else ""
            parts.append(f"{len(self.labels)} labels ({', '.join(self.labels[:10])}{more})")
        counts = {
            f"cut to {self.sequence_len} tokens": self.truncated,
            "dropped as too long": self.dropped_overlong,
            "dropped without an answer": self.dropped_without_answer,
            "duplicates": self.duplicates,
            "kept from training as evaluation rows": self.kept_from_training,
        }
        return ", ".join(parts + [f"{count} {what}" for what, count in counts.items() if count])

    def _tokens(self) -> str:
        what = {
            "CAUSAL_LM": f"{self.trained_tokens} trained tokens of {self.train_tokens}",
            "SEQ_2_SEQ_LM": f"{self.trained_tokens} trained tokens after {self.train_tokens}",
            "TOKEN_CLS": f"{self.trained_tokens} tagged words in {self.train_tokens} tokens",
        }
        return what.get(self.task, f"{self.train_tokens} tokens")


@dataclass(frozen=True)
class Examples:
    """Both sides, rendered. Training examples stand in the order of their files, repeated by weight;
    evaluation examples once each."""

    train: list[Any]
    evaluation: list[Any]
    report: DataReport
    facts: Facts = field(default_factory=Facts)
    """What all training rows together say, such as the labels that there are."""


def load_examples(spec: JobSpec, tokenizer: Any, *, max_len: int | None) -> Examples:
    """Reads, renders and splits all of the job's data; the same on every rank.

    Args:
        spec: its `data` and `eval` sections are used.
        tokenizer: a Hugging Face tokenizer; it is given the default chat template where it has none.
        max_len: the longest row that the base allows, in tokens; None where it sets no bound.

    Raises:
        DataError: a dataset that matches nothing, is empty, unreadable, lacks a column or leaves nothing to
        train on.
    """
    sequence_len = allowed_length(spec, max_len)
    account = _Account(sequence_len, spec.data.overlong)
    numbers = task_numbers(spec.adapter)
    sets = [
        (dataset, account.kept(_rendered(dataset, tokenizer, account, number, numbers), dataset))
        for number, dataset in enumerate(spec.data.datasets)
    ]
    given = [
        e
        for number, dataset in enumerate(spec.eval.datasets)
        for e in account.kept(_rendered(dataset, tokenizer, account, number, numbers), dataset)
    ]
    every = [example for _, found in sets for example in found]
    if not every:
        raise account.nothing_left()
    if spec.eval.datasets:
        outside = {example.row_hash for example in given}
        candidates = given
    else:
        outside = held_out((example.row_hash for example in every), spec.data.val_set_size)
        candidates = [example for example in every if example.row_hash in outside]
    train = [
        example
        for dataset, found in sets
        for example in found
        if example.row_hash not in outside
        for _ in range(repeats(example.row_hash, dataset.weight))
    ]
    if not train:
        raise DataError(
            f"no row is left to train on: all {len(every)} are evaluation rows or left out by their weight.",
            where="data.val_set_size" if not spec.eval.datasets else "eval.datasets",
            hint="Hold out fewer rows, or add data.",
        )
    evaluation = _first_of_each(candidates, spec.eval.max_rows)
    shared = sum(example.row_hash in outside for example in every) if spec.eval.datasets else 0
    facts = task_class(spec).facts(every)
    if task_class(spec).has_labels and len(facts.labels) < 2:
        raise DataError(
            f"all {len(every)} rows have the same label, '{facts.labels[0]}': there is nothing to tell apart.",
            where=", ".join(dataset.path for dataset in spec.data.datasets),
            hint="Look at them with `raypeft inspect`; check which column the labels are in.",
        )
    if spec.eval.datasets:
        task_class(spec)(tokenizer, facts).check(evaluation)
    report = account.report(train, evaluation, shared)
    task = TASKS[spec.data.datasets[0].type].task
    return Examples(train, evaluation, replace(report, task=task, labels=facts.labels), facts)


def load_evaluation(dataset: DatasetSpec, spec: JobSpec, tokenizer: Any, *, max_len: int | None) -> list[Any]:
    """The rows of one dataset alone, to measure an adapter that is there already: none is trained on.

    Raises:
        DataError: as `load_examples`.
    """
    account = _Account(allowed_length(spec, max_len), spec.data.overlong)
    found = account.kept(_rendered(dataset, tokenizer, account, 0, task_numbers(spec.adapter)), dataset)
    if not found:
        raise account.nothing_left()
    return _first_of_each(found, spec.eval.max_rows)


def allowed_length(spec: JobSpec, max_len: int | None) -> int:
    """`data.sequence_len`, or what the base allows, at most 2048; raises DataError where it is more than
    that."""
    wanted = spec.data.sequence_len
    if wanted is None:
        return min(max_len or LONGEST_DEFAULT, LONGEST_DEFAULT)
    if max_len is not None and wanted > max_len:
        raise DataError(
            f"{wanted} tokens are more than the {max_len} that {spec.model.base_model} allows a row.",
            where="data.sequence_len",
            hint=f"Set it to {max_len} or less.",
        )
    return wanted


def _rendered(
    dataset: DatasetSpec, tokenizer: Any, account: _Account, number: int, numbers: TaskNumbers | None
) -> Iterable[Row]:
    """The dataset's rows in their order, each with the number of its task where the method learns several."""
    task = BY_TYPE[dataset.type]
    read = 0
    task_ids: deque[int] = deque()

    def contents() -> Iterable[Any]:
        nonlocal read
        for read, row in enumerate(read_rows(dataset), start=1):  # noqa: B007
            if numbers is not None:
                task_ids.append(numbers.of(row, number))
            yield task.read(row, dataset)

    rendered: Any
    for rendered in task.render(contents(), tokenizer, account.sequence_len):
        yield replace(rendered, task_id=task_ids.popleft()) if task_ids else rendered
    account.rows[dataset.path] += read
    if not read:
        raise DataError("holds no row.", where=dataset.path, hint="Each dataset needs at least one row.")


def _first_of_each(candidates: Sequence[Any], max_rows: int | None) -> list[Any]:
    """One example per content; of more than `max_rows`, those with the smallest hashes."""
    distinct = {example.row_hash: example for example in reversed(candidates)}
    chosen = set(sorted(distinct)[:max_rows])
    return [example for row_hash, example in reversed(distinct.items()) if row_hash in chosen]


class _Account:
    """Counts what becomes of rows while they are read."""

    def __init__(self, sequence_len: int, overlong: str) -> None:
        self.sequence_len, self.overlong = sequence_len, overlong
        self.rows: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.truncated = self.dropped_overlong = self.without_answer = self.duplicates = self.longest = 0

    def kept(self, found: Iterable[Row], dataset: DatasetSpec) -> list[Row]:
        """The examples that may be used; raises DataError for an overlong one where the spec says so."""
        kept = []
        too_long: list[Row] = []
        for example in found:
            self.duplicates += example.row_hash in self.seen
            self.seen.add(example.row_hash)
            self.longest = max(self.longest, example.full_length)
            if example.is_truncated and self.overlong != "truncate":
                too_long.append(example)
            elif example.num_targets == 0:
                self.without_answer += 1
            else:
                self.truncated += example.is_truncated
                kept.append(example)
        if too_long and self.overlong == "error":
            worst = max(too_long, key=lambda example: example.full_length)
            raise DataError(
                f"{len(too_long)} of {self.rows[dataset.path]} rows are longer than {self.sequence_len} "
                f"tokens; this one, the longest, has {worst.full_length}.",
                where=worst.where,
                hint="Raise data.sequence_len, or set data.overlong to truncate or drop.",
            )
        self.dropped_overlong += len(too_long)
        return kept

    def nothing_left(self) -> DataError:
        """All rows were dropped: why."""
        return DataError(
            f"all {sum(self.rows.values())} rows were dropped: {self.dropped_overlong} longer than "
            f"{self.sequence_len} tokens, {self.without_answer} without an answer to train on.",
            where=", ".join(self.rows),
            hint="Look at them with `raypeft inspect`; check data.datasets[].type and data.sequence_len.",
        )

    def report(self, train: list[Any], evaluation: list[Any], kept_from_training: int) -> DataReport:
        """The account once both sides are known."""
        return DataReport(
            sequence_len=self.sequence_len,
            rows=sum(self.rows.values()),
            rows_by_dataset=dict(self.rows),
            train_rows=len(train),
            evaluation_rows=len(evaluation),
            train_tokens=sum(len(example.input_ids) for example in train),
            trained_tokens=sum(example.num_targets for example in train),
            longest=self.longest,
            truncated=self.truncated,
            dropped_overlong=self.dropped_overlong,
            dropped_without_answer=self.without_answer,
            duplicates=self.duplicates,
            kept_from_training=kept_from_training,
        )
