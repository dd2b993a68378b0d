"""Commands for versions on their way to an alias: promote, rollback, rollout status; and top."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import api
from ..serve.rollouts.traffic import RolloutRow, TrafficRow
from ..spec.durations import format_duration
from ..terminal import JsonView
from .app import (
    SERVING,
    AdapterArgument,
    AsJson,
    ClusterOption,
    app,
    cell_text,
    console,
    print_json,
    print_rows,
    print_table,
    when,
)

rollout = typer.Typer(name="rollout", help="Versions on their way to an alias.", no_args_is_help=True)
app.add_typer(rollout, rich_help_panel=SERVING)

_AUDIT_LINES = 20


@app.command(rich_help_panel=SERVING)
def promote(
    ref: AdapterArgument,
    alias: Annotated[str | None, typer.Option(help="The alias; its rollout's, else production.")] = None,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Give a served version its alias now, however long it was to be watched.

    Example: raypeft promote python-docs@2
    """
    endpoint, taken = api.promote(ref, alias=alias, cluster=cluster)
    if as_json:
        JsonView()({"event": "result", "promoted": taken, "endpoint": endpoint})
    else:
        console.print(f"promoted {taken} at endpoint {endpoint}", highlight=False)


@app.command(rich_help_panel=SERVING)
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An adapter.")],
    alias: Annotated[str, typer.Option(help="The alias.")] = "production",
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Take back what is being rolled out; else give the alias to the version before it.

    Example: raypeft rollback python-docs
    """
    endpoint, now = api.rollback(name, alias=alias, cluster=cluster)
    if as_json:
        JsonView()({"event": "result", "alias": f"{name}@{alias}", "is": now, "endpoint": endpoint})
    else:
        names = now or "no version"
        console.print(f"{name}@{alias} is {names} at endpoint {endpoint}", highlight=False)


@rollout.command()
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="An adapter; all where not given.")
    ] = None,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Show what is being rolled out, what was measured of it, and the last steps.

    Example: raypeft rollout status python-docs --json
    """
    rows, steps = api.rollouts(name, cluster=cluster), api.audit(name, cluster=cluster)
    if as_json:
        print_json({"rollouts": [row.to_dict() for row in rows], "audit": steps})
        return
    if not rows:
        console.print("nothing is being rolled out", highlight=False)
    for row in rows:
        print_table(f"{row.candidate} to {row.name}@{row.alias} on {row.endpoint}", ["", ""], _facts(row))
    if steps:
        print_table(
            "Steps",
            ["when", "what", "adapter", "alias", "by", "why"],
            (
                (when(s["at"]), s["event"], s.get("adapter"), s.get("alias"), s.get("by"), s.get("reasons"))
                for s in steps[-_AUDIT_LINES:]
            ),
        )


def _facts(row: RolloutRow) -> list[tuple[str, str]]:
    bake = format_duration(row.bake_s) if row.bake_s else "until raypeft promote"
    facts = [
        ("state", row.state),
        ("stable", row.stable or "none"),
        ("traffic", f"{row.canary_percent:g} % by '{row.sticky_key}', {row.shadow_percent:g} % in shadow"),
        ("bake", f"{format_duration(round(row.baked_s))} of {bake}"),
        ("replicas", str(row.replicas)),
    ]
    if row.rollback:
        facts += [(f"taken back if {kind}", "; ".join(texts)) for kind, texts in row.rollback.items()]
    return facts + [(metric, f"{value:.4g}") for metric, value in row.metrics.items()]


@app.command(rich_help_panel=SERVING)
def top(
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Watch what each adapter answers: versions, traffic, latency.

    Example: raypeft top --once --json
    """
    looks = api.top(cluster=cluster)
    rows = next(looks)
    if once:
        time.sleep(interval)  # rates need two looks
        rows = next(looks)
        print_rows("Traffic", _COLUMNS, rows, _cells, as_json=as_json)
        return
    if as_json:
        while True:
            print(json.dumps({"event": "traffic", "rows": [row.to_dict() for row in rows]}), flush=True)
            time.sleep(interval)
            rows = next(looks)
    with Live(_table(rows), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(_table(next(looks)), refresh=True)


_COLUMNS = (
    "endpoint",
    "model",
    "aliases",
    "state",
    "replicas",
    "requests",
    "errors",
    "req/s",
    "tok/s",
    "p50 s",
    "p99 s",
    "first token s",
)


def _cells(row: TrafficRow) -> tuple[object, ...]:
    return (
        row.endpoint,
        row.model,
        row.aliases,
        row.state,
        row.replicas,
        row.requests,
        row.errors,
        *map(
            _short,
            (row.requests_per_s, row.tokens_per_s, row.latency_p50, row.latency_p99, row.first_token_p50),
        ),
    )


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _table(rows: list[TrafficRow]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if number < 4 else "right", no_wrap=True)
    for row in rows:
        style = "red" if row.errors or row.state == "refused" else "cyan" if row.state == "canary" else None
        table.add_row(*(Text(cell_text(cell)) for cell in _cells(row)), style=style)
    return table
