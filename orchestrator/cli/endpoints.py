"""Commands for serving: deploy, endpoints, undeploy, ask, up, down."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .. import api
from ..terminal import JsonView, describe
from .app import SERVING, AdapterArgument, AsJson, ClusterOption, app, console, errors, print_json, print_rows


@app.command(rich_help_panel=SERVING)
def deploy(
    ref: AdapterArgument,
    endpoint: Annotated[str | None, typer.Option(help="The endpoint; from the base where not given.")] = None,
    alias: Annotated[str, typer.Option(help="The alias that the version takes.")] = "production",
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas; 1 for a new endpoint where not given.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Although its gate refused it; recorded.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="A key of a job's deploy: rollout.canary_percent=10."
        ),
    ] = None,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Serve a version at the endpoint of its base, started where there is none.

    Example: raypeft deploy python-docs@2

    As a canary: raypeft deploy python-docs@2 -s rollout.canary_percent=10 -s rollout.bake=10m
    """

    events = JsonView(sys.stderr)

    def show(event: dict[str, object]) -> None:
        if as_json:
            events(event)
        elif line := describe(event):
            errors.print(line, highlight=False)

    made = api.deploy(
        ref,
        endpoint=endpoint,
        alias=alias,
        num_replicas=replicas,
        force=force,
        settings=settings or (),
        cluster=cluster,
        on_event=show,
    )
    if as_json:
        JsonView()({"event": "result", **made.to_dict()})
    else:
        console.print(f"{made.state}: {made.model} at {made.url}", highlight=False)


@app.command(rich_help_panel=SERVING)
def endpoints(cluster: ClusterOption = None, as_json: AsJson = False) -> None:
    """List the endpoints and the adapters that each serves."""
    print_rows(
        f"Endpoints (registry {api.registry_url(cluster)})",
        ["name", "state", "url", "base", "adapters"],
        api.endpoints(cluster=cluster),
        lambda row: (row.name, row.state, row.url, row.base, ", ".join(row.adapters)),
        as_json=as_json,
    )


@app.command(rich_help_panel=SERVING)
def undeploy(
    name: Annotated[str, typer.Argument(metavar="ENDPOINT|NAME@V", help="An endpoint, or one adapter.")],
    endpoint: Annotated[
        str | None, typer.Option(help="Take NAME@V from this endpoint; from all where not given.")
    ] = None,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Take an endpoint, or one adapter, out of service."""
    api.undeploy(name, endpoint=endpoint, cluster=cluster)
    if as_json:
        JsonView()({"event": "result", "undeployed": name})
    else:
        console.print(f"undeployed {name}", highlight=False)


@app.command(rich_help_panel=SERVING)
def ask(
    model: Annotated[str, typer.Argument(metavar="NAME", help="NAME, NAME@V, NAME@ALIAS, or a base's name.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 128,
    context: Annotated[
        str | None,
        typer.Option(help="The text that answers the question, or the second of two texts to classify."),
    ] = None,
    task_id: Annotated[
        int | None, typer.Option(min=0, help="Which task, of an adapter that learned several.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The endpoint's URL; found where not given.")] = None,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Ask an adapter, or the bare base, one question; of labels, entities, spans and vectors the answer is shown in
    words.

    Example: raypeft ask python-docs "What does shutil.copytree do?"

    Out of a text: raypeft ask python-spans "What does it return?" --context "len(s): return the length of s"
    """
    where: dict[str, Any] = {"url": url, "cluster": cluster, "context": context, "task_id": task_id}
    if as_json:
        row = api.ask_head(model, question, **where)
        answer = row if row is not None else api.ask(model, question, max_tokens=max_tokens, **where)
        print_json({"model": model, "answer": answer})
        return
    for piece in api.ask_stream(model, question, max_tokens=max_tokens, **where):
        print(piece, end="", flush=True)
    print()


@app.command(rich_help_panel=SERVING)
def up(
    num_cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs that Ray may give; all where not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start a Ray of this machine's own in the background, on loopback."""
    local = api.up(num_cpus=num_cpus)
    if as_json:
        print_json(asdict(local))
    else:
        verb = "started" if local.started else "is up already"
        console.print(f"Ray {verb}: {local.gcs_address}, dashboard {local.dashboard_url}", highlight=False)


@app.command(rich_help_panel=SERVING)
def down() -> None:
    """Stop the Ray that `raypeft up` or `run` started, with its endpoints; no other."""
    console.print("stopped" if api.down() else "no Ray of ours was up")
