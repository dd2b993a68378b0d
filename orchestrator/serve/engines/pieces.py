"""What a new token adds to an answer."""

from __future__ import annotations

from collections.abc import Collection

from .engine import Piece, TokenLogprob
from .text import TextStream


def pieces_of(
    token: int,
    text: TextStream,
    eos_ids: Collection[int],
    notes: tuple[TokenLogprob, ...] = (),
    *,
    is_last: bool = False,
) -> list[Piece]:
    """The pieces that a token brings; the answer is at its end where the last of them has a finish reason.

    Args:
        text: of the answer so far; it takes the token.
        eos_ids: the tokens that end an answer.
        is_last: no more tokens may come.
    """
    if token in eos_ids:
        return [Piece(text.finish(), 1, "stop", notes)]
    new = text.push(token)
    if text.stopped:
        return [Piece(new, 1, "stop", notes)]
    piece = Piece(new, 1, None, notes)
    return [piece, cut_off(text)] if is_last else [piece]


def cut_off(text: TextStream) -> Piece:
    """The end of an answer that may have no more tokens: what was held back of its text."""
    rest = text.finish()
    return Piece(rest, 0, "stop" if text.stopped else "length")
