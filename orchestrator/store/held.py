"""A run while one driver writes it."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from .. import lease, objects, stored
from ..errors import LeaseError, RaypeftError, RunError, StorageError
from ..journal import Journal, read_lines
from ..lease import Fence
from ..objects import join
from ..run_state import ENDED, check_transition, has_ended
from ..runner import Event
from ..spec.canonical import canonical_hash, resolved_yaml
from ..spec.job import JobSpec
from .record import RunRecord, forget_spent, log_url, read_record, run_identity
from .resuming import TRAINS_ON, is_below


class Run:
    """One run, held for writing from its making to `close` (or the end of `with`). Its lease is renewed meanwhile.

    Raises:
        LeaseError: somebody else writes it.
    """

    def __init__(
        self, store_url: str, id: str, spec: JobSpec, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.id, self.spec = id, spec
        self.url = join(store_url, id)
        self._token = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._journals: dict[str, Journal] = {}
        self._lost: LeaseError | None = None
        self._clock: tuple[float, float] | None = None
        self._on_lost: Callable[[], None] = lambda: None
        self._document = lease.take(join(self.url, "run.json"), self._token, self, say)
        self.fence = Fence(join(self.url, "run.json"), self._token, self._document["fence"])
        """What commits of this run carry; a group of workers takes an advanced one."""
        try:
            if not objects.exists(join(self.url, "spec.yaml")):
                objects.write(join(self.url, "spec.yaml"), self._document["spec"].encode())
        except StorageError:
            with contextlib.suppress(RaypeftError):
                self.close()
            raise
        threading.Thread(
            target=_renew, args=(weakref.ref(self), self._closed), name=f"renews {id}", daemon=True
        ).start()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None and self.record.state not in ENDED:
                stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
                cause = str(error) if isinstance(error, RaypeftError) else f"{type(error).__name__}: {error}"
                self.set_state("interrupted" if stopped else "failed", cause=cause)
        except RaypeftError:
            if error is None:
                raise  # else the error that ends the run is the one to tell
        finally:
            self.close()

    @property
    def record(self) -> RunRecord:
        """As it stands."""
        return read_record(self._document, self.url)

    @property
    def training_id(self) -> str:
        """What a version's lineage names as its run: another one after a resume that trains on."""
        return self._document["training_id"]

    @property
    def done(self) -> str | None:
        """`NAME@V` where all was done before; None while something is left to do."""
        return self.record.adapter if self.record.state == "done" else None

    def set_state(self, state: str, *, message: str | None = None, **facts: Any) -> Event:
        """The one way from state to state: stores it with what is known now, and emits and returns the event.

        Args:
            facts: `adapter`, `metrics`, `endpoint`, `cause`, or anything else worth keeping. A cause is
                forgotten as soon as the run is at work again.

        Raises:
            RunError: another process took the run over.
        """
        check_transition(self._document["state"], state)

        def change(document: dict[str, Any]) -> None:
            if document["state"] == "done" and state == "starting":  # its version was deleted: made once more
                document.update(adapter=None, endpoint=None, metrics={})
                forget_spent(document)
            document["state"], document["message"] = state, message
            if state not in ("failed", "interrupted"):
                document["cause"] = None
            for name, value in facts.items():
                known = name in ("adapter", "metrics", "endpoint", "cause")
                (document if known else document["facts"])[name] = value

        event: Event = {"event": "state", "t": round(time.time(), 3), "state": state}
        event |= {"message": message} if message else {}
        event |= {name: value for name, value in facts.items() if name in ("adapter", "cause") and value}
        if has_ended(state):
            # who follows stops at the end, so all else is written before it, by a process that still holds the run
            objects.persistently(lambda: self._change(lambda document: None))
            self._append("events.jsonl", event)
            self._flush()
            objects.persistently(lambda: self._change(change))
        else:
            objects.persistently(lambda: self._change(change))
            self._append("events.jsonl", event, flush=True)
        return event

    @contextlib.contextmanager
    def on_the_clock(self) -> Iterator[None]:
        """Within it time counts as spent by the run; what is known of it is stored with every renewal."""
        self._clock = (self.record.spent.seconds, time.monotonic())
        try:
            yield
        finally:
            with contextlib.suppress(RaypeftError):  # the end of the run is told by who ends it
                self._change(lambda document: None)
            self._clock = None

    def note_retry(self, kind: str) -> None:
        """Counts a new start after a failure of that kind."""

        def change(document: dict[str, Any]) -> None:
            retries = document.setdefault("spent", {}).setdefault("retries", {})
            retries[kind] = retries.get(kind, 0) + 1

        objects.persistently(lambda: self._change(change))

    def append_event(self, event: Event) -> None:
        """Keeps an event. One of a state in which somebody is at work moves the run there too."""
        if event.get("event") == "state" and event["state"] not in (*ENDED, self._document["state"]):
            facts = {name: value for name, value in event.items() if name not in ("event", "t", "state")}
            self.set_state(event["state"], **facts)
            return
        self._append("events.jsonl", event, flush=event.get("event") != "progress")

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Keeps one line of metrics."""
        self._append("metrics.jsonl", metrics)

    def append_log(self, rank: int, text: str) -> None:
        """Keeps what a worker printed."""
        self._check_writable()
        self._journal(log_url(self.url, rank)).append(text.encode())

    def log_url(self, rank: int) -> str:
        """Where a worker's log is: for `journal.Journal`, where the worker writes it itself."""
        return log_url(self.url, rank)

    def events(self) -> list[Event]:
        """What was kept until now."""
        return self._kept("events.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        """What was kept until now."""
        return self._kept("metrics.jsonl")

    def close(self) -> None:
        """Writes what waits and lets go of the run. May be called again."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            try:
                for journal in self._journals.values():
                    journal.close()
            finally:
                try:
                    with contextlib.suppress(LeaseError):  # another has it: nothing to let go of
                        self._change(lambda document: document.update(holder=None))
                finally:
                    lease.release(self._token)

    def when_lost(self, call: Callable[[], None]) -> None:
        """Has `call` called, once and from another thread, should another driver take the run over."""
        self._on_lost = call

    def forget_spent(self) -> None:
        """Its time and its retries count anew."""
        self._change(forget_spent)

    def check_held(self) -> None:
        """Raises LeaseError where another driver is known to have taken the run over."""
        if self._lost is not None:
            raise self._lost

    def _change(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Stores the changed document, unless another driver has taken the run over."""

        def edit(document: dict[str, Any]) -> None:
            change(document)
            lease.renew(document)
            if self._clock is not None:
                before, began = self._clock
                seconds = round(before + time.monotonic() - began, 3)
                document.setdefault("spent", {})["seconds"] = seconds

        with self._lock:
            self.check_held()
            try:
                self._document = lease.change(join(self.url, "run.json"), self._token, None, edit)
            except LeaseError as error:
                self._lose(error)
                raise

    def _lose(self, error: LeaseError) -> None:
        first, self._lost = self._lost is None, error
        if first:
            self._on_lost()

    def adopt(self, spec: JobSpec, data_hash: str, changed: list[str]) -> None:
        """Goes on with a spec of which keys changed that may."""

        def change(document: dict[str, Any]) -> None:
            document["spec_hash"] = canonical_hash(spec)
            document["identity"] = run_identity(document["spec_hash"], data_hash)
            document["spec"] = resolved_yaml(spec)
            forget_spent(document)
            if any(is_below(key, TRAINS_ON) for key in changed):
                document["training_id"] = f"{self.id}.{document['fence']}"
                document.update(state="interrupted", adapter=None, metrics={}, endpoint=None)
            elif document["state"] == "done" and any(is_below(key, ("deploy",)) for key in changed):
                document.update(state="registered, not deployed", endpoint=None)

        self._change(change)
        objects.write(join(self.url, "spec.yaml"), resolved_yaml(spec).encode())

    def _check_writable(self) -> None:
        self.check_held()
        if self._closed.is_set():
            raise RunError(f"run '{self.id}' is closed.", hint="Open it again to write it.")

    def _append(self, file: str, line: dict[str, Any], *, flush: bool = False) -> None:
        self._check_writable()
        self._journal(join(self.url, file)).append(stored.dump_line(line), flush=flush)

    def _flush(self) -> None:
        with self._lock:
            for journal in self._journals.values():
                journal.flush()

    def _journal(self, url: str) -> Journal:
        with self._lock:
            if url not in self._journals:
                self._journals[url] = Journal(url)
            return self._journals[url]

    def _kept(self, file: str) -> list[dict[str, Any]]:
        url = join(self.url, file)
        if url in self._journals:
            self._journals[url].flush()
        lines = []
        for line in read_lines(url):
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines


def _renew(reference: weakref.ref[Run], closed: threading.Event) -> None:
    """Renews the lease until the run is closed, forgotten or another's."""
    while not closed.wait(lease.RENEW_S):
        run = reference()
        if run is None:
            return
        try:
            run._change(lambda document: None)
        except LeaseError:
            return  # whoever holds the run has been told
        except StorageError:
            pass  # the next turn tries again, long before the lease runs out
        del run
