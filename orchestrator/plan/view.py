"""A plan as `raypeft plan` prints it: for people, and as one JSON object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..spec.workers import GroupSize
from . import Plan
from .placement import describe, show_bytes

_PARTS = {
    "base": "the frozen base",
    "adapter": "the adapter, float32",
    "gradients": "its gradients",
    "optimizer": "the optimizer's states",
    "activations": "activations at the longest row",
    "framework": "Python, torch and Ray",
}

_STAGES = {
    0: "nothing is sharded",
    1: "the optimizer's states are sharded",
    2: "the optimizer's states and gradients are sharded",
    3: "the base is sharded too",
}


def plan_view(plan: Plan, name: str = "") -> RenderableType:
    """The plan as a rich table, followed by its notes."""
    table = Table(
        title=f"Plan of {name}" if name else None, show_header=False, title_justify="left", box=None
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for key, text in _rows(plan):
        table.add_row(key, text)
    parts: list[RenderableType] = [table]
    if plan.memory:
        parts.append(_memory_table(plan))
    parts += [Text(f"- {note}") for note in plan.notes]
    return Group(*parts)


def _rows(plan: Plan) -> list[tuple[str, str]]:
    count = f"{plan.counts[0]} to {plan.num_workers}" if plan.sizes else f"{plan.num_workers}"
    workers = f"{count} x {describe(plan.bundle)}, {plan.placement}"
    if plan.labels:
        workers += ", labels " + ", ".join(f"{key}={value}" for key, value in plan.labels.items())
    batch = (
        f"{plan.num_workers} worker{'' if plan.num_workers == 1 else 's'} x {plan.micro_batch_size} rows"
        f" x {plan.gradient_accumulation_steps} accumulated = {plan.global_batch_size} rows a step"
    )
    if plan.sizes:
        batch = f"{plan.global_batch_size} rows a step, whatever the number of workers"
    rows = [
        ("workers", workers),
        ("cluster", plan.cluster or "not known"),
        ("deepspeed", f"ZeRO-{plan.zero_stage}: {_STAGES[plan.zero_stage]}{_resting(plan)}"),
        *([("base", plan.quantization)] if plan.quantization else []),
        ("batch", batch),
        *(("", _sharing(plan, size)) for size in plan.sizes),
        ("row", f"at most {plan.sequence_len} tokens"),
    ]
    if plan.base_parameters is not None and plan.adapter_parameters is not None:
        share = plan.adapter_parameters / max(1, plan.base_parameters)
        rows.append(
            ("trained", f"{plan.adapter_parameters:,} of {plan.base_parameters:,} parameters ({share:.2%})")
        )
    if plan.serving is not None:
        rows.append(("serves", plan.serving))
    rows.append(("fits", {True: "yes", False: "no", None: "not known"}[plan.fits]))
    return rows


def _sharing(plan: Plan, size: GroupSize) -> str:
    """How so many workers share a step's rows."""
    one = size.num_workers == 1
    steps = size.gradient_accumulation_steps
    evenly = size.num_workers * plan.micro_batch_size * steps == plan.global_batch_size
    return (
        f"{size.num_workers} worker{'' if one else 's'} x {'' if evenly else 'at most '}{plan.micro_batch_size} rows"
        f" x {steps} accumulated"
    )


def _resting(plan: Plan) -> str:
    offloads = "offload_param" in plan.deepspeed.get("zero_optimization", {})
    return ", its pieces rest in the nodes' memory" if offloads else ""


def _memory_table(plan: Plan) -> Table:
    assert plan.memory is not None
    table = Table(title="Memory of a worker, estimated at the peak", title_justify="left", box=None)
    table.add_column("part", style="bold")
    table.add_column("size", justify="right")
    table.add_column("what")
    for part, what in _PARTS.items():
        table.add_row(part, show_bytes(getattr(plan.memory, part)), what)
    table.add_row("total", show_bytes(plan.memory.total), "")
    return table


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; memory in bytes, with its total."""
    values = asdict(plan)
    if plan.memory:
        values["memory"]["total"] = plan.memory.total
    values["notes"] = list(plan.notes)
    return {**values, "use_gpu": plan.use_gpu}


def print_plan(plan: Plan, console: Console, name: str = "") -> None:
    """Prints the plan as `raypeft plan` shows it."""
    console.print(plan_view(plan, name))
