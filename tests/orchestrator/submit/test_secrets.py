"""Secrets between the submitting machine and the job: sealed, opened once, in no representation."""

import pytest

from orchestrator.submit.envelope import close_envelope
from orchestrator.submit.sealing import KEY_BYTES, seal, unseal

VALUES = {"HF_TOKEN": "hf_planted-" + "x" * 100, "EMPTY": "", "TEXT": "schlüssel\n"}
KEY = bytes(range(KEY_BYTES))


def test_what_was_sealed_comes_back():
    assert unseal(seal(VALUES, KEY), KEY) == VALUES


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 1000])
def test_every_length_comes_back(length):
    assert unseal(seal({"A": "b" * length}, KEY), KEY) == {"A": "b" * length}


def test_nothing_of_it_can_be_read_without_the_key():
    sealed = seal(VALUES, KEY)
    assert b"planted" not in sealed and b"HF_TOKEN" not in sealed
    with pytest.raises(ValueError, match="another key"):
        unseal(sealed, bytes(KEY_BYTES))


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_changed_byte_is_seen(place):
    sealed = bytearray(seal(VALUES, KEY))
    sealed[place] ^= 1
    with pytest.raises(ValueError, match="changed on its way"):
        unseal(bytes(sealed), KEY)


def test_each_envelope_has_its_own_name_and_key():
    first, second = close_envelope(VALUES), close_envelope(VALUES)
    assert first.package != second.package and first.key != second.key and first.content != second.content
    assert unseal(first.content, bytes.fromhex(first.key)) == VALUES
    assert first.reference == f"{first.package}:{first.key}"


def test_an_envelope_shows_neither_key_nor_content():
    envelope = close_envelope(VALUES)
    assert envelope.key not in repr(envelope) and "content" not in repr(envelope)
