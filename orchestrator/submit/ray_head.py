"""`ray start`, without the Ray client's server. Run by path (`python -P ray_head.py start --head ...`).

`ray start` has no option that leaves out the server of `ray://` addresses: a process of 90 MB that nobody
here uses, on a fixed port. Ray's own start hook can.
"""

from __future__ import annotations

import os

from ray._private.parameter import RayParams
from ray._private.ray_constants import RAY_START_HOOK
from ray.scripts.scripts import main


def without_client_server(params: RayParams, is_head: bool) -> None:
    """Ray's start hook: called with the parameters just before the processes are started."""
    params.ray_client_server_port = None
    os.environ.pop(RAY_START_HOOK, None)


if __name__ == "__main__":
    os.environ[RAY_START_HOOK] = "__main__.without_client_server"
    main()
