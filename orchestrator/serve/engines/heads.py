"""What an endpoint asks of a base with a task's head: labels, entities, spans or vectors of texts, by any of the
adapters that were loaded onto it. No torch here: the HTTP side is tested against any heads.

A base of encoder and decoder generates, and is an `Engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from .engine import Figures

HeadTask = Literal["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]


ROUTES: dict[HeadTask, str] = {
    "FEATURE_EXTRACTION": "/v1/embeddings",
    "SEQ_CLS": "/v1/classify",
    "TOKEN_CLS": "/v1/token-classify",
    "QUESTION_ANS": "/v1/question-answering",
}
GENERATION = "/v1/completions"


def route_of(task: str) -> str:
    """The route that a base answers which is loaded for a task."""
    return next((route for each, route in ROUTES.items() if each == task), GENERATION)


class TooLong(Exception):
    """A text that the base does not take.

    Args:
        index: its place among those that were asked.
        num_tokens, max_tokens: what it has, and what there may be.
    """

    def __init__(self, index: int, num_tokens: int, max_tokens: int) -> None:
        super().__init__(f"text {index} has {num_tokens} tokens, and {max_tokens} may be")
        self.index, self.num_tokens, self.max_tokens = index, num_tokens, max_tokens


class NoTokens(Exception):
    """A text of no tokens: nothing can be said of it.

    Args:
        index: its place among those that were asked.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"text {index} has no tokens")
        self.index = index


@dataclass(frozen=True)
class Input:
    """One text, or one that comes with another (a pair to compare); or its token ids, special ones included."""

    text: str = ""
    pair: str | None = None
    ids: tuple[int, ...] | None = None
    """In place of the texts."""


@dataclass(frozen=True)
class Embedded:
    """A vector of length 1, float32."""

    vector: tuple[float, ...]
    num_tokens: int


@dataclass(frozen=True)
class Classified:
    """Every label of the adapter with its probability, likeliest first."""

    scores: tuple[tuple[str, float], ...]
    num_tokens: int


@dataclass(frozen=True)
class Entity:
    """A stretch of the text, `text[start:end]` in characters, with its label and the label's probability."""

    label: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Tagged:
    """The entities of a text in their order; words that are none are left out."""

    entities: tuple[Entity, ...]
    num_tokens: int


@dataclass(frozen=True)
class Span:
    """An answer, `context[start:end]` in characters; empty: there is none in the context."""

    start: int
    end: int
    score: float
    """Its probability."""


@dataclass(frozen=True)
class Found:
    """Answers, best first."""

    spans: tuple[Span, ...]
    num_tokens: int


@dataclass(frozen=True)
class Terms:
    """On what terms a call is answered: `queue`, `shadow` and `task` as in `Generation`. `observed_heads` sees to a
    shadow, heads themselves pass it over."""

    queue: str = ""
    shadow: str | None = None
    task: int | None = None


TERMS = Terms()


class Heads(Protocol):
    """One base with one kind of head, and the adapters that were loaded onto it, each with labels of its own. Calls
    that come together are answered together, whatever their adapters. All methods may be called from any thread;
    `adapter` is a key given to `load`, or None for the bare base.

    A call that is cancelled leaves no work behind. Each of the four raises TooLong, NoTokens, EngineDead, and
    AdapterRefused where the bare base is asked and has no trained head.
    """

    @property
    def task(self) -> HeadTask:
        """What it answers: the one of the four calls below that may be made."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    async def embed(
        self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS
    ) -> list[Embedded]:
        """A vector each (FEATURE_EXTRACTION)."""

    async def classify(
        self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS
    ) -> list[Classified]:
        """Labels of whole texts (SEQ_CLS)."""

    async def tag(self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS) -> list[Tagged]:
        """Entities within texts (TOKEN_CLS)."""

    async def find(
        self, questions: Sequence[tuple[str, str]], adapter: str | None, top: int, terms: Terms = TERMS
    ) -> list[Found]:
        """At most `top` answers to each (question, context) (QUESTION_ANS)."""

    def virtual_tokens(self, adapter: str | None) -> int:
        """See `Engine.virtual_tokens`."""

    def num_tasks(self, adapter: str | None) -> int:
        """See `Engine.num_tasks`."""

    async def load(self, adapter: str, directory: Path) -> None:
        """See `Engine.load`."""

    async def combine(self, adapter: str, parts: Sequence[tuple[str, float]]) -> None:
        """See `Engine.combine`."""

    async def unload(self, adapter: str) -> None:
        """See `Engine.unload`."""

    def loaded(self) -> frozenset[str]:
        """See `Engine.loaded`."""

    def figures(self) -> Figures:
        """See `Engine.figures`."""

    def check(self) -> None:
        """See `Engine.check`."""

    def close(self) -> None:
        """See `Engine.close`."""
