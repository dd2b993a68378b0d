"""Whether a request is taken now: rates, budgets, and how many may wait."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from orchestrator.errors import RaypeftError
from orchestrator.spending import Used, falls_in, next_period

from ..api_error import ApiError
from .key_check import KeyCheck, Tenant
from .replies import Usage
from .token_bucket import TokenBucket

_log = logging.getLogger("ray.serve")

MAX_PER_ADAPTER = 256
"""Answers of one adapter that run or wait on a replica."""
MAX_PER_TENANT = 256
"""Likewise of one tenant, where its limits say nothing else."""
MAX_IN_ALL = 1024
_BOOKED_EVERY_S = 5.0
_DAY_S = 86400
_RETRY_S = 2.0
"""When a queue that is full may have room again."""


class Books(Protocol):
    """Where spending is kept; see `spending.Spending`."""

    def read(self, tenant: str) -> Used:
        """What a tenant has used so far."""

    def add(self, tenant: str, tokens: int, requests: int, now: float) -> Used:
        """Adds to a tenant's books what was spent at `now` (Unix seconds)."""


class Admission:
    """The door of one replica.

    Args:
        keys: tells tenants apart; None: everybody is the same one.
        books: where spending is kept; None: nowhere.
        num_replicas: how many replicas share a tenant's rates.
        clock: seconds, never backwards.
        now: Unix seconds.
    """

    def __init__(
        self,
        keys: KeyCheck | None = None,
        books: Books | None = None,
        *,
        num_replicas: Callable[[], int] = lambda: 1,
        max_per_adapter: int = MAX_PER_ADAPTER,
        max_per_tenant: int = MAX_PER_TENANT,
        max_in_all: int = MAX_IN_ALL,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._keys, self._books, self._num_replicas = keys, books, num_replicas
        self._max_per_adapter, self._max_per_tenant = max_per_adapter, max_per_tenant
        self._max_in_all = max_in_all
        self._clock, self._now = clock, now
        self._buckets: dict[tuple[str, str], TokenBucket] = {}
        self._under_way: Counter[tuple[str, str]] = Counter()
        self._reserved: Counter[str] = Counter()
        self._unbooked: defaultdict[str, dict[int, list[int]]] = defaultdict(dict)
        """Tenant -> day (since 1970, UTC) -> tokens and requests."""
        self._used: dict[str, tuple[float, Used]] = {}
        self._booking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads the keys, and begins to write down what is spent."""
        if self._keys is not None:
            await self._keys.start()
        self._booking = asyncio.create_task(self._book_always())

    async def stop(self) -> None:
        """Writes down what is still open."""
        if self._booking is not None:
            self._booking.cancel()
            with suppress(asyncio.CancelledError):
                await self._booking
        await self._book()

    async def tenant(self, authorization: str | None) -> Tenant:
        """Who asks.

        Raises:
            ApiError: 401.
        """
        return Tenant() if self._keys is None else await self._keys.tenant(authorization)

    async def know(self, tenant: Tenant) -> None:
        """Reads what a tenant with a budget has used, at other replicas too, where that was long ago. A storage that
        does not answer leaves in force what was known.

        Raises:
            ApiError: 503: it was never known here, so nothing can be held against the budget.
        """
        if tenant.limits.token_budget is None or self._books is None:
            return
        read_at, used = self._used.get(tenant.name, (float("-inf"), Used()))
        if self._clock() - read_at < _BOOKED_EVERY_S:
            return
        is_known = tenant.name in self._used
        if is_known:  # whoever else comes now need not read it too
            self._used[tenant.name] = (self._clock(), used)
        try:
            used = await asyncio.to_thread(self._books.read, tenant.name)
        except (RaypeftError, OSError) as error:
            _log.warning("what '%s' has used is not read: %s", tenant.name, error)
            if is_known or tenant.name in self._used:
                return
            raise ApiError(
                "What you have used of your budget cannot be read now. Try again a little later.",
                status=503,
                code="budget_unknown",
                retry_after_s=_RETRY_S,
            ) from error
        self._used[tenant.name] = (self._clock(), used)

    @contextmanager
    def admitted(
        self, tenant: Tenant, adapter: str, num_answers: int, num_tokens: int, usage: Usage
    ) -> Iterator[None]:
        """Within it a request is under way.

        Args:
            num_answers: sequences that it generates.
            num_tokens: the most that prompt and answers can take; what is left of it is given back at the end.
            usage: what it has taken, read at the end.

        Raises:
            ApiError: 429, with when to come again.
        """
        places = {("in all", ""): self._max_in_all, ("adapter", adapter): self._max_per_adapter}
        if tenant.name:
            limit = tenant.limits.max_parallel
            places["tenant", tenant.name] = self._max_per_tenant if limit is None else limit
        self._check_places(places, num_answers)
        buckets = self._check_rates(tenant, num_tokens)
        self._check_budget(tenant, num_tokens)
        for bucket, amount in buckets.values():
            bucket.take(amount, self._clock())
        for place in places:
            self._under_way[place] += num_answers
        self._reserved[tenant.name] += num_tokens
        try:
            yield
        finally:
            for place in places:
                self._under_way[place] -= num_answers
                if not self._under_way[place]:
                    del self._under_way[place]
            self._reserved[tenant.name] -= num_tokens
            spent = usage.prompt_tokens + usage.completion_tokens
            if "tokens" in buckets:
                buckets["tokens"][0].take(spent - num_tokens, self._clock())
            if tenant.name:
                book = self._unbooked[tenant.name].setdefault(int(self._now() // _DAY_S), [0, 0])
                book[0] += spent
                book[1] += 1

    def _check_places(self, places: dict[tuple[str, str], int], num_answers: int) -> None:
        for place, limit in places.items():
            if self._under_way[place] + num_answers <= limit:
                continue
            kind, name = place
            whose = {"adapter": f"for the model '{name}'", "tenant": "of yours"}.get(kind, "here")
            if num_answers > limit:
                raise ApiError(
                    f"You asked for {num_answers} answers at once, and {limit} may be under way {whose}.",
                    param="n",
                )
            raise ApiError(
                f"{self._under_way[place]} answers are under way or waiting {whose}, and {limit} may be. Try again "
                "a little later.",
                status=429,
                code="queue_full",
                retry_after_s=_RETRY_S,
            )

    def _check_rates(self, tenant: Tenant, num_tokens: int) -> dict[str, tuple[TokenBucket, int]]:
        limits, asked = tenant.limits, {}
        for what, rate, amount in (
            ("requests", limits.requests_per_minute, 1),
            ("tokens", limits.tokens_per_minute, num_tokens),
        ):
            if rate is None:
                continue
            now, share = self._clock(), rate / max(1, self._num_replicas())
            bucket = self._buckets.setdefault((tenant.name, what), TokenBucket(share, now))
            bucket.set_rate(share, now)
            if wait := bucket.wait_s(amount, now):
                raise ApiError(
                    f"Rate limit reached for '{tenant.name}' on {what} per minute: {rate}. Try again in "
                    f"{wait:.1f} s.",
                    status=429,
                    code="rate_limit_exceeded",
                    retry_after_s=min(wait, 3600),
                )
            asked[what] = (bucket, amount)
        return asked

    def _check_budget(self, tenant: Tenant, num_tokens: int) -> None:
        budget, period = tenant.limits.token_budget, tenant.limits.budget_period
        if budget is None:
            return
        now = self._now()
        booked = self._used.get(tenant.name, (0.0, Used()))[1]
        unbooked = self._unbooked[tenant.name].items()
        used = booked.tokens_in(period, now)
        used += sum(tokens for day, (tokens, _) in unbooked if falls_in(period, day * _DAY_S, now))
        if used + self._reserved[tenant.name] + num_tokens <= budget:
            return
        again = next_period(period, now)
        left = max(0, budget - used)
        whose = {"day": "today's", "month": "this month's", "total": "your"}[period]
        raise ApiError(
            f"This request may take {num_tokens} tokens, and of {whose} budget of {budget} are left {left}"
            + (" (less what runs now)." if self._reserved[tenant.name] else "."),
            status=429,
            code="insufficient_quota",
            retry_after_s=None if again is None else again - now,
        )

    async def _book_always(self) -> None:
        while True:
            await asyncio.sleep(_BOOKED_EVERY_S)
            await self._book()

    async def _book(self) -> None:
        """Writes down what was spent since the last time; what cannot be written waits for the next."""
        if self._books is None:
            self._unbooked.clear()
            return
        for tenant, days in list(self._unbooked.items()):
            for day, (tokens, requests) in list(days.items()):
                try:
                    used = await asyncio.to_thread(self._books.add, tenant, tokens, requests, day * _DAY_S)
                except (RaypeftError, OSError) as error:
                    _log.warning("what '%s' has used is not written down yet: %s", tenant, error)
                    break
                days[day][0] -= tokens
                days[day][1] -= requests
                if not days[day][1]:
                    del days[day]
                self._used[tenant] = (self._clock(), used)
