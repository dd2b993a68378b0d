"""A sweep's plots: learning curves, parallel coordinates, importance of each parameter. PNG images, by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orchestrator.spec.space import Dimension, dimensions
from orchestrator.spec.sweep import SweepSpec

from .trials import Trial, best

_WORST, _BEST = "#b8c4d6", "#c8102e"
_SIZE = (8.0, 4.5)
_MOST_LABELS = 12


def learning_curves(sweep: SweepSpec, trials: Sequence[Trial]) -> bytes:
    """The metric of every trial by step, the best trial's on top."""
    figure, axes = _page()
    chosen = best(list(trials), sweep)
    color = _colors(sweep, trials)
    for trial in trials:
        known = [
            (each.step, each.metrics[sweep.metric]) for each in trial.reports if sweep.metric in each.metrics
        ]
        if not known:
            continue
        is_best = chosen is not None and trial.number == chosen.number
        steps, values = zip(*known, strict=True)
        axes.plot(
            steps,
            values,
            color=_BEST if is_best else color(trial),
            linewidth=2.2 if is_best else 1.0,
            marker="o",
            markersize=3.5 if is_best else 2,
            zorder=3 if is_best else 2,
            label=f"trial {trial.number}, the best" if is_best else None,
        )
    axes.set_xlabel("step")
    axes.set_ylabel(sweep.metric)
    axes.grid(alpha=0.25)
    if chosen is not None:
        axes.legend(frameon=False)
    return _png(figure)


def parallel_coordinates(sweep: SweepSpec, trials: Sequence[Trial]) -> bytes:
    """One line a trial through the values of its parameters to its metric."""
    figure, axes = _page()
    space = dimensions(sweep.space)
    known = [
        each
        for each in trials
        if math.isfinite(each.value(sweep.metric)) and all(name.name in each.drawn for name in space)
    ]
    color, chosen = _colors(sweep, known), best(list(known), sweep)
    values = [each.value(sweep.metric) for each in known]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    for trial in sorted(known, key=lambda each: each.value(sweep.metric), reverse=sweep.direction == "min"):
        heights = [_height(each, trial.drawn[each.name]) for each in space]
        heights.append(_share(trial.value(sweep.metric), low, high))
        is_best = chosen is not None and trial.number == chosen.number
        axes.plot(
            range(len(heights)),
            heights,
            color=_BEST if is_best else color(trial),
            linewidth=2.2 if is_best else 1.1,
        )
    for at, each in enumerate(space):
        for height, label in _ticks(each):
            axes.text(at - 0.02, height, label, ha="right", va="center", fontsize=7)
        axes.axvline(at, color="black", linewidth=0.8)
    axes.axvline(len(space), color="black", linewidth=0.8)
    for height, value in ((0.0, low), (1.0, high)):
        axes.text(len(space) + 0.02, height, f"{value:.4g}", ha="left", va="center", fontsize=7)
    names = [*(each.name for each in space), sweep.metric]
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=12 if len(names) > 4 else 0)
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(space) + 0.3)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return _png(figure)


def importance(shares: Mapping[str, float]) -> bytes:
    """A bar a parameter: its share of the metric's variance."""
    figure, axes = _page()
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color="#3b6ea5")
    for at, name in enumerate(names):
        axes.text(shares[name], at, f" {shares[name]:.0%}", va="center", fontsize=9)
    axes.set_xlabel("share of the metric's variance (fANOVA)")
    axes.set_xlim(0, 1.08)
    if not names:
        axes.text(0.5, 0.5, "too few trials to say", ha="center", transform=axes.transAxes)
        axes.set_yticks([])
    return _png(figure)


def _page() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()


def _colors(sweep: SweepSpec, trials: Sequence[Trial]) -> Callable[[Trial], Any]:
    """From pale for the worst to dark for the best; grey where a trial has no value."""
    values = [each.value(sweep.metric) for each in trials if math.isfinite(each.value(sweep.metric))]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    shades = mpl.colormaps["viridis_r" if sweep.direction == "max" else "viridis"]

    def color(trial: Trial) -> Any:
        value = trial.value(sweep.metric)
        return shades(0.1 + 0.8 * _share(value, low, high)) if math.isfinite(value) else _WORST

    return color


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if high <= low else (value - low) / (high - low)


def _height(dimension: Dimension, drawn: Any) -> float:
    """Where a drawn value stands on its axis, from 0 to 1."""
    if dimension.is_list:
        return _share(float(drawn), 0.0, len(dimension.values) - 1.0)
    low, high = map(float, dimension.values[:2])
    if dimension.kind == "loguniform":
        return _share(math.log(drawn), math.log(low), math.log(high))
    return _share(float(drawn), low, high)


def _ticks(dimension: Dimension) -> list[tuple[float, str]]:
    if not dimension.is_list:
        low, high = dimension.values[:2]
        return [(0.0, f"{low:g}"), (1.0, f"{high:g}")]
    names = [_short(each) for each in dimension.values]
    ticks = [(_height(dimension, at), name) for at, name in enumerate(names)]
    return ticks if len(ticks) <= _MOST_LABELS else [ticks[0], ticks[-1]]


def _short(value: Any) -> str:
    text = "\n".join(f"{each}" for each in value.values()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 24 else text[:21] + "..."
