"""Commands for writing a job: init, validate, inspect, plan, schema, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import api
from ..errors import RaypeftError
from ..plan.sweep import SweepPlan
from ..plan.sweep_view import sweep_view
from ..plan.view import plan_dict, print_plan
from ..spec.words import show
from .app import (
    MAKE,
    AsJson,
    ClusterOption,
    Overrides,
    app,
    console,
    errors,
    print_json,
    print_rows,
    print_table,
)

JobFile = Annotated[Path, typer.Argument(metavar="FILE", help="A job file.")]


@app.command(rich_help_panel=MAKE)
def init(
    template: Annotated[str | None, typer.Argument(help="Which one; left out: lists them.")] = None,
    directory: Annotated[Path, typer.Option("--dir", help="Where to write.")] = Path("."),
    force: Annotated[bool, typer.Option(help="Overwrite files that are there.")] = False,
) -> None:
    """Write a commented job file to start from.

    Example: raypeft init quickstart && raypeft run quickstart.yaml
    """
    if template is None:
        print_table("Templates", ["name", "what"], api.templates())
        return
    for path in api.init(template, directory, force=force):
        console.print(f"wrote {path}", highlight=False)


@app.command(rich_help_panel=MAKE)
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job files.")],
    resolved: Annotated[bool, typer.Option(help="Print the job with every default filled in.")] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check job files against the schema and its rules, in about a second.

    Example: raypeft validate jobs/*.yaml
    """
    results: list[dict[str, object]] = []
    failed = 0
    for path in files:
        try:
            job = api.validate(path, set_ or ())
        except RaypeftError as error:
            failed = failed or error.exit_code
            results.append({"file": str(path), "valid": False, "error": error.to_dict()})
            if not as_json:
                errors.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
            continue
        results.append(
            {"file": str(path), "valid": True, "name": job.spec.name, "warnings": list(job.warnings)}
        )
        if as_json:
            continue
        for warning in job.warnings:
            errors.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        if resolved:
            print(api.resolved(job.spec), end="")
        else:
            console.print(f"{path}: valid", highlight=False)
    if as_json:
        print_json(results)
    if failed:
        raise typer.Exit(failed)


@app.command(rich_help_panel=MAKE)
def inspect(
    file: JobFile,
    rows: Annotated[int, typer.Option("-n", "--rows", min=0, help="How many rows to show.")] = 3,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what the model will read: rows with the trained tokens coloured, lengths, what is dropped.

    Example: raypeft inspect jobs/quickstart.yaml -n 3
    """
    inspection = api.inspect(file, rows, set_ or ())
    if as_json:
        print_json(inspection.to_dict())
    else:
        inspection.show(console)


@app.command(rich_help_panel=MAKE)
def plan(
    file: JobFile, cluster: ClusterOption = None, set_: Overrides = None, as_json: AsJson = False
) -> None:
    """Show how a job would run: workers, ZeRO stage, batch arithmetic, memory per worker, whether it fits.

    Example: raypeft plan jobs/quickstart.yaml
    """
    made = api.plan(file, set_ or (), cluster=cluster)
    if as_json:
        print_json(made.to_dict() if isinstance(made, SweepPlan) else plan_dict(made))
    else:
        console.print(sweep_view(made, str(file))) if isinstance(made, SweepPlan) else print_plan(
            made, console, str(file)
        )


@app.command(rich_help_panel=MAKE)
def schema() -> None:
    """Print the JSON Schema of a job, for editors.

    Example: raypeft schema > job.schema.json
    """
    print_json(api.schema())


@app.command(rich_help_panel=MAKE)
def methods(
    name: Annotated[str | None, typer.Argument(help="One method's fields; left out: all methods.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the adapter methods with their tasks and papers, or the fields of one.

    Example: raypeft methods adalora
    """
    if name is not None:
        row = api.method(name)
        if as_json:
            print_json(row.to_dict())
            return
        fields = (
            (each.name, each.takes, "required" if each.is_required else show(each.default), each.help)
            for each in row.fields
        )
        print_table(f"{row.name}: {row.what}", ["field", "takes", "default", "what"], fields)
        return
    print_rows(
        "Methods",
        ["type", "what", "tasks", "merges", "paper"],
        api.methods(),
        lambda row: (row.name, row.what, row.trains, "yes" if row.merges else "no", row.paper),
        as_json=as_json,
    )
