"""What Ray Tune holds in a trial's place, which trains elsewhere: all of them live in one actor.

Tune gives each trial an actor of its own, a second of a processor's time to start. Here what it takes for an actor's
class makes proxies in one that is there; their handles pass calls on to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import ray
from ray.exceptions import RayError
from ray.tune import Trainable
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

TRIAL = "trial"
"""The key of a trial's number in what Tune calls its config."""


class TrialProxy(Trainable):
    """Given to the next trial when its own has ended.

    Attributes:
        number: of the trial that it stands for. report: what its next step gives.
    """

    report: dict[str, Any]

    def setup(self, config: dict[str, Any]) -> None:
        """Stands for a trial."""
        self.number = config[TRIAL]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Stands for another trial."""
        self.number = new_config[TRIAL]
        return True

    def step(self) -> dict[str, Any]:
        """The trial's report."""
        return self.report

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: a trial's checkpoints are in its folder."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing, likewise."""


class ProxyHost:
    """The actor in which proxies live. Its methods run in one event loop, so what is told keeps its order."""

    def __init__(self) -> None:
        self._proxies: dict[int, TrialProxy] = {}
        self._told: dict[int, asyncio.Queue[tuple[int, dict[str, Any]]]] = {}

    async def open(self, place: int, arguments: dict[str, Any]) -> None:
        """Makes a proxy."""
        self._proxies[place], self._told[place] = TrialProxy(**arguments), asyncio.Queue()

    async def tell(self, place: int, number: int, report: dict[str, Any]) -> None:
        """A report of a trial, from the driver."""
        self._told[place].put_nowait((number, report))

    async def ask(self, place: int, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What a method of a proxy gives; a step, once there is a report. Those of the trial before that came too late
        are passed over."""
        proxy = self._proxies[place]
        while method == "train":
            number, proxy.report = await self._told[place].get()
            if number == proxy.number:
                break
        return getattr(proxy, method)(*arguments, **named)

    async def end(self, place: int) -> None:
        """Takes a proxy away."""
        self._proxies.pop(place, None)
        self._told.pop(place, None)


class Proxies:
    """What Tune takes for an actor's class. The actor is on the driver's node, with which it would be lost anyway, and
    starts again where it dies, without the proxies that it had: their trials fail in Tune's eyes, which begins them
    again."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        host: Any = ray.remote(num_cpus=0, max_restarts=-1)(ProxyHost)
        self._host = host.options(scheduling_strategy=here).remote()
        self._opened = 0

    def remote(self, **arguments: Any) -> ProxyHandle:
        """Makes a proxy; arguments are those of a Trainable."""
        self._opened += 1
        return ProxyHandle(self._host, self._opened, arguments)

    def close(self) -> None:
        """Ends the actor."""
        with contextlib.suppress(RayError):
            ray.kill(self._host)


class ProxyHandle:
    """What Tune takes for an actor's handle: `handle.METHOD.remote(...)` gives an ObjectRef."""

    def __init__(self, host: Any, place: int, arguments: dict[str, Any]) -> None:
        self._host, self._place, self._arguments = host, place, arguments

    def __getattr__(self, method: str) -> _Method:
        return _Method(self, method)

    def call(self, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> ray.ObjectRef:
        """Passes a call on."""
        if method == "__ray_ready__":
            return self._host.open.remote(self._place, self._arguments)
        if method == "__ray_terminate__":
            return self._host.end.remote(self._place)
        if method == "tell":
            return self._host.tell.remote(self._place, *arguments)
        return self._host.ask.remote(self._place, method, arguments, named)


class _Method:
    def __init__(self, handle: ProxyHandle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *arguments: Any, **named: Any) -> ray.ObjectRef:
        return self._handle.call(self._name, arguments, named)
