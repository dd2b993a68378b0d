"""Commands for sweeps: sweep show."""

from __future__ import annotations

import typer

from .. import api
from ..sweep import table
from ..sweep.result import SweepResult
from .app import RUNS, AsJson, ClusterOption, RunArgument, app, console, print_json, print_table

sweeps = typer.Typer(no_args_is_help=True, help="Sweeps: their trials, the best first.")
app.add_typer(sweeps, name="sweep", rich_help_panel=RUNS)


@sweeps.command("show")
def show(id: RunArgument, cluster: ClusterOption = None, as_json: AsJson = False) -> None:
    """Show a sweep's trials, the best first, under way or ended. Needs no cluster.

    Example: raypeft sweep show quickstart-sweep --json | jq '.trials[0].parameters'
    """
    result = api.sweep(id, cluster=cluster)
    print_json(result.to_dict()) if as_json else show_sweep(result)


def show_sweep(result: SweepResult) -> None:
    """The table of trials, how much each parameter matters, and where the plots are."""
    trials = list(result.trials)
    print_table(
        f"{result.id}: {len(trials)} of {result.wanted} trials, {result.state}",
        table.columns(result.sweep, trials),
        table.rows(result.sweep, trials),
    )
    for line in table.failures(trials):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if result.importance:
        shares = "  ".join(f"{name} {share:.0%}" for name, share in result.importance.items())
        console.print(f"importance: {shares}", highlight=False, soft_wrap=True)
    if result.adapter:
        console.print(f"registered: {result.adapter}", highlight=False)
    if result.page:
        console.print(f"plots and table: {result.page}", highlight=False, soft_wrap=True)
