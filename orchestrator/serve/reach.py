"""From where an endpoint is reached, and who it lets in."""

from __future__ import annotations

from ray import serve
from ray.serve.context import _get_global_client

from ..keys import KeyBook
from ..spending import Spending
from .routes.admission import Admission
from .routes.key_check import KeyCheck, is_loopback, require_keys


def serve_host() -> str:
    """The address that Serve listens on; one without HTTP is reached by nobody but this machine's processes."""
    return _get_global_client().http_config.host or "127.0.0.1"


def admission(registry_url: str) -> Admission:
    """The door of a replica, by the keys of its registry; called where Serve runs the replica.

    Raises:
        ServeError: it is reached by others than this machine's users, and no key is in force.
    """
    host, keys = serve_host(), KeyBook(registry_url)
    require_keys(host, keys.read())
    check = KeyCheck(keys, required=not is_loopback(host))
    return Admission(
        check, Spending(registry_url), num_replicas=lambda: serve.get_replica_context().world_size
    )
