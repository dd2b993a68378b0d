"""Commands for keys: keys create, list, revoke."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import api
from ..errors import SpecError
from ..keys import PERIODS, Limits
from ..spec.durations import parse_duration
from ..terminal import JsonView
from .app import SERVING, AsJson, ClusterOption, app, console, errors, print_json, print_table, when

keys = typer.Typer(
    no_args_is_help=True,
    help="Who may ask endpoints: make, list and revoke keys, each with limits of its tenant.",
)
app.add_typer(keys, name="keys", rich_help_panel=SERVING)


@keys.command("create")
def create(
    tenant: Annotated[
        str, typer.Argument(help="Whose key it is; limits are the tenant's, for all its keys.")
    ],
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Requests a minute.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompts and answers a minute.")
    ] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Tokens in all, for a period.")] = None,
    budget_period: Annotated[
        str | None, typer.Option(help=f"{' | '.join(PERIODS)}; month where not given.")
    ] = None,
    max_parallel: Annotated[
        int | None, typer.Option(min=1, help="Answers that may run or wait at once, on each replica.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="An adapter or base that it may ask; again for more. All where not given."),
    ] = None,
    expires: Annotated[str | None, typer.Option(help="When it ends: 90d, 12h.")] = None,
    force: Annotated[bool, typer.Option(help="Take a --model that is not there yet.")] = False,
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once; only its hash is kept. Limits that are not named stay as they are.

    Example: raypeft keys create acme --requests-per-minute 120 --token-budget 5000000 --expires 90d
    """
    if budget_period is not None and budget_period not in PERIODS:
        raise SpecError(
            f"'{budget_period}' is no period.", where="--budget-period", hint=f"One of: {', '.join(PERIODS)}."
        )
    asked = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "token_budget": token_budget,
        "budget_period": budget_period,
        "max_parallel": max_parallel,
        "models": tuple(model) if model else None,
    }
    made = api.create_key(
        tenant,
        {name: value for name, value in asked.items() if value is not None},
        expires_s=_seconds(expires),
        force=force,
        cluster=cluster,
    )
    if as_json:
        print_json(made.to_dict())
        return
    console.print(made.secret, highlight=False, soft_wrap=True)
    ends = f", until {when(made.expires)}" if made.expires else ""
    errors.print(
        f"key {made.id} of {made.tenant} ({_shown(made.limits)}){ends}. It is not shown again. Clients send it as "
        "'Authorization: Bearer KEY'; raypeft ask reads it from RAYPEFT_API_KEY.",
        highlight=False,
        soft_wrap=True,
    )


@keys.command("list")
def list_(cluster: ClusterOption = None, as_json: AsJson = False) -> None:
    """List keys with their tenants' limits and what each tenant has used."""
    rows = api.keys(cluster=cluster)
    used = {tenant: api.used(tenant, cluster=cluster) for tenant in {row.tenant for row in rows}}
    if as_json:
        print_json([{**row.to_dict(), "used": used[row.tenant]} for row in rows])
        return
    print_table(
        f"Keys of {api.registry_url(cluster)}",
        ["id", "tenant", "state", "limits", "tokens today", "this month", "created", "expires"],
        (
            (
                row.id,
                row.tenant,
                row.state,
                _shown(row.limits),
                used[row.tenant]["day"],
                used[row.tenant]["month"],
                when(row.created),
                when(row.expires),
            )
            for row in rows
        ),
    )


@keys.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(metavar="ID|TENANT", help="A key, or all keys of a tenant.")],
    cluster: ClusterOption = None,
    as_json: AsJson = False,
) -> None:
    """End a key, or all of a tenant's: endpoints refuse it within about a second."""
    ended = api.revoke_key(name, cluster=cluster)
    if as_json:
        JsonView()({"event": "result", "revoked": ended})
    else:
        console.print(f"revoked {', '.join(ended)}", highlight=False)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise SpecError(str(error), where="--expires") from error


def _shown(limits: Limits) -> str:
    """Limits in a few words."""
    parts = [
        f"{limits.requests_per_minute} requests/min" if limits.requests_per_minute is not None else "",
        f"{limits.tokens_per_minute} tokens/min" if limits.tokens_per_minute is not None else "",
        f"{limits.token_budget} tokens/{limits.budget_period}" if limits.token_budget is not None else "",
        f"{limits.max_parallel} at once" if limits.max_parallel is not None else "",
        f"models {', '.join(limits.models)}" if limits.models is not None else "",
    ]
    return ", ".join(part for part in parts if part) or "no limits"
