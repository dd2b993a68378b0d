"""One worker of a warm group: the base is loaded once, runs come and go by orders from the driver.

Rank 0 hears the orders and passes them on, so that every rank does the same between the same two rounds.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayError

from orchestrator.errors import ModelError, TrainingError
from orchestrator.runner import TrainRequest
from peft_dist.errors import BaseModelError, PeftDistError

from ..events import Reporter
from ..group import Group
from ..packing import Packing
from .ground import Ground
from .pack import Pack
from .run import telling

IDLE_S = 5.0
"""How long a group without runs waits for an order before its ranks tell each other that they are there."""


class Voice:
    """What tells of one run of the group; `trial.LeavesAlone`."""

    def __init__(self, name: str, reporter: Reporter, is_first: bool) -> None:
        self._name, self._reporter, self._is_first = name, reporter, is_first
        self.stop_requested, self.saves = False, True

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Tells an event of the run, on rank 0."""
        if self._is_first:
            self._reporter.emit(kind, trial=self._name, **fields)


class Inbox:
    """Rank 0's orders, as they come.

    Args:
        fetch: waits up to so many seconds for orders.
        at_once: told of each order on arrival, in a thread of the inbox's own.
    """

    def __init__(
        self, fetch: Callable[[float], list[dict[str, Any]]], at_once: Callable[[dict[str, Any]], None]
    ) -> None:
        self._fetch, self._at_once = fetch, at_once
        self._orders: deque[dict[str, Any]] = deque()
        self._arrived, self._closed = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def take(self, timeout_s: float) -> list[dict[str, Any]]:
        """All orders since the last call; waits so long for the first."""
        if timeout_s and not self._orders:
            self._arrived.wait(timeout_s)
        self._arrived.clear()
        return [self._orders.popleft() for _ in range(len(self._orders))]

    def close(self) -> None:
        """Listens no more."""
        self._closed.set()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                orders = self._fetch(IDLE_S)
            except RayError:
                orders = [{"do": "close"}]  # the driver is gone, and with it whoever would read of the runs
                self._closed.set()
            for order in orders:
                self._at_once(order)
                self._orders.append(order)
            if orders:
                self._arrived.set()


class Serving:
    """The group's runs, those inside and those in line, on this rank."""

    def __init__(
        self,
        pack: Pack,
        group: Group,
        reporter: Reporter,
        places: int | None,
        fetch: Callable[[float], list[dict[str, Any]]],
    ) -> None:
        self._pack, self._group, self._reporter, self._places = pack, group, reporter, places
        self._line: deque[dict[str, Any]] = deque()
        self._voices: dict[str, Voice] = {}
        self._ends = False
        self._inbox = Inbox(fetch, self._heard) if group.is_first else None

    def run(self) -> None:
        """Until it is told to close, or a worker is told to go."""
        try:
            while not self._ends:
                self._obey()
                self._fill()
                self._pack.round()
                self._voices = {name: self._voices[name] for name in self._known() if name in self._voices}
        finally:
            if self._inbox is not None:
                self._inbox.close()

    def _known(self) -> list[str]:
        return [*self._pack.trials, *(order["trial"] for order in self._line)]

    def _heard(self, order: dict[str, Any]) -> None:
        """On arrival, amid a step: a run that is to leave does not finish its evaluation."""
        if order["do"] == "leave" and (voice := self._voices.get(order["trial"])):
            voice.saves, voice.stop_requested = order["save"], True

    def _obey(self) -> None:
        is_idle = not self._pack.trials and not self._line
        own = self._inbox.take(IDLE_S if is_idle else 0.0) if self._inbox else []
        count, leaves = self._group.sum([float(len(own)), float(self._reporter.stop_requested)])
        orders = self._group.gather_plain(own)[0] if count else []
        for order in orders:
            getattr(self, f"_{order['do']}")(order)
        if leaves:
            self._close({})

    def _enter(self, order: dict[str, Any]) -> None:
        self._line.append(order)

    def _leave(self, order: dict[str, Any]) -> None:
        waiting = next((each for each in self._line if each["trial"] == order["trial"]), None)
        if waiting is None:
            self._pack.leave(order["trial"], order["save"])
            return
        self._line.remove(waiting)
        self._voice(order["trial"]).emit("left", step=0, checkpoint=None)

    def _close(self, _: dict[str, Any]) -> None:
        for order in list(self._line):
            self._leave({"trial": order["trial"], "save": False})
        for name in list(self._pack.trials):
            self._pack.leave(name)
        self._ends = True

    def _fill(self) -> None:
        """Those in line enter, as far as there is room."""
        while self._line and (self._places is None or len(self._pack.trials) < self._places):
            order = self._line.popleft()
            name = order["trial"]
            self._pack.enter(name, order["request"], self._voice(name), order["from_checkpoint"])

    def _voice(self, name: str) -> Voice:
        if name not in self._voices:
            self._voices[name] = Voice(name, self._reporter, self._group.is_first)
        return self._voices[name]


def serve(
    request: TrainRequest,
    mailbox: Any,
    reporter: Reporter,
    *,
    device: str,
    precision: str,
    packing: Packing = Packing(),
) -> dict[str, Any]:
    """A worker's part of a warm group, from loading the base to its end.

    Args:
        packing: how runs stand on the base.

    Returns:
        `is_asked`: whether it was the driver that ended it.

    Raises:
        RaypeftError: the base or the data cannot be loaded.
    """
    began = time.monotonic()
    group = Group(device)
    emit = telling(reporter, group)
    try:
        ground = Ground(request, group, precision, emit)
    except BaseModelError as error:
        raise ModelError(str(error), where="model.base_model") from error
    except PeftDistError as error:
        raise TrainingError(str(error), where=f"run {request.run_id}") from error
    message = f"{request.spec.model.base_model} is loaded"
    emit("ready", seconds=time.monotonic() - began, device=device, precision=precision, message=message)
    if ground.alone and packing.places != 1:
        emit("warning", message=f"runs stand on the base one after the other: {ground.alone}")
        packing = replace(packing, places=1)
    pack = Pack(ground, packing, emit)
    Serving(pack, group, reporter, packing.places, lambda s: ray.get(mailbox.orders.remote(s))).run()
    if dist.is_initialized():
        dist.destroy_process_group()
    return {"is_asked": not reporter.stop_requested}
