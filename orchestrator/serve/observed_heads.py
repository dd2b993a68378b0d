"""Task heads whose answers are counted, as `observed.Observed` counts those of an engine."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from .engine import AdapterRefused
from .heads import Classified, Embedded, Found, Input, NoTokens, Tagged, TooLong
from .observed import Observed

_OF_THE_REQUEST = (TooLong, NoTokens, AdapterRefused)
"""Errors that say nothing of whoever answers."""

Answer = TypeVar("Answer", Embedded, Classified, Tagged, Found)


class ObservedHeads(Observed):
    """`heads`, with every call counted as one request; everything else is the heads' own.

    What has no tokens of its own counts those that it read. A candidate answers no requests of others in its shadow:
    rollouts of task heads share requests out, and compare rates of errors and latencies.
    """

    def __init__(self, heads: Any) -> None:
        super().__init__(heads)

    async def embed(self, inputs: Sequence[Input], adapter: str | None, queue: str = "") -> list[Embedded]:
        """See `Heads.embed`."""
        return await self._counted(adapter, self._heads.embed(inputs, adapter, queue))

    async def classify(
        self, inputs: Sequence[Input], adapter: str | None, queue: str = ""
    ) -> list[Classified]:
        """See `Heads.classify`."""
        return await self._counted(adapter, self._heads.classify(inputs, adapter, queue))

    async def tag(self, inputs: Sequence[Input], adapter: str | None, queue: str = "") -> list[Tagged]:
        """See `Heads.tag`."""
        return await self._counted(adapter, self._heads.tag(inputs, adapter, queue))

    async def find(
        self, questions: Sequence[tuple[str, str]], adapter: str | None, top: int, queue: str = ""
    ) -> list[Found]:
        """See `Heads.find`."""
        return await self._counted(adapter, self._heads.find(questions, adapter, top, queue))

    @property
    def _heads(self) -> Any:
        return self._engine

    async def _counted(self, adapter: str | None, call: Awaitable[list[Answer]]) -> list[Answer]:
        began, tokens, failed = time.monotonic(), 0, False
        try:
            answers = await call
        except _OF_THE_REQUEST:
            raise
        except Exception:
            failed = True
            raise
        else:
            tokens = sum(answer.num_tokens for answer in answers)
            return answers
        finally:
            if failed or tokens:
                self._count_request(adapter, time.monotonic() - began, tokens, failed=failed)
