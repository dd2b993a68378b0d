"""Task heads whose answers are counted, and compared with a candidate's, as `observed.Observed` does it for engines."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, TypeVar

from ..engines.engine import AdapterRefused
from ..engines.heads import TERMS, Classified, Embedded, Found, Input, NoTokens, Tagged, Terms, TooLong
from .numbers import Choices
from .observed import SHADOWS_AT_ONCE, Answered, Observed

_OF_THE_REQUEST = (TooLong, NoTokens, AdapterRefused)
"""Errors that say nothing of whoever answers."""

Answer = TypeVar("Answer", Embedded, Classified, Tagged, Found)


class ObservedHeads(Observed):
    """`heads`, with every call counted as one request of the tokens that were read; everything else is the heads' own.

    What a candidate chooses for each text is compared with what clients get: labels, entities and best spans, each
    with the logarithm of its probability. Of vectors it is their cosine that is noted.
    """

    def __init__(self, heads: Any) -> None:
        super().__init__(heads)

    async def embed(
        self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS
    ) -> list[Embedded]:
        """See `Heads.embed`."""
        return await self._counted(lambda key: self._heads.embed(inputs, key, terms), adapter, terms)

    async def classify(
        self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS
    ) -> list[Classified]:
        """See `Heads.classify`."""
        return await self._counted(lambda key: self._heads.classify(inputs, key, terms), adapter, terms)

    async def tag(self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS) -> list[Tagged]:
        """See `Heads.tag`."""
        return await self._counted(lambda key: self._heads.tag(inputs, key, terms), adapter, terms)

    async def find(
        self, questions: Sequence[tuple[str, str]], adapter: str | None, top: int, terms: Terms = TERMS
    ) -> list[Found]:
        """See `Heads.find`."""
        return await self._counted(lambda key: self._heads.find(questions, key, top, terms), adapter, terms)

    @property
    def _heads(self) -> Any:
        return self._engine

    async def _counted(
        self, ask: Callable[[str | None], Awaitable[list[Answer]]], adapter: str | None, terms: Terms
    ) -> list[Answer]:
        shadow, twin = terms.shadow, None
        if shadow is not None and len(self._shadows) < SHADOWS_AT_ONCE:
            twin = asyncio.ensure_future(self._shadowed(ask, shadow))
            self._shadows.add(twin)
            twin.add_done_callback(self._shadows.discard)
        began, whole, failed = time.monotonic(), Answered(), False
        try:
            answers = await ask(adapter)
            whole = _whole(answers)
            return answers
        except _OF_THE_REQUEST:
            raise
        except Exception:
            failed = True
            raise
        finally:
            if failed or whole.is_whole:
                self._count(adapter, time.monotonic() - began, whole, failed=failed)
            if twin is not None:
                self._follow_up(twin, whole, adapter, shadow)

    async def _shadowed(self, ask: Callable[[str | None], Awaitable[list[Answer]]], key: str) -> Answered:
        with self.pin(key):
            return _whole(await ask(key))


def _whole(answers: Sequence[Embedded | Classified | Tagged | Found]) -> Answered:
    """What was chosen for each text, with its log-probability."""
    return Answered(
        num_tokens=sum(each.num_tokens for each in answers),
        is_whole=True,
        vectors=tuple(each.vector for each in answers if isinstance(each, Embedded)),
        choices=tuple(_choices(each) for each in answers if not isinstance(each, Embedded)),
    )


def _choices(answer: Classified | Tagged | Found) -> Choices:
    match answer:
        case Classified():
            said: list[tuple[Hashable, float]] = [answer.scores[0]]
        case Tagged():
            said = [((each.label, each.start, each.end), each.score) for each in answer.entities]
        case Found():
            said = [((each.start, each.end), each.score) for each in answer.spans[:1]]
    return {choice: math.log(max(score, 1e-30)) for choice, score in said}
