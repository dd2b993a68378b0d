"""What Ray Train's controller does for torch, without importing torch: it tells the workers where to meet.

Ray's own TorchConfig makes the controller import torch before the first worker can start, seconds that nobody
else can use. The workers open the process group themselves (`worker.py`), over the backend that what they
really have allows.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

from . import preemption

_listening: list[socket.socket] = []
"""Rank 0's: the port on which the others find it, bound before it is told to anyone."""


class MeetingBackend(Backend):
    """Gives every worker `MASTER_ADDR` and `MASTER_PORT`."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Opens a port at rank 0 and names it to all."""
        worker_group.execute(preemption.listen)
        address, port = worker_group.execute_single(0, listen)
        worker_group.execute(meet_at, address, port)


@dataclass
class MeetingConfig(BackendConfig):
    """Ray's config for `MeetingBackend`."""

    @property
    def backend_cls(self) -> type[MeetingBackend]:
        """The class that starts it."""
        return MeetingBackend


def listen() -> tuple[str, int]:
    """Binds a free port of this node's address and keeps it open; returns both."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.bind((address, 0))
    opened.listen(1024)
    _listening[:] = [opened]
    return address, opened.getsockname()[1]


def listening() -> int:
    """The descriptor of the port that `listen` opened in this process, which the caller now owns."""
    return _listening.pop().detach()


def meet_at(address: str, port: int) -> None:
    """Keeps the address for the process group; a cluster on loopback makes gloo stay there too."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    if address.startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
