"""What requests to the routes of task heads may say, and what answers look like. No transport."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..engines.heads import Classified, Embedded, Found, Input, Tagged
from .openai_api import Ask, Strict

MAX_INPUTS = 512
"""Texts of one request."""

Ids = Annotated[list[int], Field(min_length=1)]


class EmbeddingRequest(Ask):
    """POST /v1/embeddings, as OpenAI has it."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None

    @property
    def inputs(self) -> list[Input]:
        """One each."""
        if isinstance(self.input, str):
            return [Input(self.input)]
        if isinstance(self.input[0], int):
            return [Input(ids=tuple(token for token in self.input if isinstance(token, int)))]
        return [
            Input(each) if isinstance(each, str) else Input(ids=tuple(each))
            for each in self.input
            if not isinstance(each, int)
        ]


class Pair(Strict):
    """A text that is read together with another."""

    text: str
    text_pair: str


class ClassifyRequest(Ask):
    """POST /v1/classify."""

    input: str | Pair | Annotated[list[str | Pair], Field(min_length=1, max_length=MAX_INPUTS)]
    top_k: Annotated[int, Field(ge=1)] | None = None

    @property
    def inputs(self) -> list[Input]:
        """One each."""
        given = self.input if isinstance(self.input, list) else [self.input]
        return [Input(each) if isinstance(each, str) else Input(each.text, each.text_pair) for each in given]


class TokenClassifyRequest(Ask):
    """POST /v1/token-classify."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]

    @property
    def inputs(self) -> list[Input]:
        """One each."""
        return [Input(text) for text in ([self.input] if isinstance(self.input, str) else self.input)]


class Question(Strict):
    """A question and the text that answers it."""

    question: Annotated[str, Field(min_length=1)]
    context: Annotated[str, Field(min_length=1)]


class QuestionAnsweringRequest(Ask):
    """POST /v1/question-answering: one question at the top, or several as `input`."""

    question: Annotated[str, Field(min_length=1)] | None = None
    context: Annotated[str, Field(min_length=1)] | None = None
    input: Annotated[list[Question], Field(min_length=1, max_length=MAX_INPUTS)] | None = None
    top_k: Annotated[int, Field(ge=1, le=100)] = 1

    @property
    def questions(self) -> list[tuple[str, str]] | None:
        """Each with its context; None where the request says neither one nor several, or both."""
        single = self.question is not None and self.context is not None
        if single == (self.input is not None) or (self.input and (self.question or self.context)):
            return None
        if self.input is not None:
            return [(each.question, each.context) for each in self.input]
        return [(self.question or "", self.context or "")]


def embeddings(answers: Sequence[Embedded], encoding: str | None) -> list[dict[str, Any]]:
    """Rows of /v1/embeddings; base64 is of little-endian float32, as OpenAI writes it."""
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": _base64(answer.vector) if encoding == "base64" else list(answer.vector),
        }
        for index, answer in enumerate(answers)
    ]


def classes(answers: Sequence[Classified], top: int | None) -> list[dict[str, Any]]:
    """Rows of /v1/classify."""
    return [
        {
            "object": "classification",
            "index": index,
            "label": answer.scores[0][0],
            "score": answer.scores[0][1],
            "scores": [{"label": label, "score": score} for label, score in answer.scores[:top]],
        }
        for index, answer in enumerate(answers)
    ]


def entities(answers: Sequence[Tagged], inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """Rows of /v1/token-classify."""
    return [
        {
            "object": "token_classification",
            "index": index,
            "entities": [
                {
                    "label": each.label,
                    "score": each.score,
                    "start": each.start,
                    "end": each.end,
                    "text": asked.text[each.start : each.end],
                }
                for each in answer.entities
            ],
        }
        for index, (answer, asked) in enumerate(zip(answers, inputs, strict=True))
    ]


def spans(answers: Sequence[Found], questions: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of /v1/question-answering."""
    return [
        {
            "object": "question_answering",
            "index": index,
            "answers": [
                {
                    "text": context[each.start : each.end],
                    "score": each.score,
                    "start": each.start,
                    "end": each.end,
                }
                for each in answer.spans
            ],
        }
        for index, (answer, (_, context)) in enumerate(zip(answers, questions, strict=True))
    ]


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
