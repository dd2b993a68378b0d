"""One command on a cluster: a short Ray job whose events, result and error are as if it had run here."""

from __future__ import annotations

import json
import secrets as random
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..cluster import Cluster
from ..errors import ClusterError, RaypeftError, rebuilt
from ..service import OnEvent
from . import jobs
from .dashboard import Dashboard
from .facts import facts_at
from .payload import CLUSTER_FILE, START, START_FILE, cluster_inside
from .wheel import zip_bytes


def run_command(cluster: Cluster, arguments: Sequence[str], on_event: OnEvent) -> dict[str, Any]:
    """Runs `raypeft ARGUMENT... --json` on the cluster, with its cluster file, and follows it to its end.

    Args:
        on_event: called with each event that the command prints.

    Returns:
        The command's last JSON object, whose `event` is `result`.

    Raises:
        ClusterError: no answer, another Ray or Python, an environment that lacks something, or a job that
            ended without a result.
        RaypeftError: what the command itself refused there.
    """
    dashboard = Dashboard(jobs.address_of(cluster))
    jobs.check_versions(facts_at(dashboard))
    missing = jobs.to_install(jobs.ask_environment(dashboard), dashboard.address, install=cluster.install)
    folder = zip_bytes({CLUSTER_FILE: cluster_inside(cluster).encode(), START_FILE: START.encode()})
    id = f"raypeft-{arguments[0]}-{random.token_hex(4)}"
    jobs.send(dashboard, jobs.make_request(id, folder, [*arguments, "--json"], pip=missing))
    try:
        result, error, last = read_output(jobs.logs(id, dashboard.address, follow=True), on_event)
    except KeyboardInterrupt:
        jobs.cancel(id, dashboard.address)  # it takes back what it has begun
        raise
    if error is not None:
        raise error
    state = jobs.status(id, dashboard.address)
    if result is None or state.status != "SUCCEEDED":
        command = shlex.join(["raypeft", *arguments])
        raise ClusterError(
            f"`{command}` ended there without a result ({state.status}): {last or state.message}",
            where=dashboard.address,
            hint=f"Its log: raypeft logs {id} --address {dashboard.address}",
        )
    return {key: value for key, value in result.items() if key != "event"}


def read_output(
    pieces: Iterable[str], on_event: OnEvent
) -> tuple[dict[str, Any] | None, RaypeftError | None, str]:
    """The result, the error and the last other line of what a command printed; events as they come.

    Args:
        pieces: of its output, cut anywhere; other lines than ours may stand between.
    """
    result, error, last = None, None, ""
    for line in _lines(pieces):
        said = _object(line)
        if said.get("event") == "result":
            result = said
        elif isinstance(said.get("event"), str):
            on_event(said)
        elif isinstance(said.get("error"), Mapping):
            error = rebuilt(said["error"])
        else:
            last = line.strip() or last
    return result, error, last


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Whole lines; the last one also where it does not end."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    yield rest


def _object(line: str) -> dict[str, Any]:
    """A line that is a JSON object; empty where it is none."""
    if not line.startswith("{"):
        return {}
    try:
        return json.loads(line)
    except ValueError:
        return {}
