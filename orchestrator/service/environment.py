"""What use cases work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ..cluster import Cluster, ClusterFacts
from ..registry import AdapterVersion, Registry
from ..runner import Event, Runner
from ..spec.job import DeploySpec, JobSpec
from ..store import RunStore
from ..tracking.session import Tracking
from .results import Deployment

OnEvent = Callable[[Event], None]


class Endpoints(Protocol):
    """What the service asks of whatever serves."""

    def deploy(
        self,
        version: AdapterVersion,
        base_model: str,
        revision: str,
        deploy: DeploySpec,
        *,
        force: bool,
        on_event: OnEvent,
    ) -> Deployment:
        """Finds or starts the endpoint of the version's base and has it serve the version."""

    def undeploy(self, name: str, adapter: str | None = None) -> None:
        """Takes one adapter, or the whole endpoint, out of service."""


@dataclass(frozen=True)
class Environment:
    """One cluster with its storage: what each use case works on."""

    cluster: Cluster
    runs: RunStore
    registry: Registry
    open_runner: Callable[[], Runner]
    open_endpoints: Callable[[], Endpoints]
    facts: Callable[[], ClusterFacts | None]
    open_sweep: Callable[[], Runner] | None = None
    """What trains a job with a sweep; None: jobs without one alone."""
    open_tracking: Callable[[JobSpec, Mapping[str, str]], Tracking] = lambda spec, secrets: Tracking()
    """The trackers that a job asks for, given its secrets."""
