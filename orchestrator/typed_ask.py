"""Asking an endpoint whose base does not generate: labels, entities, spans and vectors, and how a person reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .errors import ServeError

Row = Mapping[str, Any]

_SHOWN = 5
"""Labels of a text that are shown."""
_NUMBERS = 8
"""Numbers of a vector that are shown."""


def route_and_body(task: str, question: str, context: str | None) -> tuple[str, dict[str, Any]] | None:
    """The route below `/v1` and what is asked there; None for a task that generates.

    Args:
        context: the text that answers a question, or the second of two texts.

    Raises:
        ServeError: the task needs a context.
    """
    match task:
        case "SEQ_CLS":
            pair = {"text": question, "text_pair": context}
            return "classify", {"input": question if context is None else pair}
        case "TOKEN_CLS":
            return "token-classify", {"input": question}
        case "FEATURE_EXTRACTION":
            return "embeddings", {"input": question}
        case "QUESTION_ANS":
            if context is None:
                raise ServeError(
                    "it answers questions out of a text, and there is none.",
                    where="raypeft ask",
                    hint='Give the text, too: raypeft ask NAME "QUESTION" --context "TEXT"',
                )
            return "question-answering", {"question": question, "context": context}
    return None


def readable(row: Row) -> str:
    """An answer's row as lines of text."""
    return _READERS[str(row.get("object"))](row)


def _classes(row: Row) -> str:
    scores = row["scores"][:_SHOWN]
    width = max(len(each["label"]) for each in scores)
    return "\n".join(f"{each['label']:{width}}  {each['score']:.3f}" for each in scores)


def _entities(row: Row) -> str:
    found = row["entities"]
    if not found:
        return "(no entities)"
    width = max(len(each["label"]) for each in found)
    return "\n".join(f"{each['label']:{width}}  {each['score']:.3f}  {each['text']}" for each in found)


def _spans(row: Row) -> str:
    found = row["answers"]
    if not found:
        return "(no answer in the text)"
    return "\n".join(
        f"{each['text'] or '(no answer in the text)'}  ({each['score']:.3f}, characters {each['start']} to "
        f"{each['end']})"
        for each in found
    )


def _vector(row: Row) -> str:
    vector = row["embedding"]
    more = " ..." if len(vector) > _NUMBERS else ""
    return f"{len(vector)} numbers: {' '.join(f'{number:.4f}' for number in vector[:_NUMBERS])}{more}"


_READERS: dict[str, Callable[[Row], str]] = {
    "classification": _classes,
    "token_classification": _entities,
    "question_answering": _spans,
    "embedding": _vector,
}
