"""Where the replicas of one endpoint write what the others read: `ROOT/serving/ENDPOINT` of the registry's storage."""

from __future__ import annotations

from orchestrator import objects
from orchestrator.objects import join
from orchestrator.registry import Registry


class SharedFolder:
    """The folder of one endpoint.

    Args:
        registry_url: the registry's root.
    """

    def __init__(self, registry_url: str, endpoint: str) -> None:
        self.url = join(registry_url, "serving", endpoint)
        self._registry, self._endpoint = Registry(registry_url), endpoint

    def write(self, data: bytes, *path: str) -> None:
        """Replaces a file of one replica's own.

        Raises:
            StorageError: it cannot be written, or the registry has no trace of the endpoint: its storage is away, and
                nothing is made in its place.
        """
        self._registry.endpoint_state(self._endpoint, was_there=True)
        objects.write(join(self.url, *path), data)
