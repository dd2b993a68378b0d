"""A Ray of several nodes on this machine, apart from the session's and from everybody else's."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

STORE = 100_000_000
"""Bytes of a node's object store."""


@contextlib.contextmanager
def own_ray(num_cpus: int) -> Iterator[Cluster]:
    """A head with so many CPUs and without a dashboard, for nodes to be added to."""
    Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)  # Ray writes the head's address there
    with tempfile.TemporaryDirectory(prefix="rpo-") as folder:
        head = {
            "num_cpus": num_cpus,
            "object_store_memory": STORE,
            "include_dashboard": False,
            "temp_dir": folder,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def join(cluster: Cluster) -> None:
    """Connects this process."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", namespace="raypeft")
