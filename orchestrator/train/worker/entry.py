"""What Ray Train runs in each worker: takes the secrets, finds out what it has, joins the others, trains.

The driver imports this file, and needs neither torch nor what trains: both are imported when first used.
"""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray
import ray.train

from orchestrator.devices import RankFacts, backend_of, device_of, precision_of
from orchestrator.runner import Event, TrainRequest
from peft_dist.lazy import lazy

from .. import preemption
from ..backend import listening
from ..events import Reporter
from ..output import captured
from ..packing import Packing
from .allocator import map_large_blocks

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from orchestrator.train.worker import run, warm_worker
else:
    torch = lazy("torch")
    dist = lazy("torch.distributed")
    run = lazy("orchestrator.train.worker.run")
    warm_worker = lazy("orchestrator.train.worker.warm_worker")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others before it gives up. A rank that fails ends its group sooner."""


def run_worker(request: TrainRequest, mailbox: Any, folder: str) -> dict[str, Any]:
    """One worker's part of the run; returns `RunEnd` as a dict.

    Args:
        request: without its secrets.
        mailbox: the actor of `events.Mailbox`.
        folder: the driver's working directory, where relative paths start.
    """
    return _at_work(mailbox, folder, lambda reporter: asdict(_train(request, reporter)))


def run_warm_worker(
    request: TrainRequest,
    mailbox: Any,
    folder: str,
    packing: Packing = Packing(),
) -> dict[str, Any]:
    """One worker of a group on whose base runs come and go, until it is told to end.

    Args:
        request: of whose spec and plan the base, the data and the workers are; it starts no run.
        packing: how runs stand on the base.
    """

    def work(reporter: Reporter) -> dict[str, Any]:
        device, precision = _meet(request, reporter)
        return warm_worker.serve(
            request,
            mailbox,
            reporter,
            device=device,
            precision=precision,
            packing=packing,
        )

    return _at_work(mailbox, folder, work)


def _at_work(mailbox: Any, folder: str, work: Callable[[Reporter], dict[str, Any]]) -> dict[str, Any]:
    secrets: Mapping[str, str] = ray.get(mailbox.secrets.remote())
    os.environ.update(secrets)
    if os.path.isdir(folder):
        os.chdir(folder)

    def push(events: list[Event]) -> bool:
        return ray.get(mailbox.push.remote(events))

    rank = ray.train.get_context().get_world_rank()
    mailbox.placed.remote(rank, ray.get_runtime_context().get_node_id())
    reporter = Reporter(push)
    preemption.when_asked(reporter.request_stop)
    with contextlib.closing(reporter), captured(_log_to(reporter, rank), secrets.values()):
        try:
            return work(reporter)
        except BaseException:
            traceback.print_exc()
            raise


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
    return facts if device == "cpu" else replace(facts, capability=torch.cuda.get_device_capability(device))


def join(own: RankFacts) -> list[RankFacts]:
    """Opens the process group over the backend that fits all ranks; returns every rank's facts, by rank.

    One worker alone needs no group.
    """
    if own.world_size == 1:
        return [own]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    descriptor = listening() if own.rank == 0 else None
    store = dist.TCPStore(
        address, port, own.world_size, own.rank == 0, COLLECTIVE_TIMEOUT, master_listen_fd=descriptor
    )
    store.set(f"facts/{own.rank}", json.dumps(asdict(own)))
    everyone = [_facts(store.get(f"facts/{rank}")) for rank in range(own.world_size)]
    if (device := device_of(own)) != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend_of(everyone),
        store=dist.PrefixStore("group", store),
        rank=own.rank,
        world_size=own.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    return everyone


def _train(request: TrainRequest, reporter: Reporter) -> Any:
    device, precision = _meet(request, reporter)
    end = run.train(request, device=device, precision=precision, reporter=reporter)
    if dist.is_initialized():
        dist.destroy_process_group()
    return end


def _meet(request: TrainRequest, reporter: Reporter) -> tuple[str, str]:
    """Joins the others; (this worker's device, the precision of all)."""
    own = rank_facts()
    # DeepSpeed and others read these names
    names = {
        "RANK": own.rank,
        "WORLD_SIZE": own.world_size,
        "LOCAL_RANK": own.local_rank,
        "NODE_RANK": own.node_rank,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    everyone = join(own)
    device, precision = device_of(own), precision_of(request.spec.training.precision, everyone)
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # the same number on every attempt: sums are cut by threads, and runs are compared bit for bit
        torch.set_num_threads(max(1, int(request.plan.bundle.get("CPU", 1))))
        map_large_blocks()
    if own.rank == 0:
        backend = f" over {dist.get_backend()}" if dist.is_initialized() else ""
        message = f"{own.world_size} worker(s) on {device.partition(':')[0]}{backend}, {precision}"
        reporter.emit("state", state="starting", message=message)
    return device, precision


def _facts(stored: bytes) -> RankFacts:
    values = json.loads(stored)
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return RankFacts(**{**values, **lists})


def _log_to(reporter: Reporter, rank: int) -> Callable[[str], None]:
    return lambda text: reporter.emit("log", rank=rank, text=text)
