"""Single tokens as text and bytes, and which tokens the text of an answer took: what log-probabilities are
shown with."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Any

from .engine import TokenLogprob

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""


class TokenBytes:
    """The bytes of each token of a tokenizer; "" for special tokens, which are not part of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._known: dict[int, bytes] = {}

    def __call__(self, token: int) -> bytes:
        """The bytes that a token adds to a text."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._read(token)
        return found

    def _read(self, token: int) -> bytes:
        if token in self._special:
            return b""
        symbol = self._tokenizer.convert_ids_to_tokens(token)
        if symbol is None:  # a row of the embedding that the tokenizer has no word for
            return b""
        if match := _BYTE_TOKEN.fullmatch(symbol):
            return bytes([int(match[1], 16)])
        if symbol.startswith(_SPACE):
            return symbol.replace(_SPACE, " ").encode()
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if "\N{REPLACEMENT CHARACTER}" in text and all(letter in _BYTES for letter in symbol):
            return bytes(_BYTES[letter] for letter in symbol)
        return text.encode()


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


_BYTES = _byte_letters()


def readable(data: bytes) -> str:
    """Bytes as text; those that are no text by themselves as OpenAI writes them, `bytes:\\xe2\\x82`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Characters:
    """Counts the characters of a text whose bytes come piece by piece; what is no UTF-8 is shown as U+FFFD, and
    counts as that."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._count = 0

    def begin(self, data: bytes) -> int:
        """Takes the next bytes; returns how many characters stand before the one that they begin or go on."""
        is_broken = bool(self._decoder.getstate()[0]) and bool(data) and not _goes_on(data[0])
        before = self._count + is_broken
        self._count += len(self._decoder.decode(data))
        return before


def _goes_on(byte: int) -> bool:
    """Whether UTF-8 has this byte within a character alone."""
    return byte & 0b1100_0000 == 0b1000_0000


class TakenTokens:
    """The tokens of one answer in step with its text: a token counts once text from where it begins was given
    out, so the end token, and what a stop string cut off, never do."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._bytes = token_bytes
        self._characters, self._given_out = Characters(), 0
        self._waiting: list[tuple[int, TokenLogprob]] = []

    def push(self, text: str, tokens: Sequence[TokenLogprob], reason: str | None) -> list[TokenLogprob]:
        """Takes a piece; returns the tokens that its text has reached."""
        self._given_out += len(text)
        for token in tokens:
            self._waiting.append((self._characters.begin(self._bytes(token.token)), token))
        if reason == "length":
            reached, self._waiting = self._waiting, []
        else:
            last = next((at for at, (begin, _) in enumerate(self._waiting) if begin >= self._given_out), None)
            last = len(self._waiting) if last is None else last
            reached, self._waiting = self._waiting[:last], self._waiting[last:]
        return [token for _, token in reached]
