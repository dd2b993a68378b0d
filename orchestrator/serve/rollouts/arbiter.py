"""The one replica of an endpoint that decides its rollouts: whoever holds the lease looks at what all replicas report,
asks `rollout.decide`, and carries the step out."""

from __future__ import annotations

import logging
import secrets
import time

from orchestrator import lease, objects, stored
from orchestrator.errors import LeaseError
from orchestrator.registry import Registry

from ..rollout import decide
from .promotion import desired_of, finish, take_step
from .reports import Reports, observe

_log = logging.getLogger("ray.serve")


class Arbiter:
    """One replica's part in it. Its methods block; one thread calls them.

    Args:
        replica: its name, for the audit log.
    """

    def __init__(self, registry: Registry, endpoint: str, replica: str) -> None:
        self._registry, self._endpoint, self._replica = registry, endpoint, replica
        self._reports = Reports(registry.url, endpoint)
        self._token: str | None = None
        self._renewed = float("-inf")

    @property
    def holds(self) -> bool:
        """Whether this replica decides."""
        return self._token is not None

    def step(self) -> bool:
        """Looks once, and takes the steps that are due; returns whether this replica decides.

        Raises:
            StorageError: the storage does not answer.
        """
        desired = desired_of(self._registry, self._endpoint)
        if desired is None or not desired.rollouts:
            self.leave()
            return False
        try:
            self._hold()
            for rollout in desired.rollouts:
                now = time.time()
                seen = observe(rollout, self._reports.read(), now)
                due = decide(rollout, seen, now)
                if due is not None:
                    self._confirm()
                    take_step(self._registry, self._endpoint, rollout, due, by=self._replica)
            after = desired_of(self._registry, self._endpoint)
            for rollout in after.rollouts if after else ():
                if rollout.state in ("promoting", "withdrawing"):
                    self._confirm()
                    finish(self._registry, self._endpoint, rollout, by=self._replica)
        except LeaseError:
            self._forget()  # another replica decides
        return self.holds

    def leave(self) -> None:
        """Lets the lease go, so that the next one need not wait for its end."""
        if self._token is None:
            return
        try:
            lease.change(
                self._reports.lease_url, self._token, None, lambda document: document.pop("holder", None)
            )
        except LeaseError as error:
            _log.debug("the lease was another's already: %s", error)
        self._forget()

    def _hold(self) -> None:
        """Has the lease, renewed.

        Raises:
            LeaseError: another replica has it.
        """
        if self._token is None:
            url = self._reports.lease_url
            objects.create_if_absent(url, stored.dump({"id": self._endpoint, "fence": 0, "holder": None}))
            token = secrets.token_hex(8)
            lease.take(url, token, self, _log.info)
            self._token, self._renewed = token, time.monotonic()
        elif time.monotonic() - self._renewed > lease.RENEW_S:
            self._confirm()

    def _confirm(self) -> None:
        """Renews the lease, which fails where another has taken it."""
        assert self._token is not None
        lease.change(self._reports.lease_url, self._token, None, lease.renew)
        self._renewed = time.monotonic()

    def _forget(self) -> None:
        if self._token is not None:
            lease.release(self._token)
        self._token = None
