"""`sweep`: many trials of one job, each with other values of some keys. What `space` may hold is in `space.py`, what a
trial's job is in `trials.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, PositiveInt, WithJsonSchema

from ..errors import closest
from .durations import parse_duration

SCHEDULERS = ("none", "asha", "median")
_LARGER_IS_WORSE = ("loss",)


def _positive_time(value: object) -> float:
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError("a budget of zero: no trial would start. Write 30m or 2h, or remove it.")
    return seconds


def _named_scheduler(value: object) -> object:
    """`scheduler: asha` is `scheduler: {type: asha}`."""
    if isinstance(value, str) and value not in SCHEDULERS:
        near = closest(value, SCHEDULERS)
        hint = f"Closest: '{near[0]}'." if near else f"There are: {', '.join(SCHEDULERS)}."
        raise ValueError(f"'{value}' is not a scheduler. {hint}")
    return {"type": value} if isinstance(value, str) else value


_Time = Annotated[
    float,
    BeforeValidator(_positive_time),
    WithJsonSchema({"type": ["number", "string"], "exclusiveMinimum": 0}),
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class SchedulerSpec(_Part):
    """`sweep.scheduler`: which trials go on; periods are counted in evaluations."""

    type: Literal["none", "asha", "median"] = Field(
        default="none",
        description="none: every trial to its end; asha: the best share of each rung; median: those better than it",
    )
    grace_period: PositiveInt = Field(
        default=1, description="evaluations that every trial is given before it may be stopped"
    )
    reduction_factor: Annotated[FiniteFloat, Field(gt=1)] = Field(
        default=3, description="asha: one of so many trials goes on from rung to rung"
    )


class BudgetSpec(_Part):
    """`sweep.budget`: what the sweep may use up; at its end running trials are stopped and the best one is taken."""

    time: _Time | None = Field(default=None, description="how long it may be under way, such as 2h")
    worker_hours: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        default=None, description="workers times hours, starting up included"
    )
    trials: PositiveInt | None = Field(default=None, description="trials begun at most")


class SweepSpec(_Part):
    """`sweep`: present: the job is trained many times, and the best trial is what it comes to."""

    metric: Annotated[str, Field(min_length=1)] = Field(
        default="eval_loss", description="what trials are compared by, at their last evaluation"
    )
    mode: Literal["min", "max"] | None = Field(
        default=None, description="whether less or more is better; min for losses, max for others"
    )
    num_trials: PositiveInt | None = Field(
        default=None, description="how many trials there are; all of a grid, else 10"
    )
    max_concurrent: PositiveInt | None = Field(
        default=None, description="trials that train at once; by pack and room where not given"
    )
    searcher: Literal["grid", "random", "optuna"] = Field(
        default="random", description="grid: every combination; random: drawn; optuna: by those before"
    )
    scheduler: Annotated[
        SchedulerSpec,
        BeforeValidator(_named_scheduler),
    ] = Field(default=SchedulerSpec(), description="which trials are stopped early; a name, or its keys")
    pack: PositiveInt | Literal["auto"] = Field(
        default="auto", description="trials that share one base in one group of workers; 1: none do"
    )
    budget: BudgetSpec = Field(default=BudgetSpec(), description="what it may use up")
    space: dict[str, Any] = Field(
        description="dotted key: {choice: [...]} and the like; paired: a list of mappings of several keys"
    )

    @property
    def direction(self) -> Literal["min", "max"]:
        """Whether less or more of the metric is better."""
        if self.mode is not None:
            return self.mode
        return "min" if self.metric.endswith(_LARGER_IS_WORSE) else "max"

    def is_better(self, one: float, other: float) -> bool:
        """Whether `one` is better than `other`; what is not a number never is."""
        return one == one and (other != other or (one < other if self.direction == "min" else one > other))
