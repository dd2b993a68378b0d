"""A type in plain words, and pydantic's findings as problems of ours."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ..errors import closest
from .durations import parse_duration
from .places import Path, Problem, dotted


def show(value: Any) -> str:
    """A value as it is quoted in a message: short, and never a section's whole content."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"'{value if len(value) <= 80 else value[:77] + '...'}'"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return str(value)


def in_words(annotation: Any) -> str:
    """`a whole number above 0`, `one of constant, linear, cosine`, `a mapping`: what a key of this type takes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _constrained(arguments[0], arguments[1:])
    if origin is Literal:
        words = ", ".join(str(argument) for argument in arguments)
        return f"one of {words}" if len(arguments) > 1 else words
    if origin in (typing.Union, types.UnionType):
        parts = [in_words(argument) for argument in arguments if argument is not type(None)]
        return " or ".join(dict.fromkeys(part for part in parts if not _said(part, parts)))
    if origin in (tuple, list, set):
        inner = arguments[0] if arguments else Any
        return f"a list, each {in_words(inner)}" if inner is not Any else "a list"
    if origin is dict or annotation is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(str(each.value) for each in annotation)}"
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "anything"}


def _said(part: str, parts: list[str]) -> bool:
    """A whole number is a number: name the wider one alone."""
    return part.startswith("a whole number") and any(other.startswith("a number") for other in parts)


def _constrained(base: Any, metadata: tuple[Any, ...]) -> str:
    if any(getattr(each, "func", None) is parse_duration for each in metadata):
        return "a duration such as 90s, 10m or 2h"
    bounds = {}
    for each in metadata:
        constraints = each.metadata if isinstance(each, FieldInfo) else [each]
        for constraint in constraints:
            for name in ("gt", "ge", "lt", "le"):
                if (bound := getattr(constraint, name, None)) is not None:
                    bounds[name] = bound
    words = in_words(base)
    if "ge" in bounds and "le" in bounds:
        return f"{words} from {bounds['ge']:g} to {bounds['le']:g}"
    text = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    return " ".join([words, *(f"{text[name]} {bound:g}" for name, bound in bounds.items())])


def field_words(field: FieldInfo) -> str:
    """Likewise for a model's field, whose constraints pydantic has taken out of its annotation."""
    return _constrained(field.annotation, (*field.metadata,))


def field_at(model: type[BaseModel], path: Path) -> FieldInfo | None:
    """The field that `path` names below `model`, or None."""
    names = {field.alias or name: field for name, field in model.model_fields.items()}
    if not path or (field := names.get(str(path[0]))) is None:
        return None
    rest = path[1:]
    while rest and isinstance(rest[0], int):
        rest = rest[1:]
    if not rest:
        return field
    inner = model_in(field.annotation)
    return field_at(inner, rest) if inner else None


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation holds, alone, optional or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := model_in(each))), None)


def explain(
    model: type[BaseModel],
    values: dict[str, Any],
    details: Iterable[ErrorDetails],
    unknown: Callable[[Path], Problem],
) -> list[Problem]:
    """pydantic's errors in our words, one for each key; `unknown` writes those of keys that do not exist."""
    problems: dict[Path, Problem] = {}
    for detail in details:
        path = _real_path(values, detail["loc"])
        if path in problems or (detail["type"] == "too_short" and detail["input"]):
            continue  # pydantic also counts a list whose entries are wrong as too short
        if detail["type"] == "extra_forbidden":
            problems[path] = unknown(path)
        else:
            problems[path] = _explain_one(model, path, detail, values)
    return list(problems.values())


def _real_path(values: Any, loc: tuple[int | str, ...]) -> Path:
    """`loc` without the names of a union's branches, which pydantic puts between keys."""
    path: list[int | str] = []
    for index, part in enumerate(loc):
        if isinstance(values, dict):
            if part not in values and index < len(loc) - 1:
                continue
            path.append(part)
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            path.append(part)
            values = values[part]
        else:
            break
    return tuple(path)


def _explain_one(model: type[BaseModel], path: Path, detail: ErrorDetails, values: dict[str, Any]) -> Problem:
    value: Any = values
    for part in path:
        value = value.get(part) if isinstance(value, dict) else value[part]  # type: ignore[index]
    field = field_at(model, path)
    kind = detail["type"]
    if path[:1] == ("secrets",):
        what = (
            "does not say where it is found."
            if len(path) > 1
            else "is not a mapping of names to where each is found."
        )
        return Problem(path, what, _SECRETS_HINT)
    if kind == "missing":
        return Problem(path, "is required and not given.", _write(path, field))
    if kind in ("value_error", "assertion_error"):
        return Problem(path, str(detail.get("ctx", {}).get("error", detail["msg"])))
    if value is None:
        return Problem(path, "is empty.", "Write a value, or remove the key for its default.")
    if kind == "too_short" and value == []:
        return Problem(path, "is an empty list; it needs at least one entry.", _write(path, field))
    words = field_words(field) if field else "text"  # a mapping's values, such as node labels
    if isinstance(path[-1], int) and field:
        words = words.removeprefix("a list, each ")
    if kind == "string_too_short":
        return Problem(path, "is empty text.", _write(path, field))
    return Problem(path, f"{show(value)} is not {words}.", _advice(value, detail, field, words))


_SECRETS_HINT = "Write secrets: {HF_TOKEN: env}, or {HF_TOKEN: file:/path}."

_EXAMPLES: dict[Path, str] = {
    ("model",): "Write model: {base_model: DIRECTORY or HUB_ID}.",
    ("model", "base_model"): "Write model: {base_model: DIRECTORY or HUB_ID}.",
    ("data",): "Write data: {datasets: [{path: FILE.jsonl, type: chat}]}.",
    ("data", "datasets"): "Write data: {datasets: [{path: FILE.jsonl, type: chat}]}.",
}


def _write(path: Path, field: FieldInfo | None) -> str | None:
    if path in _EXAMPLES:
        return _EXAMPLES[path]
    return f"It is {field.description}." if field and field.description else None


def _advice(value: Any, detail: ErrorDetails, field: FieldInfo | None, words: str) -> str | None:
    if (
        field
        and isinstance(value, str)
        and (inner := model_in(field.annotation))
        and "path" in inner.model_fields
    ):
        return f"Write {{path: {value}}}." if words == "a mapping" else f"Write [{{path: {value}}}]."
    if isinstance(value, str):
        near = closest(value, _choices(field.annotation) if field else [])
        if near:
            return f"Closest: '{near[0]}'."
        lower = value.lower()
        if "true or false" in words and lower in ("yes", "on", "no", "off", "true", "false", "y", "n"):
            return f"Write {'true' if lower in ('yes', 'on', 'true', 'y') else 'false'}."
        if "number" in words and _is_number(value):
            return f"Remove the quotes: {value}."
    if detail["type"] == "string_type" and not isinstance(value, (dict, list)):
        return f"Put it in quotes: '{show(value)}'."
    if words.startswith("a list") and not isinstance(value, (dict, list)):
        return f"Write a list: [{value}]."
    if words == "a mapping" and field and (inner := model_in(field.annotation)):
        keys = [each.alias or name for name, each in inner.model_fields.items()]
        return f"Its keys: {', '.join(keys if len(keys) < 6 else (*keys[:4], '...'))}"
    return None


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(argument) for argument in get_args(annotation)]
    return [choice for each in get_args(annotation) for choice in _choices(each)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def known_paths(model: type[BaseModel], prefix: Path = ()) -> dict[str, FieldInfo]:
    """Every key below `model` by its dotted path; a list's entries stand under their list's name."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        path = (*prefix, field.alias or name)
        found[dotted(path)] = field
        if inner := model_in(field.annotation):
            found |= known_paths(inner, path)
    return found
