"""What Ray Train runs in each worker: finds out what the worker has, takes the secrets, and trains."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train.torch.config import TorchConfig, _TorchBackend

from orchestrator.devices import RankFacts, backend_of, device_of, precision_of
from orchestrator.runner import Event, TrainRequest

from .events import Reporter
from .output import captured
from .run import train

COLLECTIVE_TIMEOUT_S = 600
"""How long a rank waits for the others before it gives up."""


def rank_facts() -> RankFacts:
    """What this worker has, as Ray and torch tell it."""
    context = ray.train.get_context()
    assigned = tuple(map(str, ray.get_runtime_context().get_accelerator_ids().get("GPU", [])))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    facts = RankFacts(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        node_rank=context.get_node_rank(),
        assigned=assigned,
        visible=tuple(part.strip() for part in visible.split(",")) if visible else None,
        num_cuda=torch.cuda.device_count() if assigned else 0,
        has_nccl=dist.is_nccl_available(),
    )
    device = device_of(facts)
    if device == "cpu":
        return facts
    return RankFacts(**{**vars(facts), "capability": torch.cuda.get_device_capability(device)})


class DeviceBackend(_TorchBackend):
    """Ray's torch backend, with nccl or gloo by what the workers really have, not by what Ray's books say."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Sets the process group up."""
        facts = worker_group.execute(rank_facts)
        worker_group.execute(_stay_on_loopback)
        chosen = TorchConfig(
            backend=backend_of(facts),
            init_method=backend_config.init_method,
            timeout_s=backend_config.timeout_s,
        )
        super().on_start(worker_group, chosen)


@dataclass
class DeviceTorchConfig(TorchConfig):
    """Ray's TorchConfig with `DeviceBackend`."""

    timeout_s: int = COLLECTIVE_TIMEOUT_S

    @property
    def backend_cls(self) -> type[DeviceBackend]:
        """The class that sets the process group up."""
        return DeviceBackend


def run_worker(request: TrainRequest, mailbox: Any, folder: str) -> dict[str, Any]:
    """One worker's part of the run; returns `RunEnd` as a dict.

    Args:
        request: without its secrets.
        mailbox: the actor of `events.Mailbox`.
        folder: the driver's working directory, where relative paths start.
    """
    secrets: Mapping[str, str] = ray.get(mailbox.secrets.remote())
    os.environ.update(secrets)
    if os.path.isdir(folder):
        os.chdir(folder)

    def push(events: list[Event]) -> bool:
        return ray.get(mailbox.push.remote(events))

    rank = ray.train.get_context().get_world_rank()
    reporter = Reporter(push)
    with contextlib.closing(reporter), captured(_log_to(reporter, rank), secrets.values()):
        try:
            return asdict(_train(request, reporter))
        except BaseException:
            traceback.print_exc()
            raise


def _train(request: TrainRequest, reporter: Reporter) -> Any:
    own = rank_facts()
    everyone: list[Any] = [own]
    if dist.is_initialized():
        everyone = [None] * own.world_size
        dist.all_gather_object(everyone, own)
    device, precision = device_of(own), precision_of(request.spec.training.precision, everyone)
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # the same number on every attempt: sums are cut by threads, and runs are compared bit for bit
        torch.set_num_threads(max(1, int(request.plan.bundle.get("CPU", 1))))
    if own.rank == 0:
        backend = dist.get_backend() if dist.is_initialized() else "no process group"
        message = f"{own.world_size} worker(s) on {device.partition(':')[0]} over {backend}, {precision}"
        reporter.emit("state", state="starting", message=message)
    return train(request, device=device, precision=precision, reporter=reporter)


def _log_to(reporter: Reporter, rank: int) -> Any:
    return lambda text: reporter.emit("log", rank=rank, text=text)


def _stay_on_loopback() -> None:
    """A cluster on 127.0.0.1 shall not make gloo listen on the machine's other addresses."""
    if ray.util.get_node_ip_address().startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
