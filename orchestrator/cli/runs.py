"""Commands for jobs: run, submit, jobs, status, logs, cancel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text

from .. import api
from ..service import Comparison, RunResult
from ..sweep.result import SweepResult
from ..terminal import JsonView, describe, describe_metrics, view_for
from .app import (
    RUNS,
    AsJson,
    ClusterOption,
    Overrides,
    RunArgument,
    app,
    console,
    errors,
    print_json,
    print_rows,
    print_table,
    when,
)
from .sweeps import show_sweep

Address = Annotated[
    str | None, typer.Option("--address", "-a", metavar="URL", help="A Ray cluster: http://HOST:8265.")
]


@app.command(rich_help_panel=RUNS)
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job file.")],
    set_: Overrides = None,
    cluster: ClusterOption = None,
    new: Annotated[bool, typer.Option(help="Number a new run where the name is taken.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on although keys changed, with all of retry.")] = False,
    force: Annotated[bool, typer.Option(help="Deploy although the gate refuses; recorded.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train, gate, register and deploy, here, following it to the end. The same command again resumes it.

    Example: raypeft run jobs/quickstart.yaml --set training.num_epochs=2
    """
    with view_for(as_json=as_json, quiet=quiet, console=errors) as view:
        result = api.run(
            file, set_ or (), cluster=cluster, new=new, resume=resume, force=force, on_event=view
        )
    if as_json:
        JsonView()({"event": "result", **result.to_dict()})
    elif not quiet:
        show_result(result)


def show_result(result: RunResult) -> None:
    """What a job came to, and how to ask it."""
    if not result.already:  # else it was said while it ran
        console.print(f"{result.state}: {result.adapter}  ({result.wall_s:.0f} s)", highlight=False)
    if result.metrics:
        console.print(describe_metrics(result.metrics), highlight=False, soft_wrap=True)
    for line in api.improvement(result.metrics):
        console.print(line, highlight=False, soft_wrap=True)
    for reason in result.reasons:
        console.print(f"gate: {reason}", highlight=False, soft_wrap=True)
    if result.comparison:
        show_comparison(result.comparison, str(result.adapter))
    for note in result.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if result.sweep:
        show_sweep(SweepResult.from_dict(result.sweep))


def show_comparison(comparison: Comparison, adapter: str) -> None:
    """One question and both answers, side by side, and the line that asks the same."""
    table = Table(box=ROUNDED, title=Text(comparison.question, "bold"), title_justify="left", expand=True)
    for column in ("the base", f"the adapter {adapter}"):
        table.add_column(column, ratio=1, overflow="fold")
    table.add_row(Text(comparison.base.strip()), Text(comparison.adapter.strip()))
    console.print(table)
    console.print(comparison.curl, highlight=False, markup=False, soft_wrap=True)


@app.command(rich_help_panel=RUNS)
def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job file.")],
    address: Address = None,
    cluster: ClusterOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay and print its log to the end.")
    ] = False,
    install: Annotated[bool, typer.Option(help="Install what the cluster's environment lacks.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")
    ] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Send a job to a Ray cluster through its Jobs API.

    Example: raypeft submit jobs/quickstart.yaml --address http://head:8265 --follow
    """
    if dry_run:
        print(api.submission(file, set_ or (), address=address, cluster=cluster, install=install), end="")
        return
    job = api.submit(file, set_ or (), address=address, cluster=cluster, install=install)
    if as_json:
        JsonView()({"event": "submitted", **job.to_dict()})
    else:
        console.print(f"submitted {job.id} to {job.address}", highlight=False)
    if follow:
        with view_for(as_json=as_json, quiet=False, console=errors) as view:
            result = api.follow(job.id, address=job.address, on_event=view)
        if as_json:
            JsonView()({"event": "result", **result.to_dict()})
        else:
            show_result(result)


@app.command(rich_help_panel=RUNS)
def jobs(address: Address = None, cluster: ClusterOption = None, as_json: AsJson = False) -> None:
    """List runs: those in the storage, or with --address those that Ray's Jobs API knows."""
    if address:
        print_rows(
            address,
            ["id", "status", "message"],
            api.submitted_jobs(address=address),
            lambda job: (job.id, job.status, job.message),
            as_json=as_json,
        )
        return
    print_rows(
        f"Runs in {api.storage(cluster)}",
        ["id", "state", "adapter", "updated"],
        api.jobs(cluster=cluster),
        lambda run: (run.id, run.state, run.adapter, when(run.updated)),
        as_json=as_json,
    )


@app.command(rich_help_panel=RUNS)
def status(
    id: RunArgument, address: Address = None, cluster: ClusterOption = None, as_json: AsJson = False
) -> None:
    """Show a run: its state, metrics, endpoint and the cause of each failure. Needs no cluster."""
    if address:
        job = api.job_status(id, address=address)
        print_json(job.to_dict()) if as_json else console.print(f"{job.id}: {job.status}  {job.message}")
        return
    record = api.status(id, cluster=cluster)
    if as_json:
        print_json(record.to_dict())
        return
    facts = record.to_dict() | {"created": when(record.created), "updated": when(record.updated)}
    print_table(
        record.id, ["", ""], ((key, value) for key, value in facts.items() if value not in (None, {}, []))
    )


@app.command(rich_help_panel=RUNS)
def logs(
    id: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    worker: Annotated[int | None, typer.Option(help="A worker's own output instead of the events.")] = None,
    address: Address = None,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Print a run's events, or a worker's output. Needs no cluster but with --address."""
    if address:
        for text in api.job_logs(id, address=address, follow=follow):
            print(text, end="", flush=True)
        return
    if worker is not None:
        for text in api.worker_log(id, worker, follow=follow, cluster=cluster):
            print(text, end="", flush=True)
        return
    for event in api.logs(id, follow=follow, cluster=cluster):
        if line := json.dumps(event) if as_json else describe(event):
            print(line, flush=True)


@app.command(rich_help_panel=RUNS)
def cancel(
    id: RunArgument, address: Address = None, cluster: ClusterOption = None, as_json: AsJson = False
) -> None:
    """Stop a run: it saves a checkpoint first and leaves nothing behind."""
    state = api.cancel(id, address=address, cluster=cluster)
    print_json({"id": id, "state": state}) if as_json else console.print(f"{id}: {state}", highlight=False)
