"""The command line's frame: the application, the options that commands share, how results and errors look."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import api
from ..errors import RaypeftError
from ..processes import hear_interrupts
from ..terminal import JsonView, discard

app = typer.Typer(
    name="raypeft",
    help="Train adapters from a YAML job on a Ray cluster, gate and register them, and serve them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

MAKE, RUNS, ADAPTERS, SERVING = "Write a job", "Run jobs", "Adapters", "Endpoints"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
ClusterOption = Annotated[
    str | None, typer.Option("--cluster", "-c", metavar="FILE|NAME", help="A cluster file, or its name.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key: training.learning_rate=1e-4."),
]


def complete_adapters(incomplete: str) -> list[str]:
    """Names and versions of the registry that begin as typed; nothing where it does not answer."""
    try:
        rows = api.adapters()
    except RaypeftError:
        return []
    names = [row.name for row in rows] + [f"{row.name}@{row.latest}" for row in rows]
    return [name for name in names if name.startswith(incomplete)]


def complete_runs(incomplete: str) -> list[str]:
    """Ids of stored runs that begin as typed; nothing where the storage does not answer."""
    try:
        return [record.id for record in api.jobs() if record.id.startswith(incomplete)]
    except RaypeftError:
        return []


AdapterArgument = Annotated[
    str,
    typer.Argument(metavar="NAME@V", help="NAME@VERSION or NAME@ALIAS.", autocompletion=complete_adapters),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="ID", help="A run's id, name or folder.", autocompletion=complete_runs)
]

UNWRAPPED = 100_000
"""Columns where there is no terminal to wrap for."""


class _Console(Console):
    """Goes on unseen where its reader has gone: what a command did is done, and its exit code says so."""

    def on_broken_pipe(self) -> None:
        discard(self.file)


console = _Console()
errors = _Console(stderr=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, default=str), flush=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A title and a table; empty cells for None, times and other values as people read them. Without a terminal
    nothing is wrapped: each row is one line, for grep."""
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, map(cell_text, row)))
    wide = console if console.is_terminal else _Console(width=UNWRAPPED)
    wide.print(Text(title, "italic"), soft_wrap=True)
    wide.print(table)


class Listed(Protocol):
    """One of several things that a command lists."""

    def to_dict(self) -> dict[str, Any]: ...


Row = TypeVar("Row", bound=Listed)


def print_rows(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    cells: Callable[[Row], Sequence[Any]],
    *,
    as_json: bool,
) -> None:
    """What a command lists: as a table, or as JSON with all that is known of each."""
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        print_table(title, columns, map(cells, rows))


def cell_text(value: Any) -> str:
    """A cell's text."""
    match value:
        case None:
            return ""
        case dict():
            return "  ".join(f"{key} {cell_text(each)}" for key, each in value.items())
        case list() | tuple():
            return ", ".join(map(cell_text, value))
        case float():
            return f"{value:.4g}"
    return str(value)


def when(seconds: float | None) -> str:
    """A time as the reader's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def main() -> None:
    """The console script. A `RaypeftError` is one message and an exit code, never a traceback."""
    hear_interrupts()
    sys.exit(run_guarded(app))


def run_guarded(command: Callable[..., Any], arguments: Sequence[str] | None = None) -> int:
    """Runs the application on `arguments` (the process's own where None) and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command(args=given, prog_name="raypeft")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except RaypeftError as error:
        if "--json" in given:
            JsonView()({"error": error.to_dict()})
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    return 0
