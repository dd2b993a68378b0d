"""The gate: comparisons over metrics that decide whether a new version is deployed, with readable reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .spec.conditions import Comparison, parse_comparison
from .spec.job import GateSpec

_PRODUCTION = "production."


@dataclass(frozen=True)
class Verdict:
    """What the gate decided; one reason a condition, in their order."""

    passed: bool
    reasons: tuple[str, ...]


def parse_condition(text: str) -> Comparison:
    """The comparison that `text` is; raises ValueError with the rule where it is none."""
    return parse_comparison(text)


def names_in(gate: GateSpec | None) -> tuple[str, ...]:
    """The metrics that a gate asks for (`eval_loss`, `base.eval_loss`, ...), each once."""
    found = (name for text in _conditions(gate) for name in parse_condition(text).names)
    return tuple(dict.fromkeys(found))


def check(gate: GateSpec | None, metrics: Mapping[str, float], *, has_production: bool) -> Verdict:
    """Decides by `metrics` (`eval_loss`, `base.eval_loss`, `production.eval_loss`, ...).

    Args:
        gate: all or any of its conditions must hold; None lets everything pass.
        metrics: what this run measured. A metric that is missing or NaN fails the condition that names it.
        has_production: whether there is a version to compare with. Without one a `production.*` condition
            holds, unless this run's own metrics are missing or NaN, and the reason says so.
    """
    if gate is None:
        return Verdict(True, ("no gate: deployed whatever its metrics are",))
    results = [_judge(parse_condition(text), metrics, has_production) for text in _conditions(gate)]
    decide = all if gate.any is None else any
    return Verdict(decide(passed for passed, _ in results), tuple(reason for _, reason in results))


def _conditions(gate: GateSpec | None) -> tuple[str, ...]:
    if gate is None:
        return ()
    return gate.all if gate.all is not None else gate.any or ()


def _judge(condition: Comparison, metrics: Mapping[str, float], has_production: bool) -> tuple[bool, str]:
    compares = [name for name in condition.names if name.startswith(_PRODUCTION) and not has_production]
    measured = [name for name in condition.names if name not in compares]
    missing = [name for name in measured if name not in metrics]
    if missing:
        return False, f"{condition.text}: fails, {_listed(missing)} not measured"
    undefined = [name for name in measured if math.isnan(metrics[name])]
    if undefined:
        return False, f"{condition.text}: fails, {_listed(undefined)} NaN"
    if compares:
        return True, f"{condition.text}: holds, there is no production version to compare with"
    left, right = condition.sides(metrics)
    if math.isnan(left) or math.isnan(right):
        return False, f"{condition.text}: fails, it divides by zero or subtracts infinities"
    holds = condition.holds(metrics)
    compared = f"{_shown(left, right)} {condition.sign} {_shown(right, left)}"
    return (
        holds,
        f"{condition.text}: {'holds' if holds else 'fails'}, {compared}{'' if holds else ' is not so'}",
    )


def _listed(names: list[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _shown(number: float, other: float) -> str:
    """Four digits, or as many as it takes to tell `number` from `other`."""
    for digits in range(4, 17):
        if number == other or f"{number:.{digits}g}" != f"{other:.{digits}g}":
            return f"{number:.{digits}g}"
    return repr(number)
