"""Whether a run can go on with a job whose keys changed."""

from __future__ import annotations

from ..errors import RunError
from ..objects import join
from ..spec.canonical import changed_keys, keys_that_bar_resume, load_stored
from ..spec.job import JobSpec
from ..spec.rules import accumulation
from .record import RunRecord

TRAINS_ON = ("training.num_epochs", "training.max_steps")
"""Keys that let a run which has ended train further."""
_DATA = "the data's content"


def changes(record: RunRecord, spec: JobSpec, data_hash: str) -> list[str]:
    """The dotted keys that differ, and the data where its content does."""
    keys = changed_keys(_stored_spec(record), spec)
    return keys + ([_DATA] if record.data_hash != data_hash else [])


def name_taken(record: RunRecord, spec: JobSpec, changed: list[str]) -> RunError:
    """What to say where a name has a run of another job: the keys that differ, and how to go on."""
    if fixed := _fixed(record, spec, changed):
        resume = f"; with --resume it goes on once {', '.join(fixed)} {_be(fixed)} as before"
    else:
        resume = ", or go on with it as it is now: --resume"
    return RunError(
        f"the name '{record.name}' has a run of another job, '{record.id}': {_listed(changed)}.",
        hint=f"Start another run beside it: --new{resume}.",
    )


def check_may_resume(record: RunRecord, spec: JobSpec, changed: list[str]) -> None:
    """Raises RunError where a changed key would make another adapter of the run."""
    if fixed := _fixed(record, spec, changed):
        raise RunError(
            f"run '{record.id}' cannot go on: {_listed(fixed)}, which would make another adapter of it.",
            hint="May change: epochs and steps, resources, cadences, retry, deploy. Else start another run:"
            " --new.",
        )
    before, now = accumulation(_stored_spec(record))[1], accumulation(spec)[1]
    if before != now:
        raise RunError(
            f"run '{record.id}' cannot go on: its global batch is {before} rows, and would become {now}.",
            hint=f"Set training.global_batch_size: {before}, or start another run: --new.",
        )


def is_below(key: str, parents: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of `parents` or below one."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _fixed(record: RunRecord, spec: JobSpec, changed: list[str]) -> list[str]:
    """Those of the changed keys with which the run cannot go on."""
    bars = keys_that_bar_resume(_stored_spec(record), spec)
    return bars + ([_DATA] if _DATA in changed else [])


def _stored_spec(record: RunRecord) -> JobSpec:
    return load_stored(record.spec_yaml, join(record.url, "spec.yaml"))


def _listed(changed: list[str]) -> str:
    return f"{', '.join(changed)} {'differs' if len(changed) == 1 else 'differ'}"


def _be(keys: list[str]) -> str:
    return "is" if len(keys) == 1 else "are"
