"""A sweep's plan as people read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..spec.space import dimensions
from ..spec.sweep import SweepSpec
from .layout import Layout
from .placement import show_bytes
from .sweep import SweepPlan
from .view import plan_view


def sweep_view(plan: SweepPlan, name: str = "") -> RenderableType:
    """The plan as a rich table, then that of one trial."""
    table = Table(title=f"Sweep {name}", show_header=False, title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    sweep, layout = plan.sweep, plan.layout
    rows: Sequence[tuple[str, str]] = (
        ("trials", f"{plan.trials}, {sweep.searcher} over {', '.join(_keys(sweep))}"),
        ("compares", f"{sweep.metric}, {'less' if sweep.direction == 'min' else 'more'} is better"),
        ("stops", _stops(sweep)),
        (
            "packs",
            f"{layout.groups} group{'s' * (layout.groups > 1)} of {plan.trial.num_workers} "
            f"worker{'s' * (plan.trial.num_workers > 1)}, {layout.pack} trial{'s' * (layout.pack > 1)} on each base, "
            f"{layout.concurrent} at once{_joined(layout)}",
        ),
        (
            "memory",
            f"{show_bytes(plan.memory.total)} a worker of a full pack" if plan.memory else "not known",
        ),
        ("steps", f"{plan.steps} a trial" if plan.steps is not None else "not known: the rows are elsewhere"),
        ("time", f"about {_clock(plan.seconds)}" if plan.seconds is not None else "not known"),
    )
    for key, text in rows:
        table.add_row(key, text)
    return Group(
        table, Text(""), plan_view(replace(plan.trial, notes=plan.notes), "the trial that needs most")
    )


def _joined(layout: Layout) -> str:
    if layout.joined is None or layout.pack == 1:
        return ""
    return (
        f", at most {layout.joined} of a base in one forward" if layout.joined > 1 else ", one forward each"
    )


def _keys(sweep: SweepSpec) -> list[str]:
    return [key for each in dimensions(sweep.space) for key in each.keys]


def _stops(sweep: SweepSpec) -> str:
    how = sweep.scheduler
    if how.type == "none":
        return "no trial before its end"
    every = f"from evaluation {how.grace_period} on"
    if how.type == "median":
        return f"what is worse than the median, {every}"
    return f"all but one of {how.reduction_factor:g} at each rung (asha), {every}"


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
