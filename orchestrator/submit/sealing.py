"""A small message under a key that is used once: HMAC-SHA256 in counter mode, then HMAC-SHA256 over all of
it.

The standard library has no other cipher, and a job opens its secrets before it knows what else is installed.
Both ends run this file. A key must never seal two messages.
"""

from __future__ import annotations

import hashlib
import hmac
import json

KEY_BYTES = 32
_TAG_BYTES = 32


def seal(values: dict[str, str], key: bytes) -> bytes:
    """`values` as bytes that only `key` (32 bytes, never used before) opens."""
    plain = json.dumps(values).encode()
    hidden = _xor(plain, key)
    return _tag(hidden, key) + hidden


def unseal(sealed: bytes, key: bytes) -> dict[str, str]:
    """What was sealed. Raises ValueError where the bytes or the key are not those."""
    tag, hidden = sealed[:_TAG_BYTES], sealed[_TAG_BYTES:]
    if not hmac.compare_digest(tag, _tag(hidden, key)):
        raise ValueError("the envelope was sealed with another key, or changed on its way")
    return json.loads(_xor(hidden, key))


def _xor(data: bytes, key: bytes) -> bytes:
    stream = b"".join(_mac(key, b"stream", block) for block in range(len(data) // _TAG_BYTES + 1))
    return bytes(a ^ b for a, b in zip(data, stream, strict=False))


def _tag(hidden: bytes, key: bytes) -> bytes:
    return hmac.digest(_mac(key, b"tag", 0), hidden, hashlib.sha256)


def _mac(key: bytes, purpose: bytes, block: int) -> bytes:
    return hmac.digest(key, purpose + block.to_bytes(8, "big"), hashlib.sha256)
