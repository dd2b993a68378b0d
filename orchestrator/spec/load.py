"""A job's YAML -> JobSpec: read, inherit, override, resolve aliases, check; every error says where.

raypeft validate FILE  ->  load_job(FILE)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from ..errors import SpecError, closest
from .adapter import check_adapter
from .aliases import resolve_aliases
from .deepspeed_keys import STAGES, check_deepspeed
from .document import decode, parse_document
from .job import JobSpec
from .overrides import apply_overrides
from .places import Path, Place, Problem, Tree, dotted, raise_all
from .rules import check_rules
from .space import PAIRED, SPACE, flatten_space
from .strict import strict_job
from .trials import check_sweep
from .unknown import unknown_key
from .words import explain, show

FORMAT = 1
"""The form of what is stored. A default never changes its meaning without a new one."""


@dataclass(frozen=True)
class LoadedJob:
    """A job and where each of its keys was written."""

    spec: JobSpec
    path: str
    """The file, or the name of where the text came from."""
    text: str
    """The file as it was written; empty for a mapping."""
    places: dict[str, Place] = field(default_factory=dict, repr=False)
    """Dotted key -> its place; a place begins with (line, column), counted from 1."""
    warnings: tuple[str, ...] = ()

    def where(self, key: str) -> str:
        """`file:line key` of a dotted key, or of the closest of its parents that was written."""
        parts = key.split(".")
        for size in range(len(parts), 0, -1):
            if place := self.places.get(".".join(parts[:size])):
                return str(place if size == len(parts) else place._replace(key=key))
        return f"{self.path} {key}"


def load_job(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedJob:
    """Reads a job from a file.

    Args:
        path: the YAML file.
        overrides: `training.learning_rate=1e-4`, as `--set` takes them.

    Raises:
        SpecError: with the file, the line and the key; several at once as `places.SpecErrors`.
    """
    source = os.fspath(path)
    text = _read(source)
    return _load(text, source, FilePath(source).stem, overrides, (FilePath(source).resolve(),))


def load_job_text(text: str, source: str = "<text>", overrides: Sequence[str] = ()) -> LoadedJob:
    """Likewise from text; `source` is what the errors call it, and its stem the default name."""
    stem = FilePath(source).stem if not source.startswith("<") else None
    return _load(text, source, stem, overrides, ())


def load_job_mapping(
    values: Mapping[str, Any], source: str = "<spec>", overrides: Sequence[str] = ()
) -> LoadedJob:
    """Likewise from a mapping, as a notebook passes it. `name` must be in it."""
    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as error:
        raise SpecError(f"not made of plain values: {error}.", where=source) from None
    tree = parse_document(text, source)
    flat = {path: place._replace(line=0) for path, place in tree.places.items()}
    return _finish(Tree(source, tree.values, flat), source, "", None, overrides, ())


def _read(source: str) -> str:
    path = FilePath(source)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise SpecError("no such file.", where=source, hint=_similar_files(path)) from None
    except IsADirectoryError:
        names = sorted(child.name for child in path.glob("*.y*ml"))
        hint = f"It holds: {', '.join(names[:5])}." if names else "Write a job: raypeft init"
        raise SpecError("is a directory, not a job.", where=source, hint=hint) from None
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}.", where=source) from None
    return decode(raw, source)


def _similar_files(path: FilePath) -> str:
    try:
        names = [child.name for child in path.parent.iterdir() if child.suffix in (".yaml", ".yml")]
    except OSError:
        return f"There is no directory {path.parent} either."
    near = closest(path.name, names)
    return f"Closest: {path.parent / near[0]}." if near else "Write a commented one: raypeft init"


def _load(
    text: str, source: str, stem: str | None, overrides: Sequence[str], trail: tuple[FilePath, ...]
) -> LoadedJob:
    return _finish(parse_document(text, source), source, text, stem, overrides, trail)


def check_format(tree: Tree) -> None:
    """Takes `format` out of what was stored. Raises SpecError where a newer version wrote it."""
    if "format" not in tree.values:
        return
    place = tree.nearest(("format",))
    value, _ = tree.take(("format",))
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SpecError(
            f"{show(value)} is not a format.", where=str(place), hint=f"Write {FORMAT}, or remove the key."
        )
    if value > FORMAT:
        raise SpecError(
            f"format {value} was written by a newer raypeft; this one reads up to format {FORMAT}.",
            where=str(place),
            hint="Upgrade: pip install -U raypeft",
        )


def spec_from_values(values: dict[str, Any], source: str) -> JobSpec:
    """The job of canonical values, as they were stored: nothing is inherited, renamed or read from elsewhere."""
    try:
        return strict_job(values)
    except ValidationError as error:
        tree = Tree(source, values)
        raise_all(tree.errors(explain(JobSpec, values, error.errors(), unknown_key)))
        raise


def _finish(
    tree: Tree,
    source: str,
    text: str,
    stem: str | None,
    overrides: Sequence[str],
    trail: tuple[FilePath, ...],
) -> LoadedJob:
    check_format(tree)
    tree, problems = _inherited(tree, trail)
    tree, more = apply_overrides(tree, overrides)
    errors = [*problems, *more]
    warnings: list[str] = []
    spec = _validated(tree, stem, FilePath(source).parent, errors, warnings)
    raise_all(errors)
    assert spec is not None
    places = {dotted(path): place for path, place in tree.places.items()}
    return LoadedJob(spec, source, text, places, tuple(warnings))


def _inherited(tree: Tree, trail: tuple[FilePath, ...]) -> tuple[Tree, list[SpecError]]:
    """The tree over all that it extends, aliases resolved in each file by itself."""
    parent, errors = _parent(tree, trail)
    errors += tree.errors(resolve_aliases(tree))
    flatten_space(tree)
    if parent is None:
        return tree, errors
    parent.values.pop("name", None)
    parent.places.pop(("name",), None)
    return parent.overlaid(tree), errors


def _parent(tree: Tree, trail: tuple[FilePath, ...]) -> tuple[Tree | None, list[SpecError]]:
    if "extends" not in tree.values:
        return None, []
    place = tree.places[("extends",)]
    value, _ = tree.take(("extends",))
    if not isinstance(value, str) or not value:
        raise SpecError("is the path of one job.", where=str(place), hint="Write extends: other.yaml")
    directory = trail[-1].parent if trail else FilePath.cwd()
    target = (directory / value).resolve()
    shown = os.path.join(os.path.dirname(tree.source), value) if trail else value
    if target in trail:
        names = " -> ".join(path.name for path in (*trail[trail.index(target) :], target))
        raise SpecError(f"a circle: {names}.", where=str(place), hint="Remove one of these lines.")
    try:
        text = _read(shown)
    except SpecError as error:
        raise SpecError(f"{shown}: {error.problem}", where=str(place), hint=error.hint) from None
    return _inherited(parse_document(text, shown), (*trail, target))


def _validated(
    tree: Tree, stem: str | None, directory: FilePath, errors: list[SpecError], warnings: list[str]
) -> JobSpec | None:
    """The spec, or None with what is wrong added to `errors`."""
    problems: list[Problem] = []
    if "name" not in tree.values and stem is not None:
        tree.values["name"] = stem
    for path in _deepspeed_paths(tree):
        _resolve_deepspeed(tree, path, directory, problems)
    problems += check_adapter(tree)
    try:
        spec = strict_job(tree.values)
    except ValidationError as error:
        found = explain(JobSpec, tree.values, error.errors(), unknown_key)
        problems += [_about_the_stem(problem, tree, stem) for problem in found]
        errors += _without_repeats(tree.errors(problems), errors)
        return None
    problems += [*check_rules(spec, set(tree.places), warnings), *check_deepspeed(spec)]
    if not problems:
        problems += check_sweep(spec, tree.values)
    errors += tree.errors(problems)
    return spec


def _without_repeats(found: list[SpecError], before: list[SpecError]) -> list[SpecError]:
    """A key that an alias already complained of is not also missing."""
    told = {error.where for error in before}
    return [error for error in found if error.where not in told]


def _about_the_stem(problem: Problem, tree: Tree, stem: str | None) -> Problem:
    if problem.path == ("name",) and ("name",) not in tree.places and stem is not None:
        return Problem(("name",), f"the file's stem {problem.problem}", "Or write name: NAME in the file.")
    return problem


def _deepspeed_paths(tree: Tree) -> list[Path]:
    """Where a DeepSpeed config stands: the job's own, and those that a sweep draws."""
    return [
        ("deepspeed",),
        *(path for path in tree.places if path[: len(SPACE)] == SPACE and _is_drawn(path, "deepspeed")),
    ]


def _is_drawn(path: Path, key: str) -> bool:
    """Whether a place within a space is that of a value of `key`: in its list, or among paired ones."""
    within = path[len(SPACE) :]
    if within[:1] == (PAIRED,):
        return within[-1] == key
    return within[:1] == (key,) and len(within) == 3


def _resolve_deepspeed(tree: Tree, path: Path, directory: FilePath, problems: list[Problem]) -> None:
    """A path becomes the file's content: the job is then whole without it, on any machine."""
    value = tree.get(path)
    if not isinstance(value, str) or value in STAGES:
        return
    problem: Problem | None = None
    if not value.endswith(".json"):
        near = closest(value, STAGES)
        hint = f"Closest: '{near[0]}'." if near else f"Stages: {', '.join(STAGES)}."
        problem = Problem(path, f"'{value}' is neither a stage nor a path to a .json file.", hint)
    else:
        content = _deepspeed_file(value, path, directory)
        if isinstance(content, Problem):
            problem = content
        else:
            place = tree.nearest(path)
            tree.put(path, content, {(): place._replace(key=f"{place.key} ({value})")})
    if problem:
        problems.append(problem)
        tree.put(path, "zero2", {(): tree.nearest(path)})


def _deepspeed_file(value: str, path: Path, directory: FilePath) -> dict[str, Any] | Problem:
    """The content of a DeepSpeed JSON, found from the current directory, else beside the job."""
    found = next((each for each in (FilePath(value), directory / value) if each.is_file()), None)
    if found is None:
        return Problem(path, f"'{value}': no such file.", f"Write a stage: {', '.join(STAGES)}.")
    try:
        content = json.loads(found.read_bytes())
    except (ValueError, OSError) as error:
        return Problem(path, f"'{value}' is not JSON: {error}.", "Mend it, or write a stage: zero2.")
    if not isinstance(content, dict):
        return Problem(path, f"'{value}' holds no JSON object.", "Write a stage: zero2.")
    return content
