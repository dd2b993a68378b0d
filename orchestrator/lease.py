"""Who writes a run: a lease that its driver renews, and a fence that makes void what any other commits.

Both live in the run's run.json, so that whoever takes the lease changes the very document which every commit must
replace by compare-and-swap. A commit reads it, finds its own token and number there and writes it back changed; one
that was overtaken finds others, on any storage that has `objects.replace_if`, whatever its clock says.

No clock of another machine decides. A lease that looks fresh is refused at once; one that does not is watched for its
whole time on the reader's own monotonic clock, and taken if it was not renewed meanwhile. So a clock that is wrong
costs a newcomer at most another such time of waiting, and never takes a run from a driver that renews. A dead process
of this host is known as such and waits for nobody.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from . import objects, stored
from .errors import LeaseError
from .processes import ProcessId, is_alive, this_process

TTL_S, RENEW_S = 60.0, 15.0
"""How long a lease lasts without being renewed, and how often its driver renews it."""
POLL_S = 1.0
"""Between two looks at a lease that is watched."""
_MAX_TRIES = 50
_SILENT = 3
"""After so many times its duration a lease of another host counts as left where runs are listed."""

_held: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""What this process holds, by token: one that was dropped is nobody's."""


@dataclass(frozen=True)
class Holder:
    """Who writes a run. Times are unix seconds by the holder's clock; they are shown, and decide nothing."""

    process: ProcessId
    token: str
    since: float
    renewed: float
    beats: int = 0
    """How often it was renewed."""
    ttl_s: float = TTL_S

    @property
    def until(self) -> float:
        """When the lease runs out unless it is renewed."""
        return self.renewed + self.ttl_s

    def is_dead(self) -> bool:
        """Whether it is known to write no more: a process of this host that ended, or dropped the run."""
        if is_alive(self.process) is False:
            return True
        return self.process == this_process() and self.token not in _held

    def looks_renewed(self) -> bool:
        """Whether the clocks say that the lease still runs. They may be wrong: good for a refusal alone."""
        return abs(time.time() - self.renewed) < self.ttl_s

    def seems_gone(self) -> bool:
        """For lists of runs: dead, or of another host and silent for long by the clocks."""
        if self.is_dead():
            return True
        return is_alive(self.process) is None and time.time() - self.renewed > _SILENT * self.ttl_s

    def __str__(self) -> str:
        return f"{self.process.host} pid {self.process.pid} since {_clock(self.since)}"


@dataclass(frozen=True)
class Fence:
    """The right to commit to one run, as it travels to workers. A later number makes the earlier ones void."""

    url: str
    """Of run.json."""
    token: str = field(repr=False)
    """The driver's."""
    number: int
    """1 and more: raised by every driver that takes the run and for every group of workers that starts."""

    def advanced(self) -> Fence:
        """One for a new group of workers: what an earlier group still commits is refused from now on.

        Raises:
            LeaseError: another driver has taken the run over.
        """
        document = change(self.url, self.token, None, _raise_number)
        return Fence(self.url, self.token, document["fence"])

    def check(self) -> None:
        """Raises LeaseError where this number is void by now. A commit checks it again, in the same step."""
        _require(stored.load(objects.read(self.url)[0], self.url), self.token, self.number)

    def commit(self, edit: Callable[[dict[str, Any]], object]) -> None:
        """Changes run.json by `edit(document)`, which may be called more than once, if the number still holds.

        Raises:
            LeaseError: it is void; nothing was changed.
            StorageError: the storage does not take it.
        """
        change(self.url, self.token, self.number, edit)


def take(url: str, token: str, owner: object, say: Callable[[str], None]) -> dict[str, Any]:
    """Takes the lease of the run at `url` (its run.json) for `owner`; returns the document.

    Args:
        token: a new one; it is in nobody's hands.
        say: told in a sentence where a lease that was not renewed is watched before it is taken.

    Raises:
        LeaseError: another driver holds and renews it.
    """
    _held[token] = owner
    try:
        return _take(url, token, say)
    except BaseException:
        release(token)
        raise


def _take(url: str, token: str, say: Callable[[str], None]) -> dict[str, Any]:
    seen: tuple[str, int] | None = None
    began = 0.0
    while True:
        data, etag = objects.read(url)
        document = stored.load(data, url)
        holder = holder_of(document)
        if holder is not None and not holder.is_dead():
            beat = (holder.token, holder.beats)
            if (seen is None and holder.looks_renewed()) or (seen is not None and seen != beat):
                raise _is_held(document, holder)
            if seen is None:
                seen, began = beat, time.monotonic()
                say(
                    f"the lease of {holder} was not renewed for some time: it is watched for {holder.ttl_s:g} s "
                    "before this driver takes the run over"
                )
            if time.monotonic() - began < holder.ttl_s:
                time.sleep(min(POLL_S, holder.ttl_s / 4))
                continue
        now = time.time()
        document["fence"] += 1
        document["holder"] = {
            **asdict(this_process()), "token": token, "since": now, "renewed": now, "beats": 0, "ttl_s": TTL_S,
        }  # fmt: skip
        if objects.replace_if(url, etag, stored.dump(document)):
            return document


def release(token: str) -> None:
    """This process holds it no more."""
    _held.pop(token, None)


def change(
    url: str, token: str, number: int | None, edit: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Changes the document at `url` while `token` (and `number`, unless None) are the ones in it; returns it.

    Raises:
        LeaseError: they are not; nothing was changed.
        StorageError: the storage does not take it.
    """
    for _ in objects.turns(url, _MAX_TRIES, pause_s=0.01, longest_s=0.5):
        data, etag = objects.read(url)
        document = stored.load(data, url)
        _require(document, token, number)
        edit(document)
        document["updated"] = time.time()
        if objects.replace_if(url, etag, stored.dump(document)) is not None:
            break
    return document


def renew(document: dict[str, Any]) -> None:
    """Notes in the document that its holder lives."""
    if holder := document.get("holder"):
        holder["renewed"], holder["beats"] = time.time(), holder.get("beats", 0) + 1


def holder_of(document: dict[str, Any]) -> Holder | None:
    """Who holds the run that a document is of; None where nobody does."""
    held = document.get("holder")
    if not held:
        return None
    process = ProcessId(held["host"], held["boot"], held["pid"], held["started"])
    return Holder(
        process,
        held["token"],
        held["since"],
        held["renewed"],
        held.get("beats", 0),
        held.get("ttl_s", TTL_S),
    )


def _require(document: dict[str, Any], token: str, number: int | None) -> None:
    holder = holder_of(document)
    if holder is None or holder.token != token:
        raise LeaseError(
            f"run '{document['id']}' was taken over by {holder or 'another driver'}.",
            hint="This process stops writing it.",
        )
    if number is not None and document["fence"] != number:
        raise LeaseError(
            f"run '{document['id']}' has a later group of workers: number {document['fence']}, this is {number}.",
            hint="This process stops writing it.",
        )


def _raise_number(document: dict[str, Any]) -> None:
    document["fence"] += 1


def _is_held(document: dict[str, Any], holder: Holder) -> LeaseError:
    id = document["id"]
    return LeaseError(
        f"run '{id}' has a driver already: lease held by {holder}, until {_clock(holder.until)}.",
        hint=f"Follow it: raypeft logs {id} -f. Stop it: raypeft cancel {id}. If it is gone, the same command takes "
        "the run over once the lease has run out.",
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
