"""The runs below one URL."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .. import objects, stored
from ..errors import RunError, StorageError, closest
from ..journal import read_lines
from ..objects import NotFound, join
from ..run_state import CREATED
from ..runner import Event
from ..spec.canonical import canonical_hash, resolved_yaml
from ..spec.job import JobSpec
from .held import Run
from .record import RunRecord, log_url, read_record, run_identity
from .resuming import changes, check_may_resume, name_taken


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
            run = Run(self.url, same[-1].id, spec, say)
            if resume:
                run.forget_spent()
            return run
        latest = runs[-1]
        changed = changes(latest, spec, data_hash)
        if not resume:
            raise name_taken(latest, spec, changed)
        check_may_resume(latest, spec, changed)
        run = Run(self.url, latest.id, spec, say)
        run.adopt(spec, data_hash, changed)
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
            return read_record(document, join(self.url, id))

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
            return Run(self.url, id, spec, say)
        except StorageError:
            if made:
                with contextlib.suppress(StorageError):
                    objects.delete_tree(join(self.url, id))
            raise
