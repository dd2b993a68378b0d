"""Tokens to text while they come: nothing is given out that a later token may change, nor any part of a stop
string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to, as long as the rest is missing."""


class TextStream:
    """The text of one sequence, given out piece by piece.

    Args:
        decode: token ids to text; special tokens give nothing.
        stop: strings at which the text ends; they are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        # Decoding begins a few tokens back: sentencepiece drops the space before the first token it sees.
        self._context, self._decoded = 0, 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes one token; returns the text that has become final, "" where none has."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._decoded])
        now = self._decode(self._ids[self._context :])
        if now.endswith(_UNFINISHED) or len(now) <= len(before):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """The rest, once no more tokens come: also what might have begun a stop string."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._context : self._decoded])
        now = self._decode(self._ids[self._context :])
        self._decoded = len(self._ids)
        released = self._release(now[len(before) :])
        if self.stopped:
            return released
        held, self._held = self._held, ""
        return released + held

    def _release(self, new: str) -> str:
        text = self._held + new
        found = min((at for at in (text.find(stop) for stop in self._stop) if at >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins, less than all of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
