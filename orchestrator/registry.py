"""Immutable adapter versions `name@version`, their aliases, and who holds them.

ROOT/adapters/NAME/book.json            aliases, holders, deletions, forced deployments, the fences of runs that
                                        register: changed by replace_if
ROOT/adapters/NAME/numbers/N.json       a version number, given out once and for ever
ROOT/adapters/NAME/N/                   a version: a directory that HF PEFT loads as it is
ROOT/adapters/NAME/N/train_rows.txt     hashes of the rows that its weights were trained on
ROOT/adapters/NAME/N/raypeft.json       the manifest, written last: no version is there without it
ROOT/endpoints/NAME.json                what an endpoint shall serve
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import objects, stored
from .adapter_folder import AdapterFolder, check_adapter
from .errors import LeaseError, RaypeftError, RegistryError, StorageError, closest
from .lineage import Lineage, row_hashes, rows_file
from .objects import NotFound, join
from .spec.names import ADAPTER, ADAPTER_RULE, ALIAS, ALIAS_RULE

MANIFEST, ROWS = "raypeft.json", "train_rows.txt"
DEFAULT_ALIAS = "production"
_MAX_TRIES = 200
_ABANDONED_S = 24 * 3600
"""Age after which a registration without a manifest counts as dead, in seconds."""


@dataclass(frozen=True)
class AdapterVersion:
    """One version. Only `aliases`, `endpoints` and `forced` can be others tomorrow."""

    name: str
    version: int
    url: str
    """A directory that HF PEFT loads as it is."""
    lineage: Lineage
    content_hash: str
    """sha256 over config, weights and the base's identity."""
    created: float
    """Unix seconds."""
    aliases: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()
    """The endpoints that hold it."""
    forced: tuple[dict[str, Any], ...] = ()
    """Deployments against the gate: `{"endpoint", "at", "reasons"}`."""
    files: dict[str, dict[str, Any]] | None = None
    """Relative path -> sha256 and size in bytes."""

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file["size_bytes"] for file in (self.files or {}).values())

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return stored.finite({"ref": self.ref, **asdict(self), "lineage": self.lineage.to_dict()})


@dataclass(frozen=True)
class AdapterRow:
    """One name in the list of adapters."""

    name: str
    latest: int
    num_versions: int
    aliases: dict[str, int]
    base: str
    """The base's name, of the latest version."""
    created: float
    """Of the latest version, unix seconds."""

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


class Registry:
    """The adapters stored below one URL: a folder of this machine or of S3.

    Every method raises StorageError where the storage does not let it, RegistryError where a name, version or
    alias is not there or may not be changed.
    """

    def __init__(self, root_url: str | Path) -> None:
        self.url = objects.normal_url(root_url)

    def check_writable(self) -> None:
        """Raises StorageError where a version could not be registered: to be asked before training."""
        objects.check_writable(self.url)

    # versions

    def register(
        self,
        name: str,
        source: str | Path,
        lineage: Lineage,
        *,
        train_rows: Iterable[str] = (),
        fence: int | None = None,
    ) -> AdapterVersion:
        """Stores the local folder `source` as the next version of `name`.

        Args:
            train_rows: hashes of the rows that it was trained on. Those of a parent in this registry are
                added, since they shaped these weights too.
            fence: the number under which the lineage's run is written: the run gets one version, whoever
                registers it, and a writer that was overtaken gets none. None: each call makes a version.

        Raises:
            RegistryError: the name breaks the rule.
            ModelError: the folder is not a whole adapter in safetensors.
            LeaseError: a later writer of the run has registered it, or is about to.
        """
        check_name(name)
        folder = check_adapter(Path(source))
        objects.clean(self._name_url(name))
        rows = list(dict.fromkeys([*train_rows, *sorted(self._rows_of_parent(lineage))]))
        run_id = str(lineage.run_id)
        if fence is not None and (known := self.claim(name, run_id, fence)) is not None:
            return self.get(f"{name}@{known}")
        before = objects.nearest_existing(join(self._name_url(name), "numbers"))
        number = self._next_number(name, lineage.run_id)
        try:
            if fence is not None:
                self._fenced(name, run_id, fence, lambda entry: entry.update(number=number))
            with tempfile.TemporaryDirectory() as scratch:
                staged = Path(scratch) / "version"
                with objects.explaining(str(staged)):
                    _stage(folder, name, number, lineage, rows, staged)
                objects.put_tree(staged, self._version_url(name, number), manifest=MANIFEST)
            if fence is not None:
                self._fenced(name, run_id, fence, lambda entry: None)
        except BaseException:
            self._take_back(name, number, before, run_id, fence)
            raise
        return self.get(f"{name}@{number}")

    def claim(self, name: str, run_id: str, fence: int) -> int | None:
        """Makes void what earlier writers of a run still register: what is not whole by now is struck out.

        Returns:
            The number of the version that one of them has registered; None where there is none.

        Raises:
            LeaseError: a later writer was here.
        """
        known: list[int] = []

        def take(book: dict[str, Any]) -> None:
            known.clear()
            entry = book["runs"].get(run_id, {"fence": 0, "number": None})
            _check_fence(entry, run_id, fence)
            number = entry["number"]
            if number is not None and number not in book["deleted"]:
                if objects.exists(join(self._version_url(name, number), MANIFEST)):
                    known.append(number)
                elif entry["fence"] < fence:
                    book["deleted"] = sorted({*book["deleted"], number})
            book["runs"][run_id] = {"fence": fence, "number": known[0] if known else None}

        self._change_book(name, take)
        return known[0] if known else None

    def get(self, ref: str) -> AdapterVersion:
        """`name@version`, `name@alias`, or a bare `name`, which is `name@production`."""
        name, _, selector = ref.partition("@")
        if not ADAPTER.fullmatch(name):
            raise RegistryError(f"'{ref}' is not an adapter's id.", hint="Write NAME@VERSION or NAME@ALIAS.")
        book, _ = self._book(name)
        alias = selector or DEFAULT_ALIAS
        if selector.isascii() and selector.isdigit():
            number = int(selector)
        elif alias in book["aliases"]:
            number = book["aliases"][alias]
        elif not ALIAS.fullmatch(alias):
            raise RegistryError(f"'{ref}' is not an adapter's id.", hint="Write NAME@VERSION or NAME@ALIAS.")
        else:
            raise self._unknown_alias(ref, name, alias, book)
        if number in book["deleted"]:
            raise self._no_version(name, number, "was deleted")
        try:
            return self._read_version(name, number, book)
        except NotFound:
            raise self._no_version(name, number, "does not exist") from None

    def resolve(self, ref: str) -> tuple[str, int]:
        """Name and version number that `ref` stands for; the version exists."""
        version = self.get(ref)
        return version.name, version.version

    def names(self) -> list[str]:
        """The adapters that have a version."""
        return [name for name in objects.list_(join(self.url, "adapters")) if self._numbers(name)]

    def adapters(self) -> list[AdapterRow]:
        """One row a name."""
        rows = []
        for name in objects.list_(join(self.url, "adapters")):
            numbers = self._numbers(name)
            if not numbers:
                continue
            book, _ = self._book(name)
            latest = self._read_version(name, numbers[-1], book)
            base = latest.lineage.base.name
            rows.append(AdapterRow(name, numbers[-1], len(numbers), book["aliases"], base, latest.created))
        return rows

    def versions(self, name: str) -> list[AdapterVersion]:
        """The versions of `name`, oldest first; none where there is no such name."""
        book, _ = self._book(name)
        return [self._read_version(name, number, book) for number in self._numbers(name)]

    def delete(self, ref: str) -> None:
        """Removes `name@version`; its number is never given out again.

        Raises:
            RegistryError: an alias or an endpoint holds it, or `ref` is not a number.
        """
        name, _, selector = ref.partition("@")
        if not selector.isdigit():
            raise RegistryError(f"'{ref}' names no version.", hint="Delete by number: NAME@VERSION.")
        _, number = self.resolve(ref)

        def strike(book: dict[str, Any]) -> None:
            aliases = sorted(alias for alias, version in book["aliases"].items() if version == number)
            endpoints = book["holders"].get(str(number), [])
            if aliases:
                raise RegistryError(
                    f"{name}@{number} cannot be deleted: {name}@{aliases[0]} is this version.",
                    hint=f"Point the alias at another one first: raypeft alias {name}@VERSION {aliases[0]}.",
                )
            if endpoints:
                raise RegistryError(
                    f"{name}@{number} cannot be deleted: endpoint '{endpoints[0]}' serves it.",
                    hint=f"Take it out first: raypeft undeploy {name}@{number}.",
                )
            book["deleted"] = sorted({*book["deleted"], number})

        self._change_book(name, strike)
        self._clean(name)

    def pull(self, ref: str, target: str | Path) -> AdapterVersion:
        """Copies a version into the local folder `target`, whole and checked against its hashes.

        Raises:
            StorageError: `target` has something in it, or a file is not what was registered.
        """
        version = self.get(ref)
        objects.get_tree(version.url, target, check=lambda copy: _verify(copy, version))
        return version

    # rows

    def train_rows(self, version: AdapterVersion | str) -> frozenset[str]:
        """Hashes of the rows that a version's weights were trained on."""
        url = (version if isinstance(version, AdapterVersion) else self.get(version)).url
        try:
            return frozenset(row_hashes(objects.read(join(url, ROWS))[0]))
        except NotFound:
            return frozenset()

    # aliases and holders

    def alias(self, name: str, alias: str) -> int | None:
        """The version that an alias names; None where there is no such alias."""
        return self._book(name)[0]["aliases"].get(alias)

    def aliases(self, name: str) -> dict[str, int] | None:
        """Alias -> version; None where the storage has no book of `name`, as it has of all that an endpoint holds."""
        book, etag = self._book(name)
        return None if etag is None else dict(book["aliases"])

    def aliases_mark(self, name: str) -> tuple[int, int] | None:
        """What is another as soon as an alias of `name` is, at the price of a look at the folder; None on storages that
        have no such thing: there only reading tells."""
        if not objects.is_local(self.url) or not ADAPTER.fullmatch(name):
            return None
        try:
            found = os.stat(objects.local_path(join(self._name_url(name), "book.json")))
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def set_alias(self, name: str, version: int, alias: str) -> AdapterVersion:
        """Points `name@alias` at a version; whoever reads sees the old one or the new one."""
        check_alias(alias)

        def point(book: dict[str, Any]) -> None:
            self._must_exist(name, version, book)
            book["aliases"][alias] = version

        self._change_book(name, point)
        return self.get(f"{name}@{version}")

    def remove_alias(self, name: str, alias: str) -> None:
        """Takes an alias away; nothing happens where there is none."""
        self._change_book(name, lambda book: book["aliases"].pop(alias, None))

    def hold(self, ref: str, endpoint: str, *, forced: bool = False, reasons: Iterable[str] = ()) -> None:
        """Notes that an endpoint serves a version, which cannot be deleted while it does.

        Args:
            forced: the gate had refused it; this is kept for good, with the gate's `reasons`.
        """
        name, number = self.resolve(ref)

        def note(book: dict[str, Any]) -> None:
            self._must_exist(name, number, book)
            holders = book["holders"].setdefault(str(number), [])
            if endpoint not in holders:
                holders.append(endpoint)
            if forced:
                book["forced"].append(
                    {"version": number, "endpoint": endpoint, "at": time.time(), "reasons": list(reasons)}
                )

        self._change_book(name, note)

    def release(self, ref: str, endpoint: str) -> None:
        """Notes that an endpoint serves a version no more."""
        name, number = self.resolve(ref)

        def note(book: dict[str, Any]) -> None:
            left = [other for other in book["holders"].pop(str(number), []) if other != endpoint]
            if left:
                book["holders"][str(number)] = left

        self._change_book(name, note)

    def holders(self, ref: str) -> list[str]:
        """The endpoints that serve a version."""
        return list(self.get(ref).endpoints)

    # endpoints

    def endpoint_names(self) -> list[str]:
        """The endpoints that have a desired state."""
        names = [name.removesuffix(".json") for name in objects.list_(join(self.url, "endpoints"))]
        return [name for name in names if self.endpoint_state(name) is not None]

    def endpoint_state(self, name: str, *, was_there: bool = False) -> dict[str, Any] | None:
        """What an endpoint shall serve, as `update_endpoint` stored it; None: there is no such endpoint.

        Args:
            was_there: for whoever follows it: what is taken away leaves a note, so a storage without a trace is away.

        Raises:
            StorageError: there is none, though there was.
        """
        state, etag = self._endpoint(name)
        if was_there and etag is None:
            raise StorageError(
                f"the registry {self.url} has no trace of endpoint '{name}'.",
                hint="If its storage is mounted, see that it is.",
            )
        return state

    def update_endpoint(
        self, name: str, change: Callable[[dict[str, Any] | None], dict[str, Any] | None]
    ) -> dict[str, Any] | None:
        """Replaces an endpoint's state by `change(state)`, again from the newest where another was first.

        Args:
            change: takes and returns the state; None is "no such endpoint". May be called more than once.
        """
        url = self.endpoint_url(name)
        for _ in objects.turns(url, _MAX_TRIES):
            state, etag = self._endpoint(name)
            new = change(json.loads(json.dumps(state)))
            document = stored.dump({"removed": True} if new is None else new)
            if new == state or objects.replace_if(url, etag, document):
                break
        return new

    # inside

    def endpoint_url(self, name: str) -> str:
        """Where an endpoint's state lies."""
        return join(self.url, "endpoints", f"{name}.json")

    def _endpoint(self, name: str) -> tuple[dict[str, Any] | None, str | None]:
        url = self.endpoint_url(name)
        try:
            data, etag = objects.read(url)
        except NotFound:
            return None, None
        state = stored.load(data, url)
        return (None if state.get("removed") else state), etag

    def _name_url(self, name: str) -> str:
        return join(self.url, "adapters", name)

    def _version_url(self, name: str, number: int) -> str:
        return join(self._name_url(name), number)

    def _numbers(self, name: str) -> list[int]:
        """The versions that are there whole and not deleted, ascending."""
        if not ADAPTER.fullmatch(name):
            return []
        deleted = self._book(name)[0]["deleted"]
        parts = (path.split("/") for path in objects.find(self._name_url(name)))
        whole = {int(part[0]) for part in parts if part[1:] == [MANIFEST] and part[0].isdigit()}
        return sorted(whole.difference(deleted))

    def _must_exist(self, name: str, number: int, book: dict[str, Any]) -> None:
        if number in book["deleted"]:
            raise self._no_version(name, number, "was deleted")
        if not ADAPTER.fullmatch(name) or not objects.exists(join(self._version_url(name, number), MANIFEST)):
            raise self._no_version(name, number, "does not exist")

    def _read_version(self, name: str, number: int, book: dict[str, Any]) -> AdapterVersion:
        url = self._version_url(name, number)
        manifest = stored.load(objects.read(join(url, MANIFEST))[0], join(url, MANIFEST))
        with stored.reading(join(url, MANIFEST)):
            return AdapterVersion(
                name=name,
                version=number,
                url=url,
                lineage=Lineage.from_dict(manifest["lineage"]),
                content_hash=manifest["content_hash"],
                created=manifest["created"],
                aliases=tuple(sorted(alias for alias, of in book["aliases"].items() if of == number)),
                endpoints=tuple(book["holders"].get(str(number), ())),
                forced=tuple(
                    {key: entry[key] for key in ("endpoint", "at", "reasons")}
                    for entry in book["forced"]
                    if entry["version"] == number
                ),
                files=manifest["files"],
            )

    def _book(self, name: str) -> tuple[dict[str, Any], str | None]:
        empty: dict[str, Any] = {"aliases": {}, "holders": {}, "deleted": [], "forced": [], "runs": {}}
        if not ADAPTER.fullmatch(name):
            return empty, None
        url = join(self._name_url(name), "book.json")
        try:
            data, etag = objects.read(url)
        except NotFound:
            return empty, None
        return empty | stored.load(data, url), etag

    def _change_book(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Changes the name's book from its newest state; no other's change is lost."""
        url = join(self._name_url(name), "book.json")
        for _ in objects.turns(url, _MAX_TRIES):
            book, etag = self._book(name)
            before = stored.dump(book)
            change(book)
            if stored.dump(book) == before or objects.replace_if(url, etag, stored.dump(book)):
                return

    def _fenced(self, name: str, run_id: str, fence: int, edit: Callable[[dict[str, Any]], object]) -> None:
        """Changes a run's entry in the book, unless a later writer of the run has claimed it."""

        def change(book: dict[str, Any]) -> None:
            entry = book["runs"][run_id]
            _check_fence(entry, run_id, fence)
            edit(entry)

        self._change_book(name, change)

    def _next_number(self, name: str, run_id: str | None) -> int:
        folder = join(self._name_url(name), "numbers")
        note = stored.dump({"run_id": run_id, "at": time.time()})
        taken = [int(entry.partition(".")[0]) for entry in objects.list_(folder)]
        number = max([*taken, *self._book(name)[0]["deleted"]], default=0) + 1
        while not objects.create_if_absent(join(folder, f"{number}.json"), note):
            number += 1
        return number

    def _take_back(self, name: str, number: int, before: str, run_id: str, fence: int | None) -> None:
        """After a failed registration: nothing of it stays, as far as the storage lets us."""

        def free() -> None:
            if fence is not None:  # a later writer may have struck the number out: then nobody gets it again
                self._fenced(name, run_id, fence, lambda entry: entry.update(number=None))
            objects.delete(join(self._name_url(name), "numbers", f"{number}.json"))

        for undo in (
            lambda: objects.delete_tree(self._version_url(name, number)),
            free,
            lambda: objects.remove_empty(join(self._name_url(name), "numbers"), before),
        ):
            try:
                undo()
            except RaypeftError:
                continue  # the error that made it fail is the one to tell

    def _clean(self, name: str) -> None:
        """Takes away what killed processes left: deleted versions' files, uploads without a manifest."""
        whole, deleted = self._numbers(name), self._book(name)[0]["deleted"]
        for entry in objects.list_(self._name_url(name)):
            if not entry.isdigit() or int(entry) in whole:
                continue
            if int(entry) in deleted or self._is_abandoned(name, int(entry)):
                objects.delete_tree(self._version_url(name, int(entry)))

    def _is_abandoned(self, name: str, number: int) -> bool:
        url = join(self._name_url(name), "numbers", f"{number}.json")
        try:
            return time.time() - stored.load(objects.read(url)[0], url)["at"] > _ABANDONED_S
        except NotFound:
            return True

    def _rows_of_parent(self, lineage: Lineage) -> frozenset[str]:
        parent = lineage.parent
        if parent is None or "@" not in parent:
            return frozenset()
        try:
            return self.train_rows(parent)
        except RaypeftError:
            return frozenset()  # a parent from elsewhere, or deleted meanwhile

    def _no_version(self, name: str, number: int, why: str) -> RegistryError:
        numbers = self._numbers(name)
        if not numbers:
            return self._unknown_name(name)
        return RegistryError(f"{name}@{number} {why}.", hint=f"There are: {_refs(name, numbers)}.")

    def _unknown_name(self, name: str) -> RegistryError:
        names = self.names()
        near = closest(name, names)
        none = "It has none yet: raypeft run trains one, raypeft register takes one in."
        there = f"There are: {', '.join(names)}." if names else none
        hint = f"Did you mean '{near[0]}'?" if near else there
        return RegistryError(f"the registry {self.url} has no adapter '{name}'.", hint=hint)

    def _unknown_alias(self, ref: str, name: str, alias: str, book: dict[str, Any]) -> RegistryError:
        numbers = self._numbers(name)
        if not numbers:
            return self._unknown_name(name)
        known = "".join(
            f" {other} is {name}@{version}." for other, version in sorted(book["aliases"].items())
        )
        meaning = (
            f"'{ref}' means {name}@{alias}, and" if "@" not in ref else f"{name} has no version '{alias}':"
        )
        return RegistryError(
            f"{meaning} there is no such alias. Its versions: {_refs(name, numbers)}.{known}",
            hint=f"Name one of them, or set the alias: raypeft alias {name}@{numbers[-1]} {alias}.",
        )


def _check_fence(entry: dict[str, Any], run_id: str, fence: int) -> None:
    if entry["fence"] > fence:
        raise LeaseError(
            f"run '{run_id}' was taken over by another driver, which registers it: number {entry['fence']}, "
            f"this is {fence}.",
            hint="This process stops writing it.",
        )


def check_name(name: str) -> None:
    """Raises RegistryError where `name` cannot be an adapter's."""
    if not ADAPTER.fullmatch(name):
        raise RegistryError(
            f"'{name}' cannot be an adapter's name.",
            hint=ADAPTER_RULE,
        )


def check_alias(alias: str) -> None:
    """Raises RegistryError where `alias` cannot be one: a number would look like a version."""
    if not ALIAS.fullmatch(alias):
        raise RegistryError(
            f"'{alias}' cannot be an alias.",
            hint=ALIAS_RULE,
        )


def _refs(name: str, numbers: list[int], limit: int = 10) -> str:
    shown = ", ".join(f"{name}@{number}" for number in numbers[-limit:])
    return f"... {shown}" if len(numbers) > limit else shown


def _stage(
    folder: AdapterFolder, name: str, number: int, lineage: Lineage, rows: list[str], staged: Path
) -> None:
    """The version's folder, complete, on local disk."""
    for file in folder.files:
        if file not in (MANIFEST, ROWS):
            (staged / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / file, staged / file)
    files = {file: facts for file, facts in folder.files.items() if file not in (MANIFEST, ROWS)}
    if rows:
        content = rows_file(rows)
        (staged / ROWS).write_bytes(content)
        files[ROWS] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    manifest = {
        "name": name,
        "version": number,
        "created": time.time(),
        "content_hash": _content_hash(folder, lineage),
        "files": files,
        "lineage": lineage.to_dict(),
    }
    (staged / MANIFEST).write_bytes(stored.dump(manifest))


def _content_hash(folder: AdapterFolder, lineage: Lineage) -> str:
    """Over what answers: the config (but for where its base lay), every other file, and the base."""
    config = {key: value for key, value in folder.config.items() if key != "base_model_name_or_path"}
    others = {file: facts["sha256"] for file, facts in folder.files.items() if file.endswith(".safetensors")}
    content = json.dumps([config, others, lineage.base.content_hash], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _verify(copy: Path, version: AdapterVersion) -> None:
    for file, facts in (version.files or {}).items():
        path = copy / file
        if not path.is_file():
            raise StorageError(f"{version.ref} lacks {file}.", where=version.url, hint="Register it again.")
        with open(path, "rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != facts["sha256"]:
                raise StorageError(
                    f"{file} of {version.ref} is not what was registered: its sha256 differs.",
                    where=version.url,
                    hint="Restore it from a backup, or train and register a new version.",
                )
