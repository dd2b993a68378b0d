"""Reading the secrets that a job names: `{HF_TOKEN: env}` or `{HF_TOKEN: file:/path}`, never the value."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import SpecError
from .load import LoadedJob


def read_secrets(job: LoadedJob) -> dict[str, str]:
    """Name -> value, read now, where the command was typed.

    Raises:
        SpecError: a variable is not set or empty, or a file cannot be read.
    """
    return {name: _value(job, name, source) for name, source in job.spec.secrets.items()}


def _value(job: LoadedJob, name: str, source: str) -> str:
    where = job.where(f"secrets.{name}")
    if source == "env":
        value = os.environ.get(name, "")
        if not value:
            raise SpecError(
                f"the environment variable {name} is not set.", where=where, hint=f"Set it: export {name}=..."
            )
        return value
    path = Path(source.removeprefix("file:")).expanduser()
    try:
        value = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SpecError(
            f"the file '{path}' cannot be read: {reason}.",
            where=where,
            hint="Name a file with the secret alone.",
        ) from None
    if not value:
        raise SpecError(
            f"the file '{path}' is empty.", where=where, hint="Name a file with the secret alone."
        )
    return value
