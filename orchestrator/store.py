"""Runs as they are stored: one folder each, readable with no cluster up, written by one driver at a time.

    ROOT/ID/run.json                what the run is, its state, and who writes it; changed by replace_if alone
    ROOT/ID/spec.yaml               the resolved job
    ROOT/ID/events.jsonl            every change of state, checkpoint, warning and failure
    ROOT/ID/metrics.jsonl           progress and evaluations
    ROOT/ID/logs/worker-RANK.log    what each worker printed
    ROOT/ID/checkpoints/, final.F/  the trainer's

run.json also carries the lease (`lease.py`): a driver that took the run over has changed the document, so that every
later write of the one before fails: that is the fence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import lease, objects, stored
from .errors import LeaseError, RaypeftError, RunError, StorageError, closest
from .journal import Journal, read_lines
from .lease import Fence, Holder, holder_of
from .objects import NotFound, join
from .run_state import CREATED, ENDED, check_transition, has_ended
from .runner import Event, Spent
from .spec.canonical import (
    canonical_hash,
    changed_keys,
    keys_that_bar_resume,
    load_stored,
    resolved_yaml,
)
from .spec.job import JobSpec
from .spec.rules import accumulation

_TRAINS_ON = ("training.num_epochs", "training.max_steps")
_DATA = "the data's content"


@dataclass(frozen=True)
class RunRecord:
    """What run.json says. Times are unix seconds."""

    id: str
    name: str
    """The job's name."""
    number: int
    """1, and more for those that `--new` made."""
    url: str
    state: str
    """A state of `run_state`, or `unreadable`. One whose driver died is `interrupted`."""
    identity: str = ""
    """sha256 over spec and data."""
    spec_hash: str = ""
    data_hash: str = ""
    training_id: str = ""
    """Another one after a resume that trains on: what a version's lineage names as its run."""
    created: float = 0.0
    updated: float = 0.0
    adapter: str | None = None
    """`NAME@V` once it is registered."""
    metrics: dict[str, float] = field(default_factory=dict)
    endpoint: dict[str, Any] | None = None
    cause: str | None = None
    """Why it failed or was interrupted."""
    message: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else was given to `set_state`."""
    holder: Holder | None = None
    spent: Spent = field(default_factory=Spent)
    spec_yaml: str = field(default="", repr=False)
    """The resolved job."""

    @property
    def has_ended(self) -> bool:
        """Whether nobody is at work on it."""
        return self.state == "unreadable" or has_ended(self.state)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        facts = asdict(self)
        facts["holder"] = str(self.holder) if self.holder else None
        del facts["spec_yaml"], facts["facts"]
        return stored.finite({**self.facts, **facts})


class RunStore:
    """The runs below one URL: a folder of this machine or of S3."""

    def __init__(self, root_url: str | Path) -> None:
        self.url = objects.normal_url(root_url)

    def open(
        self,
        name: str,
        spec: JobSpec,
        data_hash: str,
        *,
        new: bool = False,
        resume: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> Run:
        """The run of (name, hash of spec and data), for writing: a new one, or the one that there is.

        Args:
            new: make another run, numbered, whatever there is.
            resume: go on with this name's latest run although keys changed that may, its `retry` counted anew.
            say: told in a sentence where a driver that shows no life is watched before its run is taken over.

        Raises:
            RunError: the name has a run of another spec, or a key changed that may not.
            LeaseError: another driver has it.
            StorageError: the storage is read-only, full or cannot keep two writers apart.
        """
        spec_hash = canonical_hash(spec)
        identity = run_identity(spec_hash, data_hash)
        objects.require_exclusive(self.url)
        runs = sorted(self.named(name), key=lambda run: run.number)
        same = [run for run in runs if run.identity == identity]
        if new or not runs:
            return self._create(name, spec, data_hash, runs[-1].number + 1 if runs else 1, say)
        if same:
            run = Run(self, same[-1].id, spec, say)
            if resume:
                run._change(_forget_spent)
            return run
        latest = runs[-1]
        changed = _changed(latest, spec, data_hash)
        if not resume:
            raise _taken(latest, spec, changed)
        _check_may_resume(latest, spec, changed)
        run = Run(self, latest.id, spec, say)
        run._adopt(spec, data_hash, changed)
        return run

    def named(self, name: str) -> list[RunRecord]:
        """The runs of a job's name, oldest first; no other's document is read."""
        ids = [id for id in objects.list_(self.url) if id.startswith(f"{name}-")]
        return [record for record in self._records(ids) if record.name == name]

    def _records(self, ids: Iterable[str]) -> list[RunRecord]:
        records = []
        for id in ids:
            try:
                records.append(self._record(id))
            except NotFound:
                continue  # a folder without run.json is no run
            except StorageError as error:
                url = join(self.url, id)
                if objects.is_local(url) and objects.local_path(url).is_file():
                    continue  # a tracker's database
                records.append(RunRecord(id, id, 0, url, "unreadable", cause=str(error)))
        return sorted(records, key=lambda record: record.created)

    def list(self) -> list[RunRecord]:
        """All runs, oldest first. One that cannot be read is listed as such, with the reason as its cause."""
        return self._records(objects.list_(self.url))

    def get(self, id: str) -> RunRecord:
        """A run by its id, the beginning of one, or a job's name (its latest run).

        Raises:
            RunError: none, or several, with the closest matches.
        """
        try:
            if "/" not in id and id.strip("."):
                return self._record(id)
        except NotFound:
            pass
        records = self.list()
        named = [record for record in records if record.name == id]
        if named:
            return named[-1]
        begun = [record for record in records if record.id.startswith(id)]
        if len(begun) == 1:
            return begun[0]
        if begun:
            raise RunError(
                f"'{id}' begins {len(begun)} runs: {', '.join(record.id for record in begun)}.",
                hint="Write more of the id.",
            )
        near = closest(id, [*(record.id for record in records), *(record.name for record in records)], 3)
        hint = f"Closest: {', '.join(near)}." if near else "List them: raypeft jobs."
        raise RunError(f"there is no run '{id}' in {self.url}.", hint=hint)

    def events(self, id: str, *, follow: bool = False, poll_s: float = 0.5) -> Iterator[Event]:
        """A run's events; with `follow` also those to come, until the run has ended."""
        return self._read(self.get(id), "events.jsonl", follow, poll_s)

    def metrics(self, id: str, *, follow: bool = False, poll_s: float = 0.5) -> Iterator[Event]:
        """A run's progress and evaluations, likewise."""
        return self._read(self.get(id), "metrics.jsonl", follow, poll_s)

    def workers(self, id: str) -> tuple[int, ...]:
        """The ranks that have a log."""
        names = (entry.removesuffix(".parts") for entry in objects.list_(join(self.get(id).url, "logs")))
        ranks = (name.removeprefix("worker-").removesuffix(".log") for name in names)
        return tuple(sorted({int(rank) for rank in ranks if rank.isdigit()}))

    def log(self, id: str, rank: int, *, follow: bool = False, poll_s: float = 0.5) -> Iterator[str]:
        """The lines of a worker's log, each with its end.

        Raises:
            RunError: there is no such worker.
        """
        record = self.get(id)
        ranks = self.workers(record.id)
        if rank not in ranks and not (follow and not record.has_ended):
            there = f"It has logs of: {', '.join(map(str, ranks))}." if ranks else "It has no logs yet."
            raise RunError(f"run '{record.id}' has no log of worker {rank}.", hint=there)
        lines = read_lines(
            log_url(record.url, rank), is_growing=self._is_growing(record.id, follow), poll_s=poll_s
        )
        return (line + "\n" for line in lines)

    def _read(self, record: RunRecord, file: str, follow: bool, poll_s: float) -> Iterator[Event]:
        growing = self._is_growing(record.id, follow)
        for line in read_lines(join(record.url, file), is_growing=growing, poll_s=poll_s):
            with contextlib.suppress(ValueError):  # a line that a killed driver left unfinished
                yield json.loads(line)

    def _is_growing(self, id: str, follow: bool) -> Callable[[], bool]:
        return lambda: follow and not self._record(id).has_ended

    def _record(self, id: str) -> RunRecord:
        url = join(self.url, id, "run.json")
        document = stored.load(objects.read(url)[0], url)
        with stored.reading(url):
            return _record(document, join(self.url, id))

    def _create(
        self, name: str, spec: JobSpec, data_hash: str, number: int, say: Callable[[str], None]
    ) -> Run:
        spec_hash = canonical_hash(spec)
        identity = run_identity(spec_hash, data_hash)
        id = f"{name}-{identity[:8]}" if number == 1 else f"{name}-{number}-{identity[:8]}"
        document = {
            "id": id, "name": name, "number": number, "identity": identity, "spec_hash": spec_hash,
            "data_hash": data_hash, "training_id": id, "created": time.time(), "updated": time.time(),
            "state": CREATED, "fence": 0, "holder": None, "checkpoints": {}, "spec": resolved_yaml(spec),
            "facts": {},
        }  # fmt: skip
        objects.clean(join(self.url, id))
        made = objects.create_if_absent(join(self.url, id, "run.json"), stored.dump(document))
        try:
            # Where another was first, it holds the run, and this one is refused.
            return Run(self, id, spec, say)
        except StorageError:
            if made:
                with contextlib.suppress(StorageError):
                    objects.delete_tree(join(self.url, id))
            raise


class Run:
    """One run, held for writing from its making to `close` (or the end of `with`). Its lease is renewed meanwhile.

    Raises:
        LeaseError: somebody else writes it.
    """

    def __init__(
        self, store: RunStore, id: str, spec: JobSpec, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.id, self.spec = id, spec
        self.url = join(store.url, id)
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
        return _record(self._document, self.url)

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
                _forget_spent(document)
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

    def _adopt(self, spec: JobSpec, data_hash: str, changed: list[str]) -> None:
        """Goes on with a spec of which keys changed that may."""

        def change(document: dict[str, Any]) -> None:
            document["spec_hash"] = canonical_hash(spec)
            document["identity"] = run_identity(document["spec_hash"], data_hash)
            document["spec"] = resolved_yaml(spec)
            _forget_spent(document)
            if any(_is_below(key, _TRAINS_ON) for key in changed):
                document["training_id"] = f"{self.id}.{document['fence']}"
                document.update(state="interrupted", adapter=None, metrics={}, endpoint=None)
            elif document["state"] == "done" and any(_is_below(key, ("deploy",)) for key in changed):
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


def log_url(run_url: str, rank: int) -> str:
    """Where the log of a run's worker is."""
    return join(run_url, "logs", f"worker-{rank}.log")


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


def _spent(document: dict[str, Any]) -> Spent:
    kept = document.get("spent") or {}
    return Spent(kept.get("seconds", 0.0), dict(kept.get("retries") or {}))


def _forget_spent(document: dict[str, Any]) -> None:
    document["spent"] = {}


def run_identity(spec_hash: str, data_hash: str) -> str:
    """What makes two runs the same: sha256, hexadecimal, over the hashes of their spec and data."""
    return hashlib.sha256(f"{spec_hash} {data_hash}".encode()).hexdigest()


def _record(document: dict[str, Any], url: str) -> RunRecord:
    """Reads what another version may have written: unknown keys are passed over."""
    holder = holder_of(document)
    state, cause = document["state"], document.get("cause")
    if state not in ENDED and (holder is None or holder.seems_gone()):
        cause = f"its driver died: {holder}." if holder else "its driver left."
        state = "interrupted"
    return RunRecord(
        id=document["id"], name=document["name"], number=document["number"], url=url, state=state,
        identity=document["identity"], spec_hash=document["spec_hash"], data_hash=document["data_hash"],
        training_id=document["training_id"], created=document["created"], updated=document["updated"],
        adapter=document.get("adapter"), metrics=stored.numbers(document.get("metrics") or {}),
        endpoint=document.get("endpoint"), cause=cause, message=document.get("message"),
        facts=document.get("facts", {}), holder=holder, spec_yaml=document["spec"],
        spent=_spent(document),
    )  # fmt: skip


def _changed(record: RunRecord, spec: JobSpec, data_hash: str) -> list[str]:
    """The dotted keys that differ, and the data where its content does."""
    keys = changed_keys(_stored_spec(record), spec)
    return keys + ([_DATA] if record.data_hash != data_hash else [])


def _stored_spec(record: RunRecord) -> JobSpec:
    return load_stored(record.spec_yaml, join(record.url, "spec.yaml"))


def _is_below(key: str, parents: tuple[str, ...]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _fixed(record: RunRecord, spec: JobSpec, changed: list[str]) -> list[str]:
    """Those of the changed keys with which the run cannot go on."""
    bars = keys_that_bar_resume(_stored_spec(record), spec)
    return bars + ([_DATA] if _DATA in changed else [])


def _taken(record: RunRecord, spec: JobSpec, changed: list[str]) -> RunError:
    if fixed := _fixed(record, spec, changed):
        resume = f"; with --resume it goes on once {', '.join(fixed)} {_be(fixed)} as before"
    else:
        resume = ", or go on with it as it is now: --resume"
    return RunError(
        f"the name '{record.name}' has a run of another job, '{record.id}': {_listed(changed)}.",
        hint=f"Start another run beside it: --new{resume}.",
    )


def _listed(changed: list[str]) -> str:
    return f"{', '.join(changed)} {'differs' if len(changed) == 1 else 'differ'}"


def _be(keys: list[str]) -> str:
    return "is" if len(keys) == 1 else "are"


def _check_may_resume(record: RunRecord, spec: JobSpec, changed: list[str]) -> None:
    if fixed := _fixed(record, spec, changed):
        raise RunError(
            f"run '{record.id}' cannot go on: {_listed(fixed)}, which would make another adapter of it.",
            hint="May change: epochs and steps, resources, cadences, retry, deploy. Else start another run:"
            " --new.",
        )
    before, now = accumulation(_stored_spec(record))[1], accumulation(spec)[1]
    if before != now:
        raise RunError(
            f"run '{record.id}' cannot go on: its global batch is {before} rows, and would become {now}.",
            hint=f"Set training.global_batch_size: {before}, or start another run: --new.",
        )
