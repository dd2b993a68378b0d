"""Which replica a request goes to: one that holds what it asks for. Serve runs this in its proxies.

Serve sends the class to processes where this project may not be installed, by value: this file imports nothing of
ours. What replicas hold they say themselves (`Replica.record_routing_stats`); what a request asks for stands in the
header that `asked_model` sets. Where neither is known, the least loaded replica answers: nothing here decides what an
answer is.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter, OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

MODELS, HAS_ROOM = "models", "has_room"
"""Keys of what a replica says of itself: the names that it answers to without loading anything, and whether one more
adapter would make none leave."""
REGISTRY = "registry"
"""Key of what a router is given: the endpoint's registry, which others read from Serve's configuration."""

SPARE_REQUESTS = 16
"""A holder with so many requests more than the least loaded replica is overloaded."""
REMEMBERED_S = 5.0
"""How long a replica counts as a holder because it was given a request: until it says so itself."""
LATELY_S = 60.0
"""How long a model counts as one that a replica is asked for."""
MOST_REMEMBERED = 1024


class ResidencyRouter(RequestRouter):
    """A request goes to the least loaded replica that holds its model; where none does, or those are overloaded, to the
    least loaded of all, which then loads it. Among equals one with room for an adapter, or else the one that was asked
    for the fewest of late, whatever else it holds, and then always the same one for the same model, so that replicas
    come to hold different ones; any of them where no model is known."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._given: OrderedDict[str, tuple[ReplicaID, float]] = OrderedDict()
        """Model -> the replica that was last given a request for it while none held it, and when."""
        self._last: OrderedDict[str, tuple[ReplicaID, float]] = OrderedDict()
        """Model -> the replica that was last given a request for it, and when."""

    def initialize_state(self, registry: str = "") -> None:
        """Takes the router's options; none of them changes what it does."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates, one a rank, the best first."""
        # An index for routers that serve first who came first: nobody else takes out of it what is put in.
        getattr(self, "_pending_requests_by_model_id", {}).clear()
        model = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        load = {each.replica_id: self._load(each) for each in candidate_replicas}
        least = min(load.values(), default=0)
        parts = parts_of(model)
        held = {each.replica_id: self._num_held(each, model, parts) for each in candidate_replicas}
        free = {each for each in load if load[each] <= least + SPARE_REQUESTS}
        # Of two that hold a model one may never be asked for it, and would keep its place for nothing.
        asked = Counter() if any(held.values()) else self._asked_lately(model)

        def rank(replica: RunningReplica) -> tuple[Any, ...]:
            id = replica.replica_id
            has_room = bool(replica.routing_stats.get(HAS_ROOM, True))
            return (-held[id] if id in free else 0, load[id], not has_room, asked[id], _order(model, id))

        ranked = sorted(candidate_replicas, key=rank)
        if ranked and model:
            _remember(self._last, model, ranked[0].replica_id)
            if held[ranked[0].replica_id] < len(parts):
                _remember(self._given, model, ranked[0].replica_id)
        return [[each] for each in ranked]

    def _load(self, replica: RunningReplica) -> int:
        """Requests that it answers now, as far as is known here."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def _num_held(self, replica: RunningReplica, model: str, parts: frozenset[str]) -> int:
        """How many of a request's adapters it holds, or will in a moment."""
        given = self._given.get(model)
        if (
            given is not None
            and given[0] == replica.replica_id
            and time.monotonic() - given[1] < REMEMBERED_S
        ):
            return len(parts)
        return len(parts.intersection(replica.routing_stats.get(MODELS, ())))

    def _asked_lately(self, model: str) -> Counter[ReplicaID]:
        """How many other adapters each replica was asked for of late, whatever version of them."""
        since = time.monotonic() - LATELY_S
        recent = {(id, _name(each)) for each, (id, when) in self._last.items() if when > since}
        return Counter(id for id, name in recent if name != _name(model))


def _name(model: str) -> str:
    return model.partition("@")[0]


def _remember(where: OrderedDict[str, tuple[ReplicaID, float]], model: str, replica: ReplicaID) -> None:
    where[model] = (replica, time.monotonic())
    where.move_to_end(model)
    while len(where) > MOST_REMEMBERED:
        where.popitem(last=False)


def parts_of(model: str) -> frozenset[str]:
    """The adapters that a request's `model` names: one, or those of an ensemble, `a:0.7+b:0.3`."""
    return frozenset(name for part in model.split("+") if (name := part.partition(":")[0].strip()))


def _order(model: str, replica: ReplicaID) -> bytes:
    """An order of the replicas that is another one for each model, and without one another one each time."""
    if not model:
        return random.randbytes(8)
    return hashlib.blake2b(f"{model}\0{replica.unique_id}".encode(), digest_size=8).digest()
