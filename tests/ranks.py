"""Runs a function on several ranks of a gloo process group: the one way tests exercise a collective.

The ranks are forks of this process, which has torch, transformers and deepspeed imported already: a pair
costs a second or two, where fresh interpreters cost ten to forty. Nothing is ever compiled, nothing waits
for ever, and no process is left behind.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist

_FORK = multiprocessing.get_context("fork")


class RankFailed(AssertionError):
    """One rank raised, died or ran out of time; the message holds its traceback."""


def run_on_ranks(
    fn: Callable[..., Any], world_size: int = 2, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """What `fn(*args)` returned on each of `world_size` gloo ranks, in the order of their ranks.

    The first rank to raise ends all of them, and its traceback is in the RankFailed that is raised here. A
    collective that waits for a peer gives up after a quarter of `timeout_s`, all ranks after `timeout_s`.
    Results travel pickled, so tensors are fine and modules seldom are.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes = [_FORK.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            _FORK.Process(
                target=_rank, args=(fn, args, rank, world_size, folder, pipes[rank][1], timeout_s / 4)
            )
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            for _, sender in pipes:
                sender.close()
            return _collect(ranks, [receiver for receiver, _ in pipes], time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
            for receiver, _ in pipes:
                receiver.close()


def _collect(ranks: list[Any], receivers: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(ranks):
        open_ones = [r for rank, r in enumerate(receivers) if rank not in results and rank not in failures]
        ready = wait(open_ones, timeout=max(deadline - time.monotonic(), 0))
        if not ready and failures:
            break
        if not ready:
            waiting = [rank for rank in range(len(ranks)) if rank not in results]
            raise RankFailed(f"ranks {waiting} of {len(ranks)} did not finish in time")
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                succeeded, result = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ranks[rank].join()
                failures[rank] = f"rank {rank} died with exit code {ranks[rank].exitcode}"
                continue
            if succeeded:
                results[rank] = result
            else:
                failures[rank] = f"rank {rank} raised\n{result}"
        if failures:
            # A rank whose peer is gone fails too; the one that began it is seldom heard first.
            deadline = min(deadline, time.monotonic() + 1.0)
    if failures:
        raise RankFailed("\n".join(failures.values()))
    return [results[rank] for rank in range(len(ranks))]


def _rank(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    folder: str,
    sender: Any,
    patience_s: float,
) -> None:
    # What the parent imported is looked through by no collection of garbage here, and stays shared.
    gc.freeze()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=patience_s)
        )
        outcome = (True, fn(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    # A plain exit would run the parent's atexit hooks, and wait for gloo's threads.
    os._exit(0)
