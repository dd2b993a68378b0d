"""A sequence that an engine generates: what is known of it from when it was asked until it is answered, its next token,
and the way of its pieces to whoever waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from peft_dist.packed_rows import Blend, Reads
from peft_dist.rows import BASE

from .apart import Apart
from .engine import Generation, Piece, TokenLogprob
from .loaded_adapters import Adapter
from .sampling import Sampler, likeliest_of, logprob_of
from .text import TextStream


@dataclass(eq=False)
class Stream:
    """Pieces on their way from the engine's thread to one request, in the loop that waits for them."""

    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | BaseException] = field(default_factory=asyncio.Queue)


@dataclass(eq=False)
class LiveSequence:
    """One request.

    Args:
        adapter: that serves it, and stays for it; None: the bare base.

    Raises:
        ValueError: its adapter has tasks, and the request names none of them.
    """

    name: str
    request: Generation
    adapter: Adapter | None
    stream: Stream
    text: TextStream
    ids: list[int] = field(init=False)
    """The prompt and what was generated, without virtual tokens."""
    choice: str | Blend = field(init=False)
    """What packed rows know its adapter by."""
    reads: Reads = field(init=False)
    """What its adapter's methods read of it: its task."""
    queue: str = field(init=False)
    """Whose turn it takes."""
    sampler: Sampler | None = None
    num_generated: int = 0
    runs: bool = False
    apart: Apart | None = None
    """Itself, where it runs in rows of its own."""

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)
        self.choice = self.adapter.choice if self.adapter else BASE
        self.reads = self.adapter.reads_of(self.request.task) if self.adapter else ()
        self.queue = self.request.queue or self.request.adapter or ""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt as it is run, with places for its adapter's virtual tokens."""
        virtual = self.adapter.virtual_tokens if self.adapter else 0
        return (0,) * virtual + self.request.prompt_ids


class Outbox:
    """What a step gives to streams, sent in one call of each loop. One thread uses it."""

    def __init__(self) -> None:
        self._items: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Piece | BaseException]]] = {}

    def give(self, stream: Stream, item: Piece | BaseException) -> None:
        """Puts it in."""
        self._items.setdefault(stream.loop, []).append((stream, item))

    def send(self) -> None:
        """Everything that was put in."""
        given, self._items = self._items, {}
        for loop, items in given.items():
            with contextlib.suppress(RuntimeError):  # closed in between: nobody listens
                loop.call_soon_threadsafe(_deliver, items)


Token = tuple[int, TokenLogprob | None]
"""A token, with its log-probability where the request asks for it."""


def next_tokens(sequences: Sequence[LiveSequence], scores: Tensor) -> list[Token | None]:
    """Each one's next token; None where its scores are not finite, so that none can be chosen by them.

    Args:
        scores: (sequences, vocabulary), fp32.
    """
    if not sequences:
        return []
    chosen: list[Token | None] = []
    for row, (sequence, token) in enumerate(zip(sequences, likeliest_of(scores), strict=True)):
        sampler = sequence.sampler
        assert sampler is not None
        if token is not None and not sampler.takes_the_likeliest:
            token = sampler.choose(scores[row], sequence.ids)
        if token is None:
            chosen.append(None)
            continue
        note = None
        if sequence.request.logprobs is not None:
            note = logprob_of(scores[row].log_softmax(-1), token, sequence.request.logprobs)
        chosen.append((token, note))
    return chosen


def _deliver(items: list[tuple[Stream, Piece | BaseException]]) -> None:
    for stream, item in items:
        stream.pieces.put_nowait(item)
