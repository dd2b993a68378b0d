"""Secrets on their way into a job.

They are read when the job is submitted, sealed under a key that is used once, and left in the cluster's
package store under a name that nobody can guess. The job gets name and key in one environment variable; its
first act (`bootstrap.py`) is to take the envelope out of the store and delete it. Nothing else ever holds the
values: not the job's record (whose `env_vars` Ray hands out in clear), its command line, its log, the stored
spec, the files of the runtime environment (the package belongs to none, so no node unpacks it), nor a backup
of the head's state.

Who can still read them: whoever may run code on the cluster while the job waits to start, since such code
reads both the job's record and the store; and, while the job runs, those users of its nodes who may read its
processes' memory. Ray knows one token and no users, so no scheme could keep such a reader out. Once opened,
name and key are worthless. A job that never starts leaves its envelope for ten minutes: the store drops what
no job refers to.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from .sealing import KEY_BYTES, seal

VARIABLE = "RAYPEFT_ENVELOPE"


@dataclass(frozen=True)
class Envelope:
    """A sealed package for the store, and what opens it."""

    package: str
    content: bytes = field(repr=False)
    key: str = field(repr=False)

    @property
    def reference(self) -> str:
        """The value of `RAYPEFT_ENVELOPE`: where it lies, and its one-time key."""
        return f"{self.package}:{self.key}"


def close_envelope(values: Mapping[str, str]) -> Envelope:
    """Seals `values` under a new key."""
    key = secrets.token_bytes(KEY_BYTES)
    # The store takes only names that end like a package; it never looks inside.
    return Envelope(f"raypeft_{secrets.token_hex(16)}.zip", seal(dict(values), key), key.hex())
