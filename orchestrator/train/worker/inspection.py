"""`raypeft inspect`: the rows as the model will read them, and what becomes of all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.chat_template import NO_TEMPLATE
from orchestrator.model_folder import model_folder
from orchestrator.spec.job import JobSpec

from ..rows.tokenizer import load_tokenizer
from ..tasks import Row
from .data import DataReport, load_examples

TRAINED, READ = "bold green", "dim"
NUM_BINS = 12
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


@dataclass(frozen=True)
class Token:
    """A token's text and whether the loss counts it."""

    text: str
    trained: bool


@dataclass(frozen=True)
class InspectedRow:
    """One rendered training row; the texts of its tokens joined are what the model reads."""

    where: str
    row_hash: str
    tokens: tuple[Token, ...]
    prompt_len: int
    full_length: int
    note: str = ""
    """What else is told of it, such as its label."""


@dataclass(frozen=True)
class Bin:
    """`count` rows of `first` to `last` tokens, before anything is cut."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class Inspection:
    """What `raypeft inspect` shows."""

    rows: tuple[InspectedRow, ...]
    lengths: tuple[Bin, ...]
    report: DataReport
    has_chat_template: bool
    """Whether the base brings a chat template; without one the default is used."""

    @property
    def share_truncated(self) -> float:
        """Of all rows read, the share that is cut at `sequence_len`."""
        return self.report.truncated / max(self.report.rows, 1)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "rows": [
                {
                    "where": row.where,
                    "row_hash": row.row_hash,
                    "prompt_len": row.prompt_len,
                    "full_length": row.full_length,
                    "note": row.note,
                    "tokens": [{"text": token.text, "trained": token.trained} for token in row.tokens],
                }
                for row in self.rows
            ],
            "lengths": [{"first": bin.first, "last": bin.last, "count": bin.count} for bin in self.lengths],
            "share_truncated": self.share_truncated,
            "has_chat_template": self.has_chat_template,
            "report": self.report.to_dict(),
        }

    def show(self, console: Console) -> None:
        """Prints the rows with their trained tokens in colour (in brackets where there is none), then the
        numbers."""
        marked = console.color_system is None
        for number, row in enumerate(self.rows, start=1):
            trained = sum(token.trained for token in row.tokens)
            head = f"row {number}  {row.where}  {len(row.tokens)} tokens, {trained} trained"
            if row.full_length > len(row.tokens):
                head += f", cut from {row.full_length}"
            head += f"  {row.note}" * bool(row.note)
            console.print(Text(head, style="bold"), soft_wrap=True)
            console.print(_shown(row, marked), soft_wrap=True)
            console.print()
        console.print(self._histogram())
        for line in self._numbers():
            console.print(Text(line), soft_wrap=True)

    def _histogram(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        most = max((bin.count for bin in self.lengths), default=1)
        for bin in self.lengths:
            bar = "█" * max(round(40 * bin.count / most), int(bin.count > 0))
            table.add_row(
                Text(f"{bin.first}-{bin.last}", justify="right"), Text(bar, style="cyan"), str(bin.count)
            )
        return table

    def _numbers(self) -> Iterator[str]:
        report = self.report
        for path, count in report.rows_by_dataset.items():
            yield f"{path}: {count} rows"
        yield report.sentence()
        yield (
            f"{self.share_truncated:.1%} truncated at {report.sequence_len} tokens (the longest row has "
            f"{report.longest}), {report.dropped} dropped, {report.duplicates} duplicates"
        )
        if not self.has_chat_template:
            yield NO_TEMPLATE


def inspect(spec: JobSpec, num_rows: int = 3) -> Inspection:
    """Reads and renders the job's data and keeps the first `num_rows` training rows to look at.

    Raises:
        DataError, ModelError: as training would.
    """
    max_len = max_positions(model_folder(spec.model.base_model, spec.model.revision).config(), spec)
    tokenizer = load_tokenizer(spec.model)
    return inspected(spec, tokenizer, max_len=max_len, num_rows=num_rows)


def inspected(spec: JobSpec, tokenizer: Any, *, max_len: int | None, num_rows: int) -> Inspection:
    """`inspect` for a tokenizer at hand."""
    has_template = bool(tokenizer.chat_template)
    examples = load_examples(spec, tokenizer, max_len=max_len)
    every = [*examples.train, *examples.evaluation]
    return Inspection(
        rows=tuple(_row(example, tokenizer) for example in examples.train[:num_rows]),
        lengths=histogram([example.full_length for example in every]),
        report=examples.report,
        has_chat_template=has_template,
    )


def max_positions(config: Mapping[str, Any], spec: JobSpec) -> int | None:
    """Tokens that a `config.json` leaves for a row beside a prompt method's virtual ones; None without a
    bound."""
    text = config.get("text_config") or config
    bound = next((text[name] for name in _POSITIONS if isinstance(text.get(name), int)), None)
    virtual = int(spec.adapter.fields.get("num_virtual_tokens") or 0)
    return bound - virtual if bound is not None and bound > virtual else bound


def histogram(lengths: list[int]) -> tuple[Bin, ...]:
    """At most NUM_BINS bins of equal width over `lengths`, from the shortest to the longest."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    width = max(-(-(high - low + 1) // NUM_BINS), 1)
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    return tuple(
        Bin(low + i * width, min(low + (i + 1) * width - 1, high), count) for i, count in enumerate(counts)
    )


def _row(example: Row, tokenizer: Any) -> InspectedRow:
    outline = example.outline()
    texts = token_texts(outline.ids, tokenizer)
    return InspectedRow(
        where=example.where,
        row_hash=example.row_hash,
        tokens=tuple(Token(text, flag) for text, flag in zip(texts, outline.trained, strict=True)),
        prompt_len=outline.prompt_len,
        full_length=example.full_length,
        note=outline.note,
    )


def token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    """The text that each token adds; of the tokens that share one character, the last one has it."""
    texts: list[str] = []
    known, done = (
        0,
        0,
    )  # what is shown so far ends at `done`; the run from `known` on gives the decoder its context
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[known:done], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[known:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        known, done = done, end
    return texts


def _shown(row: InspectedRow, marked: bool) -> Text:
    text = Text()
    was_trained = False
    for token in row.tokens:
        if marked and token.trained != was_trained:
            text.append("⟦" if token.trained else "⟧")
        was_trained = token.trained
        text.append(token.text, style=TRAINED if token.trained else READ)
    if marked and was_trained:
        text.append("⟧")
    return text
