"""The first act of a job that was given secrets: `python -m orchestrator.submit.bootstrap ARGUMENT...`.

Takes the envelope out of the cluster's store, deletes it there, puts its values into this process's
environment (not into one that `/proc` shows: they are set after the process began) and goes on as `python -m
orchestrator ARGUMENT...`.
"""

from __future__ import annotations

import os
import runpy
import sys

from ray._raylet import GcsClient  # type: ignore[attr-defined]

from ..processes import hear_interrupts
from .envelope import VARIABLE
from .sealing import unseal


def open_envelope(reference: str, gcs_address: str) -> dict[str, str]:
    """The secrets behind `PACKAGE:KEY`; the store has them no longer afterwards.

    Raises:
        LookupError: it was opened before, or the job started later than the store keeps it (ten minutes).
    """
    package, _, key = reference.partition(":")
    store, name = GcsClient(address=gcs_address), f"gcs://{package}".encode()
    sealed = store.internal_kv_get(name, None)
    if sealed is None:
        raise LookupError(
            "the job's secrets are no longer in the cluster's store: it started more than ten minutes after "
            "it was submitted, or was started twice. Submit it again."
        )
    store.internal_kv_del(name, False, None)
    return unseal(sealed, bytes.fromhex(key))


def main(arguments: list[str]) -> None:
    """Opens the envelope and becomes the command."""
    hear_interrupts()
    try:
        os.environ.update(open_envelope(os.environ.pop(VARIABLE), os.environ["RAY_ADDRESS"]))
    except LookupError as error:
        sys.exit(f"secrets: {error}")
    sys.argv = ["raypeft", *arguments]
    runpy.run_module("orchestrator", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
