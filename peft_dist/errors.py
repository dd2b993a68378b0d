"""What a user of peft_dist can do wrong. One message each: where, what value, the rule, the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftDistError(Exception):
    """Root of every error that a user of this package can cause."""


class AdapterWarning(UserWarning):
    """What of a config or of an adapter will not do what its user may expect."""


class ConfigError(PeftDistError, ValueError):
    """A config that contradicts itself, or asks for what this version does not do."""


class TypelessError(ConfigError, TypeError):
    """A file that names no method."""


class TaskError(ConfigError, KeyError):
    """A prompt method's config without a task, or with none of the six."""

    __str__ = Exception.__str__


class TakenError(PeftDistError, KeyError):
    """A method's name or prefix that another method has."""

    __str__ = Exception.__str__


class TargetError(PeftDistError, ValueError):
    """Targets that match nothing, or match a layer that a method cannot adapt."""


class ContainerError(TargetError, TypeError):
    """A module that is never called, named where one that is called must be."""


class AdapterError(PeftDistError, ValueError):
    """An adapter's name that is unknown, taken or malformed, or an adapter in the wrong state."""


class UntrainableError(AdapterError, RuntimeError):
    """An adapter that was saved for inference alone, in training."""


class RowsError(PeftDistError, ValueError):
    """Rows that do not fit the input of a layer, or name an adapter that is not there."""


class BaseLayerError(PeftDistError, ValueError):
    """A frozen layer that cannot be read or changed as asked."""


class ShardingError(PeftDistError, RuntimeError):
    """A base that cannot be partitioned, or a partitioned tensor that cannot be reached, as asked."""


class OptimizerError(PeftDistError, ValueError):
    """AdapterOptimizer used against its rules, or given a state that is not this one's."""


class CheckpointError(PeftDistError, ValueError):
    """A saved adapter that is missing, damaged, of another form, or that does not fit the model."""


class MismatchError(CheckpointError, RuntimeError):
    """Saved tensors of other shapes or names than the model's; torch's own error for it is a RuntimeError."""


class MergeError(PeftDistError, ValueError):
    """An adapter that cannot be merged or unmerged, or not now."""


class ConversionError(PeftDistError, TypeError):
    """An adapter that cannot be said in another method's form."""


class BaseModelError(PeftDistError, OSError):
    """A base model that is missing, damaged, unknown, or not allowed to load."""


def closest(word: str, choices: Iterable[str], limit: int = 1) -> list[str]:
    """The `limit` choices that are nearest to `word` in spelling, best first; none where nothing is near."""
    return difflib.get_close_matches(word, list(choices), n=limit, cutoff=0.55)


def suggest(word: str, choices: Iterable[str]) -> str:
    """` Closest: 'x'.`, or nothing where nothing is near."""
    near = closest(word, choices)
    return f" Closest: {near[0]!r}." if near else ""
