"""Several generations at once: their pieces in one stream, or each to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ..engines.engine import Engine, EngineDead, Generation, Piece

_BUFFERED = 8
"""Pieces of all choices that wait for a reader; beyond, choices wait with theirs."""

Numbered = tuple[int, Piece]


async def pieces(engine: Engine, generations: Sequence[Generation]) -> AsyncGenerator[Numbered, None]:
    """The pieces of all generations as they come, each with its generation's number; ends after the last end.

    Closed early, or where one fails, it cancels all.

    Raises:
        EngineDead: a generation broke off.
    """
    if len(generations) == 1:
        async with aclosing(engine.generate(generations[0])) as own:
            async for piece in own:
                yield 0, piece
                if piece.finish_reason is not None:
                    return
        raise EngineDead("the engine gave no end")
    ready: asyncio.Queue[Numbered | Exception] = asyncio.Queue(_BUFFERED)
    tasks = [
        asyncio.create_task(_feed(engine, number, generation, ready))
        for number, generation in enumerate(generations)
    ]
    try:
        running = len(tasks)
        while running:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
            running -= item[1].finish_reason is not None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(
    engine: Engine, number: int, generation: Generation, ready: asyncio.Queue[Numbered | Exception]
) -> None:
    try:
        async with aclosing(engine.generate(generation)) as own:
            async for piece in own:
                await ready.put((number, piece))
                if piece.finish_reason is not None:
                    return
        raise EngineDead("the engine gave no end")
    except Exception as error:
        await ready.put(error)
