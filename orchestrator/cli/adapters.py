"""Commands on the registry: adapters, show, alias, register, pull, merge, delete, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import api
from ..terminal import JsonView, describe_metrics, view_for
from .app import (
    ADAPTERS,
    AdapterArgument,
    AsJson,
    ClusterOption,
    app,
    complete_adapters,
    console,
    errors,
    print_json,
    print_rows,
    print_table,
    when,
)


@app.command(rich_help_panel=ADAPTERS)
def adapters(
    name: Annotated[
        str | None, typer.Argument(help="One adapter's versions.", autocompletion=complete_adapters)
    ] = None,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """List adapters, or the versions of one."""
    where = f"Registry {api.registry_url(cluster)}"
    if name is None:
        rows = api.adapters(cluster=cluster)
        print_rows(
            where,
            ["name", "latest", "aliases", "base"],
            rows,
            lambda row: (row.name, row.latest, _aliases(row.aliases), row.base),
            as_json=as_json,
        )
        return
    print_rows(
        where,
        ["version", "aliases", "gate", "metrics", "parent", "created"],
        api.versions(name, cluster=cluster),
        lambda version: (
            version.ref,
            ", ".join(version.aliases),
            {True: "passed", False: "refused", None: "none"}[version.lineage.gate_passed],
            describe_metrics(version.lineage.metrics),
            version.lineage.parent,
            when(version.created),
        ),
        as_json=as_json,
    )


def _aliases(aliases: dict[str, int]) -> str:
    return ", ".join(f"{alias} -> {version}" for alias, version in sorted(aliases.items()))


@app.command(rich_help_panel=ADAPTERS)
def show(ref: AdapterArgument, cluster: ClusterOption = None, as_json: AsJson = False) -> None:
    """Show a version: its lineage, metrics, aliases, files."""
    version = api.show(ref, cluster=cluster)
    if as_json:
        print_json(version.to_dict())
        return
    forced = [{**each, "at": when(each["at"])} for each in version.forced]
    facts = version.to_dict() | {"created": when(version.created), "forced": forced}
    lineage, files = facts.pop("lineage"), facts.pop("files")
    facts |= {f"lineage.{key}": value for key, value in lineage.items()}
    facts |= {file: f"{about['size_bytes']:,} bytes" for file, about in files.items()}
    print_table(version.ref, ["", ""], (row for row in facts.items() if row[1] not in (None, {}, [], ())))


@app.command(rich_help_panel=ADAPTERS)
def alias(
    ref: AdapterArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="For example production.")],
    cluster: ClusterOption = None,
) -> None:
    """Point an alias at a version.

    Example: raypeft alias python-docs@2 production
    """
    version = api.alias(ref, alias, cluster=cluster)
    console.print(f"{version.name}@{alias} is {version.ref}", highlight=False)


@app.command(rich_help_panel=ADAPTERS)
def register(
    source: Annotated[str, typer.Argument(metavar="DIR|HUB_ID", help="An adapter in HF PEFT's layout.")],
    name: Annotated[str, typer.Option("--name", "-n", help="The adapter's name.")],
    base: Annotated[
        str | None, typer.Option(help="Its base model, where its config names none that is here.")
    ] = None,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Register an adapter that was trained elsewhere."""
    version = api.register(source, name, base=base, cluster=cluster)
    print_json(version.to_dict()) if as_json else console.print(f"registered {version.ref}", highlight=False)


@app.command(rich_help_panel=ADAPTERS)
def pull(
    ref: AdapterArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory to make.")],
    cluster: ClusterOption = None,
) -> None:
    """Copy a version out of the registry; HF PEFT loads the directory as it is."""
    version = api.pull(ref, directory, cluster=cluster)
    console.print(f"{version.ref} is in {directory}", highlight=False)


@app.command(rich_help_panel=ADAPTERS)
def merge(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="NAME@V", help="A version, or an adapter's directory.", autocompletion=complete_adapters
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A directory or URL that is not there yet.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; else as the base has it.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", help="Tasks at once; lowered to what memory allows.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, where the recorded one is not meant.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one file.")] = "5GB",
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the Python code that comes with the base.")
    ] = False,
    cluster: ClusterOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the base with an adapter in its weights: a complete model, made without loading the base.

    Example: raypeft merge python-docs@2 merged/python-docs --dtype bfloat16 --workers 2
    """
    with view_for(as_json=as_json, quiet=quiet, console=errors) as view:
        result = api.merge(
            ref,
            out,
            base=base,
            dtype=dtype,
            workers=workers,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            cluster=cluster,
            on_event=view,
        )
    if as_json:
        JsonView()({"event": "result", **result.to_dict()})
    elif not quiet:
        console.print(
            f"{result.adapter} is in {result.out}: {result.num_parameters:,} parameters, "
            f"{result.num_bytes / 1e9:.2f} GB in {len(result.files)} "
            f"{'file' if len(result.files) == 1 else 'files'} ({result.wall_s:.0f} s)",
            highlight=False,
            soft_wrap=True,
        )


@app.command(rich_help_panel=ADAPTERS)
def delete(ref: AdapterArgument, cluster: ClusterOption = None) -> None:
    """Delete a version that no alias and no endpoint holds."""
    api.delete(ref, cluster=cluster)
    console.print(f"deleted {ref}", highlight=False)


@app.command("eval", rich_help_panel=ADAPTERS)
def evaluate(
    ref: AdapterArgument,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A dataset: path, URL or hub id.")],
    type: Annotated[
        str, typer.Option(help="What its columns hold, as data.datasets[].type says it.")
    ] = "chat",
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Such as exact_match; repeatable. Else the task's own."),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Evaluate at most so many rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens generated a row.")] = 64,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure a version on data, beside its bare base.

    Example: raypeft eval python-docs@1 questions.jsonl --metric contains
    """
    measured = api.evaluate(
        ref,
        data,
        type=type,
        metrics=metrics or (),
        max_rows=max_rows,
        max_new_tokens=max_new_tokens,
        cluster=cluster,
    )
    if as_json:
        print_json(measured)
    else:
        console.print(describe_metrics(measured), highlight=False, soft_wrap=True)
