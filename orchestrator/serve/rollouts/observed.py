"""An engine whose answers are counted, and compared with those of candidates that answer in its shadow."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from ..engines.engine import Engine, Generation, Piece
from .numbers import Agreement, Choices, Numbers

_log = logging.getLogger("ray.serve")

SHADOWS_AT_ONCE = 16
"""More are left out: comparisons must not hold up what clients wait for."""

Pin = Callable[[str], AbstractContextManager[None]]


def _not_pinned(key: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Watch:
    """The numbers of one rollout in this replica."""

    candidate_key: str
    stable_key: str | None
    candidate: Numbers = field(default_factory=Numbers)
    stable: Numbers = field(default_factory=Numbers)
    shadow: Agreement = field(default_factory=Agreement)


@dataclass
class Answered:
    """The tokens of one answer, with what is told of it."""

    tokens: list[tuple[int, float]] = field(default_factory=list)
    num_tokens: int = 0
    first_s: float | None = None
    is_whole: bool = False
    vectors: tuple[tuple[float, ...], ...] = ()
    """What it is in the place of tokens, of a base that embeds."""
    choices: tuple[Choices, ...] = ()
    """What it is in the place of tokens, of a base that classifies, tags or finds: those of each text."""

    def compare(self, other: Answered, into: Agreement) -> None:
        """Notes how far another answer to the same agrees."""
        if self.vectors:
            into.count_vectors(self.vectors, other.vectors)
        elif self.choices:
            into.count_choices(self.choices, other.choices)
        else:
            into.count(self.tokens, other.tokens)

    def take(self, piece: Piece, since: float) -> None:
        if self.first_s is None and piece.num_tokens:
            self.first_s = time.monotonic() - since
        self.num_tokens += piece.num_tokens
        self.tokens += [(each.token, each.logprob) for each in piece.logprobs]
        self.is_whole = piece.finish_reason is not None


class Observed:
    """`engine`, with every `generate` counted; everything else is the engine's own."""

    def __init__(self, engine: Engine, pin: Pin = _not_pinned) -> None:
        self._engine = engine
        self.pin = pin
        """Keeps a key loaded within its context; a shadow may outlast the request that it belongs to."""
        self._shadows: set[asyncio.Task[Any]] = set()
        self.totals: dict[str, Numbers] = {}
        """Key ("" for the bare base) -> all that it answered in this replica."""
        self.watches: dict[str, Watch] = {}
        """The rollouts that are counted now, by their ids."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def watch(self, wanted: Mapping[str, tuple[str, str | None]]) -> dict[str, Watch]:
        """Counts for these rollouts from now on, and for no others; those that go on keep their numbers.

        Args:
            wanted: a rollout's id -> the keys of candidate and of the version that the alias names.
        """
        kept: dict[str, Watch] = {}
        for id, (candidate, stable) in wanted.items():
            kept[id] = self.watches.get(id) or Watch(candidate, stable)
            kept[id].stable_key = stable
        self.watches = kept
        return kept

    async def generate(self, request: Generation) -> AsyncGenerator[Piece, None]:
        """See `Engine.generate`."""
        shadow = request.shadow
        asked = replace(request, shadow=None)
        twin: asyncio.Task[Answered] | None = None
        if shadow is not None and len(self._shadows) < SHADOWS_AT_ONCE:
            # Both draw the same: their seeds are one, whatever it is.
            seed = random.getrandbits(62) if request.seed is None else request.seed
            scored = 0 if request.logprobs is None else request.logprobs
            asked = replace(asked, seed=seed, logprobs=scored)
            twin = asyncio.ensure_future(self._answer(replace(asked, adapter=shadow)))
            self._shadows.add(twin)
            twin.add_done_callback(self._shadows.discard)
        answer, began, failed = Answered(), time.monotonic(), False
        try:
            async with aclosing(self._engine.generate(asked)) as pieces:
                async for piece in pieces:
                    answer.take(piece, began)
                    yield piece if request.logprobs == asked.logprobs else replace(piece, logprobs=())
        except Exception:
            failed = True
            raise
        finally:
            if failed or answer.is_whole:
                self._count(request.adapter, time.monotonic() - began, answer, failed=failed)
            if twin is not None:
                self._follow_up(twin, answer, request.adapter, shadow)

    async def _answer(self, request: Generation) -> Answered:
        answer, began = Answered(), time.monotonic()
        with self.pin(str(request.adapter)):
            async with aclosing(self._engine.generate(request)) as pieces:
                async for piece in pieces:
                    answer.take(piece, began)
        return answer

    def _count(self, adapter: str | None, seconds: float, answer: Answered, *, failed: bool) -> None:
        numbers = [self.totals.setdefault(adapter or "", Numbers())]
        for watch in self.watches.values():
            if adapter == watch.candidate_key:
                numbers.append(watch.candidate)
            elif adapter == watch.stable_key:
                numbers.append(watch.stable)
        for each in numbers:
            each.count(seconds, answer.num_tokens, answer.first_s, failed=failed)

    def _follow_up(
        self, twin: asyncio.Task[Answered], theirs: Answered, stable: str | None, candidate: str | None
    ) -> None:
        """Compares once the shadow has ended too; a client that left ends it."""
        if not theirs.is_whole:
            twin.cancel()
            return
        task = asyncio.ensure_future(self._compare(twin, theirs, stable, candidate))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _compare(
        self, twin: asyncio.Task[Answered], theirs: Answered, stable: str | None, candidate: str | None
    ) -> None:
        try:
            ours = await twin
        except Exception as error:
            _log.warning("a shadow answer failed: %s", error)
            ours = None
        for watch in self.watches.values():
            if (watch.candidate_key, watch.stable_key) == (candidate, stable):
                if ours is None:
                    watch.shadow.errors += 1
                else:
                    theirs.compare(ours, watch.shadow)
