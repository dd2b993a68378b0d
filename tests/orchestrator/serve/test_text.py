"""Streamed text equals the text decoded at once, whatever the tokens' borders; stop strings never show."""

import pytest

from orchestrator.serve.engines.text import TextStream


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def run(text, stop=()):
    stream, pieces = TextStream(decode, stop), []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return "".join(pieces) + stream.finish(), pieces, stream


@pytest.mark.parametrize("text", ["", "plain", "naïve café", "日本語 and 🙂🙂", "a\nb\t ", "ends with é"])
def test_streamed_text_is_the_whole_text(text):
    assert run(text)[0] == text


def test_no_piece_shows_half_a_character():
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in run("日本語🙂")[1])


def test_a_broken_last_character_comes_out_at_the_end():
    stream = TextStream(decode)
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("aaab", ["aab"], "a"),
        ("x\n\ny", ["\n\n", "y"], "x"),
        ("first, second", ["second", "first"], ""),
        ("ends with EN", ["END"], "ends with EN"),
        ("日本語。終", ["。"], "日本語"),
    ],
)
def test_text_ends_before_a_stop_string(text, stop, left):
    got, pieces, stream = run(text, stop)
    assert got == left
    assert stream.stopped == (left != text)
    assert "".join(pieces) in left + text  # nothing was given out that had to be taken back


def test_pieces_come_as_early_as_they_can():
    _, pieces, _ = run("abcdef", ["xyz"])
    assert pieces == list("abcdef")
