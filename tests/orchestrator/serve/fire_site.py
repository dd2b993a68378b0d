"""An endpoint of several replicas with adapters of several methods, more than a replica may hold at once, and all that
can be done to it while it answers."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

from orchestrator.identity import base_identity
from orchestrator.lineage import Lineage
from orchestrator.registry import AdapterVersion, Registry
from orchestrator.serve import code_version
from orchestrator.serve.endpoints import RayEndpoints
from orchestrator.serve.rollouts.reports import Report, Reports
from orchestrator.spec.job import DeploySpec
from tests.orchestrator.serve import tiny
from tests.orchestrator.serve.fire import Load, References, Timeline
from tests.orchestrator.serve.test_endpoints import replica_pids, wait_for

STAYING = {"lora-one": "lora", "ia3-one": "ia3", "prompt-one": "prompt", "lora-two": "lora"}
"""Adapters that nothing happens to, by their methods."""
METHODS = ("lora", "ia3", "prompt")


class FireSite:
    """The endpoint `tiny`, with `STAYING`, and `swap`, whose versions change.

    Args:
        slots: adapters that a replica may hold at once.
    """

    def __init__(self, folder: Path, port: int, *, num_replicas: int = 2, slots: int | None = 5) -> None:
        self.num_replicas, self._slots = num_replicas, slots
        self.base = tiny.save_base(folder / "tiny")
        self.registry, self._scratch = Registry(folder / "registry"), folder / "scratch"
        self.endpoints = RayEndpoints(self.registry, port=port, local=True)
        self.reports = Reports(self.registry.url, "tiny")
        self.references, self.timeline = References(self.base), Timeline()
        self.load: Load | None = None
        self._seeds, self._codes = itertools.count(1), itertools.count(1)
        self._prepared: dict[str, list[Path]] = {method: [] for method in METHODS}
        self.url = ""

    def prepare(self, num_each: int) -> None:
        """Makes adapters of each method, none of which answers as another does, and their references."""
        for method in METHODS:
            while len(self._prepared[method]) < num_each:
                seed = next(self._seeds)
                folder = tiny.save_adapter(self.base, self._scratch / f"{method}-{seed}", method, seed=seed)
                if self.references.prepare(folder):
                    self._prepared[method].append(folder)

    def start(self) -> None:
        """Has the endpoint answer as all that it begins with."""
        for name, method in STAYING.items():
            self._deploy(self._register(name, method))
        self.swap(keep=True)

    def under_load(self, num_clients: int = 8, pause_s: float = 0.0) -> AbstractContextManager[Load]:
        """Clients who ask for the base, for `STAYING` and for `swap`, within the context."""
        self.load = Load(self.url, ["tiny", *STAYING, "swap"], num_clients=num_clients, pause_s=pause_s)
        return self.load

    # what is done to it

    def swap(self, *, keep: bool = False, again: bool = False) -> str:
        """A new version of `swap`, of another method than the one before, takes over; that one goes unless `keep`.

        Args:
            again: what it is made of may serve once more later.
        """
        before = self.registry.aliases("swap").get("production") if "swap" in self.registry.names() else None
        method = METHODS[(before or 0) % len(METHODS)]
        version = self._register("swap", method, again=again)
        self.timeline.move("swap", version.ref, lambda: self._deploy(version))
        if before is not None and not keep:
            self.endpoints.undeploy("tiny", f"swap@{before}")
        return version.ref

    def swap_back(self) -> None:
        """A new version of `swap` takes over; then its alias goes back to the version before, and on again."""
        self.swap(keep=True)
        now = self.registry.aliases("swap")["production"]
        for number in (now - 1, now):
            act = self._alias_mover(number)
            self.timeline.move("swap", f"swap@{number}", act)
            time.sleep(1)
        self.endpoints.undeploy("tiny", f"swap@{now - 1}")

    def come(self) -> None:
        """A version of `guest` is deployed, and asked for."""
        assert self.load is not None
        version = self._register("guest", "lora")
        self.timeline.move("guest", version.ref, lambda: self._deploy(version))
        self.load.models = [*self.load.models, "guest"]

    def go(self) -> None:
        """`guest` is asked for no more and, its answers still under way, taken away."""
        assert self.load is not None
        self.load.models = [model for model in self.load.models if model != "guest"]
        time.sleep(1)  # a client that has drawn it has sent it by now
        self.endpoints.undeploy("tiny", "guest")
        self.timeline.note("guest is gone")

    def kill(self, but: Collection[int] = ()) -> int:
        """SIGKILL to a replica, none of `but`, as soon as there is one; returns its pid."""
        pid: int = wait_for(lambda: next((pid for pid in replica_pids("tiny") if pid not in but), None))
        self.timeline.kills.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)
        self.timeline.note(f"replica {pid} is killed")
        return pid

    def roll(self) -> list[int]:
        """Replicas of other code begin to take the places of those that run; returns the pids of these."""
        pids = replica_pids("tiny")
        code = f"code-{next(self._codes)}"
        # It stays: what is deployed later is of this code too.
        mock.patch.object(code_version, "_code", lambda: code).start()
        self.endpoints.deploy(self.registry.get("lora-one"), str(self.base), "main", DeploySpec())
        self.timeline.note("other code is rolled out")
        return pids

    # how it stands

    def live(self) -> list[Report]:
        """What its replicas say of themselves."""
        return [report for report in self.reports.read() if report.is_live(time.time())]

    def wait_until_whole(self, without: list[int] | None = None, timeout_s: float = 120) -> None:
        """Returns once all replicas run, none of them one of `without`."""
        gone = set(without or ())

        def is_whole() -> bool:
            pids = set(replica_pids("tiny"))
            return len(pids) == self.num_replicas and not pids & gone

        wait_for(is_whole, timeout_s=timeout_s)
        wait_for(lambda: len(self.live()) >= self.num_replicas, timeout_s=timeout_s)

    def close(self) -> None:
        """Ends the endpoint."""
        mock.patch.stopall()
        for row in self.endpoints.status():
            self.endpoints.undeploy(row.name)

    # inside

    def _register(self, name: str, method: str, *, again: bool = False) -> AdapterVersion:
        if not self._prepared[method]:
            self.prepare(1)
        folder = self._prepared[method].pop(0)
        if again:
            self._prepared[method].append(folder)
        lineage = Lineage(base=base_identity(str(self.base)), gate_passed=True)
        version = self.registry.register(name, folder, lineage)
        self.references.learn(version.ref, folder)
        if name in STAYING:
            self.timeline.moves[name] = [(float("-inf"), float("-inf"), version.ref)]
        return version

    def _deploy(self, version: AdapterVersion) -> Any:
        more: dict[str, Any] = {}
        if not self.url:
            more = {"num_replicas": self.num_replicas, "engine": {"max_adapters": self._slots or "auto"}}
        made = self.endpoints.deploy(version, str(self.base), "main", DeploySpec(**more))
        self.url = made.url
        return made

    def _alias_mover(self, number: int) -> Callable[[], Any]:
        return lambda: self.registry.set_alias("swap", number, "production")
