"""`ray start`, without the Ray client's server, and sooner. Run by path (`python -P ray_head.py start --head ...`).

`ray start` has no option that leaves out the server of `ray://` addresses: a process of 90 MB that nobody
here uses, on a fixed port. Ray's own start hook can. And it starts the node's other processes once the dashboard
answers, more than a second later than they could.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.ray_constants import RAY_START_HOOK
from ray.scripts.scripts import main


def without_client_server(params: RayParams, is_head: bool) -> None:
    """Ray's start hook: called with the parameters just before the processes are started."""
    params.ray_client_server_port = None
    os.environ.pop(RAY_START_HOOK, None)


def start_side_by_side() -> None:
    """Has a node start its dashboard beside the rest; both are there when `ray start` comes back."""
    dashboard, rest = Node.start_api_server, Node.start_ray_processes
    started: list[Future[None]] = []

    def begin(node: Node, **options: Any) -> None:
        started.append(ThreadPoolExecutor(1).submit(dashboard, node, **options))

    def finish(node: Node) -> None:
        rest(node)
        for each in started:
            each.result()

    Node.start_api_server, Node.start_ray_processes = begin, finish


if __name__ == "__main__":
    start_side_by_side()
    os.environ[RAY_START_HOOK] = "__main__.without_client_server"
    main()
