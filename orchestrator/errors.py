"""Errors that a user reads: a code, one sentence, the place and the next step.

Every failure that a user can cause is a `RaypeftError`; the command line prints `str(error)` and exits with
`exit_code`, without a traceback. A bare Python exception that reaches the command line is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class RaypeftError(Exception):
    """`where: what the matter is. next step`, in one message.

    Args:
        problem: one sentence that names the thing, its value and the rule.
        where: `file:line`, a key, a run or an address; None where the sentence says it.
        hint: what to do next, a full sentence or a command.
    """

    code = "error"
    exit_code = 1

    def __init__(self, problem: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.where, self.hint = problem, where, hint

    def __str__(self) -> str:
        message = f"{self.where}: {self.problem}" if self.where else self.problem
        if not self.hint:
            return message
        end = "" if message.endswith((".", "!", "?", ":")) else "."  # another package's words have none
        return f"{message}{end} {self.hint}"

    def __reduce__(self):
        return _rebuild, (type(self), self.problem, self.where, self.hint)

    def to_dict(self) -> dict[str, str | None]:
        """The machine form, as `--json` prints it."""
        return {"code": self.code, "message": self.problem, "where": self.where, "hint": self.hint}


def _rebuild(cls: type[RaypeftError], problem: str, where: str | None, hint: str | None) -> RaypeftError:
    return cls(problem, where=where, hint=hint)


class SpecError(RaypeftError):
    """A job or cluster file that breaks a rule."""

    code, exit_code = "spec", 2


class ModelError(RaypeftError):
    """A base or an adapter that does not exist, is damaged or does not fit."""

    code = "model"


class HubError(ModelError):
    """A base that may be on a hub which does not answer."""


class DataError(RaypeftError):
    """A dataset that is absent, empty, unreadable or lacks a column."""

    code = "data"


class PlacementError(RaypeftError):
    """More than the cluster can give, now or ever."""

    code = "placement"


class ClusterError(RaypeftError):
    """A Ray cluster that does not answer, or is not what we need."""

    code = "cluster"


class StorageError(RaypeftError):
    """Storage that is read-only, full, absent or of a kind that cannot do what is asked."""

    code = "storage"
    may_pass = True
    """Whether the same may succeed a moment later."""


class RegistryError(RaypeftError):
    """An adapter name, version or alias that does not exist or may not be changed."""

    code = "registry"


class RunError(RaypeftError):
    """A run that cannot start or go on as asked (another spec under its name, done already, not there)."""

    code = "run"


class LeaseError(RunError):
    """A run that another driver writes: it cannot be taken, or was taken from this one."""


class TrainingError(RaypeftError):
    """A run that failed while it trained: NaN, a worker lost too often."""

    code = "training"


class NotFiniteError(TrainingError):
    """A loss or a gradient that is no number any more; the last good checkpoint stays."""


class OutOfTimeError(RaypeftError):
    """`retry.max_duration` is over; the run was saved first."""

    code, exit_code = "out_of_time", 124


class ServeError(RaypeftError):
    """An endpoint or a deployment that is not there or cannot be made."""

    code = "serve"


class Interrupted(RaypeftError):
    """Ctrl-C or a stop request; the run was saved first."""

    code, exit_code = "interrupted", 130


def rebuilt(said: Mapping[str, str | None]) -> RaypeftError:
    """The error that another process printed with `--json`: what `to_dict` gave, as an error of its class."""
    classes = {cls.code: cls for cls in RaypeftError.__subclasses__()}
    cls = classes.get(said.get("code") or "", RaypeftError)
    return cls(said.get("message") or "no message", where=said.get("where"), hint=said.get("hint"))


def first_line(error: BaseException) -> str:
    """What another package's error says, as far as it fits into one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def closest(word: str, choices: Iterable[str], limit: int = 1) -> list[str]:
    """The `limit` choices that are nearest to `word` in spelling, whatever the case, best first; none where nothing is
    near."""
    by_lower = {each.lower(): each for each in choices}
    near = difflib.get_close_matches(word.lower(), list(by_lower), n=limit, cutoff=0.55)
    return [by_lower[each] for each in near]
