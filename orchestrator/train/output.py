"""What a worker prints: into its log in the run's folder, by way of the driver, and nowhere with a secret in
it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator

HIDDEN = "***"


def without_secrets(text: str, secrets: Collection[str]) -> str:
    """The text with every secret value replaced by stars."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, HIDDEN)
    return text


@contextlib.contextmanager
def captured(send: Callable[[str], None], secrets: Collection[str] = ()) -> Iterator[None]:
    """Within the context all output of this process, C libraries' too, also goes to `send`, line by line.

    File descriptors 1 and 2 lead into a pipe; a thread passes what comes out, freed of secrets, to `send` and
    on to where it went before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    outward, kept = os.dup(1), (os.dup(1), os.dup(2))
    reading, writing = os.pipe()
    for descriptor in (1, 2):
        os.dup2(writing, descriptor)
    os.close(writing)
    thread = threading.Thread(target=_pass_on, args=(reading, outward, send, secrets), daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        # a child process may hold the pipe open for longer than its parent cares
        thread.join(timeout=2)


def _pass_on(reading: int, outward: int, send: Callable[[str], None], secrets: Collection[str]) -> None:
    rest = b""
    with os.fdopen(reading, "rb", buffering=0) as source:
        while chunk := source.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            if lines:
                _write(b"\n".join([*lines, b""]), outward, send, secrets)
    if rest:
        _write(rest + b"\n", outward, send, secrets)
    os.close(outward)


def _write(raw: bytes, outward: int, send: Callable[[str], None], secrets: Collection[str]) -> None:
    text = without_secrets(raw.decode(errors="replace"), secrets)
    send(text)
    os.write(outward, text.encode())
