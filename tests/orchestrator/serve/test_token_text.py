"""Tokens beside the text that they make: where each begins, and which of them a text has reached."""

from __future__ import annotations

import random

import pytest

from orchestrator.serve.engines.engine import TokenLogprob
from orchestrator.serve.engines.token_text import Characters, TakenTokens
from orchestrator.serve.routes.replies import Reply


def begins(pieces: list[bytes]) -> list[int]:
    characters = Characters()
    return [characters.begin(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        ([b"ab", b"c"], [0, 2]),
        (["é".encode()[:1], "é".encode()[1:], b"x"], [0, 0, 1]),
        (["€".encode()[:1], "€".encode()[1:2], "€".encode()[2:] + b"a", b"b"], [0, 0, 0, 2]),
        ([b"\xe4", b"x", b"y"], [0, 1, 2]),
        ([b"a", b"", b"b"], [0, 1, 1]),
    ],
    ids=["plain", "a letter of two tokens", "a letter of three", "a broken letter", "a special token"],
)
def test_where_tokens_begin(pieces: list[bytes], wanted: list[int]) -> None:
    assert begins(pieces) == wanted


def test_tokens_begin_where_their_letter_stands_in_the_text() -> None:
    draw = random.Random(3)
    for _ in range(200):
        text = "".join(draw.choices("aß€𝄞 ", k=12))
        data = text.encode()
        cuts = sorted(draw.sample(range(1, len(data)), min(6, len(data) - 1)))
        starts = [0, *cuts]
        pieces = [data[a:b] for a, b in zip(starts, [*cuts, len(data)], strict=True)]
        # The letter that holds the byte with which a piece begins.
        of_byte = [index for index, letter in enumerate(text) for _ in letter.encode()]
        assert begins(pieces) == [of_byte[start] for start in starts]


def test_offsets_of_a_completion_count_letters() -> None:
    words = [b"a", "€".encode()[:2], "€".encode()[2:], b"b"]
    reply = Reply(chat=False, model="m", fingerprint="f", token_bytes=words.__getitem__)
    tokens = [TokenLogprob(index, -1.0, ()) for index in range(4)]
    first = reply.piece(0, "a", None, tokens[:2])["choices"][0]["logprobs"]["text_offset"]
    last = reply.piece(0, "€b", "stop", tokens[2:])["choices"][0]["logprobs"]["text_offset"]
    assert first + last == [0, 1, 1, 2]


def test_what_a_stop_string_cut_off_is_not_shown_behind_a_broken_letter() -> None:
    words = [b"a", b"\xe4", b"STOP"]
    taken = TakenTokens(words.__getitem__)
    tokens = [TokenLogprob(index, -1.0, ()) for index in range(3)]
    assert taken.push("a\N{REPLACEMENT CHARACTER}", tokens, "stop") == tokens[:2]
