"""`--set training.learning_rate=1e-4`: one key of the job, from the command line; the value is YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import SpecError
from .aliases import resolve_aliases
from .document import parse_value
from .places import Path, Place, Tree, dotted
from .space import flatten_space

_FORM = "Write --set KEY=VALUE, such as --set training.learning_rate=1e-4."


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> tuple[Tree, list[SpecError]]:
    """The tree with each override in place, in their order; a key may be an alias (`lora_r=4`)."""
    errors: list[SpecError] = []
    for override in overrides:
        try:
            tree = _apply(tree, override, errors)
        except SpecError as error:
            errors.append(error)
    return tree, errors


def _apply(tree: Tree, override: str, errors: list[SpecError]) -> Tree:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise SpecError(f"'{override}' is not KEY=VALUE.", where="--set", hint=_FORM)
    if key == "extends":
        raise SpecError(
            "a file extends; an override cannot.", where="--set extends", hint="Write it in the file."
        )
    value, places = parse_value(text, key, "--set")
    path = _path(tree, key)
    if value == {} and tree.get(path):
        raise SpecError(
            "an empty mapping changes nothing: what is written is merged key by key.",
            where=f"--set {key}",
            hint=f"Name the key below it, or remove it whole: --set {key}=null.",
        )
    if any(isinstance(part, int) for part in path):
        changed = _in_list(tree, path, key, value, places)
        errors += changed.errors(resolve_aliases(changed))
        return changed
    small = Tree("--set")
    small.put(path, value, places)
    errors += small.errors(resolve_aliases(small))
    flatten_space(small)
    _check_way(tree, small.values, (), key)
    return tree.overlaid(small)


def _path(tree: Tree, key: str) -> Path:
    """Numbers are list indices, where there is a list (a node label may well be called `0`)."""
    parts: list[str | int] = []
    node: Any = tree.values
    for part in key.split("."):
        if isinstance(node, list):
            if not part.isdigit():
                where = dotted(tuple(parts))
                raise SpecError(
                    f"{where} is a list of {len(node)}; '{part}' is no index.",
                    where=f"--set {key}",
                    hint=f"Write --set {where}.0=...",
                )
            index = int(part)
            parts.append(index)
            node = node[index] if index < len(node) else None
        else:
            parts.append(part)
            node = node.get(part) if isinstance(node, dict) else None
    return tuple(parts)


def _in_list(tree: Tree, path: Path, key: str, value: Any, places: dict[Path, Place]) -> Tree:
    at = next(depth for depth, part in enumerate(path) if isinstance(part, int))
    entries, index = tree.get(path[:at]), path[at]
    assert isinstance(entries, list) and isinstance(index, int)
    if index > len(entries):
        raise SpecError(
            f"there is no entry {index}: {dotted(path[:at])} has {len(entries)}.",
            where=f"--set {key}",
            hint=f"The next is {dotted(path[:at])}.{len(entries)}.",
        )
    result = tree.overlaid(Tree("--set"))
    result.source = tree.source
    target = result.get(path[:at])
    if index == len(entries):
        target.append({} if len(path) > at + 1 else None)
        result.places[path[: at + 1]] = places[()]
    result.put(path, value, places)
    return result


def _check_way(tree: Tree, values: Any, path: Path, key: str) -> None:
    """An override goes through mappings: `deepspeed.x=1` over `deepspeed: zero2` would lose the stage."""
    for name, inner in values.items():
        here = (*path, name)
        present = tree.get(here)
        if isinstance(inner, dict) and path == () and isinstance(present, (str, int, float)) and name != key:
            raise SpecError(
                f"{dotted(here)} is '{present}', not a mapping.",
                where=f"--set {key}",
                hint=f"Set {dotted(here)} whole.",
            )
