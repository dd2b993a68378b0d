"""YAML 1.2 text -> values with their places. One way in: files, `--set` and stored specs all come through here.

`1e-3` is a number, `no` and `on` are text (PyYAML, with YAML 1.1, reads them the other way round).
"""

from __future__ import annotations

import math
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..errors import SpecError, first_line
from .places import Path, Place, Tree, dotted, raise_all

_MOST_VALUES = 100_000
"""More values than any job has: stops a file whose anchors multiply."""

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*\Z")
_RADIX = re.compile(r"0o[0-7_]+\Z|0x[0-9a-fA-F_]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?\Z")
_NAMED = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


def decode(raw: bytes, source: str) -> str:
    """Bytes of a file as text. Raises SpecError where they are not text."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        if b"\0" in raw:
            raise SpecError("is a binary file, not a YAML job.", where=source) from None
        raise SpecError(
            f"byte 0x{raw[error.start]:02x} is not UTF-8.",
            where=f"{source}:{line}",
            hint="Save the file as UTF-8.",
        ) from None
    if "\0" in text:
        raise SpecError("is a binary file, not a YAML job.", where=source)
    return text


def parse_document(text: str, source: str) -> Tree:
    """The job's mapping. Raises SpecError for what is not YAML, empty, or not a mapping, and for duplicate keys."""
    node = _compose(text, source)
    if node is None or (isinstance(node, ScalarNode) and node.value == ""):
        raise SpecError("the file is empty.", where=source, hint="Start from a commented one: raypeft init")
    if not isinstance(node, MappingNode):
        kind = "a list" if isinstance(node, SequenceNode) else "a single value"
        raise SpecError(
            f"the top level is {kind}; a job is a mapping of keys, such as 'model: {{base_model: ...}}'.",
            where=f"{source}:{node.start_mark.line + 1}",
            hint="See one: raypeft init minimal",
        )
    return _Reader(source).tree(node)


def parse_value(text: str, key: str, source: str) -> tuple[Any, dict[Path, Place]]:
    """One value written as YAML (`1e-4`, `[a, b]`, `{x: 1}`), with its places. Text that is no YAML is text."""
    try:
        node = _compose(text, source)
    except SpecError:
        if text.lstrip()[:1] in ("[", "{", '"', "'"):
            raise SpecError(
                f"'{text}' is not a YAML value: a bracket or a quote is not closed.", where=f"{source} {key}"
            ) from None
        return text, {(): Place(0, 0, source, key)}
    if node is None:
        return None, {(): Place(0, 0, source, key)}
    reader = _Reader(source, prefix=key)
    value = reader.value(node, ())
    raise_all(reader.errors)
    return value, reader.places


def _compose(text: str, source: str) -> Node | None:
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        what = (error.problem or error.context or "it cannot be read").strip().rstrip(".")
        if "another document" in what or "single document" in (error.context or ""):
            raise SpecError(
                "holds several YAML documents ('---').", where=where, hint="One file is one job."
            ) from None
        at = f" (column {mark.column + 1})" if mark else ""
        raise SpecError(f"not YAML: {what}{at}.", where=where, hint=_yaml_hint(what)) from None
    except (YAMLError, ValueError) as error:
        what = first_line(error).rstrip(".")
        raise SpecError(f"not YAML: {what}.", where=source) from None
    except RecursionError:
        raise SpecError("not a job: it is nested too deeply.", where=source) from None


def _yaml_hint(problem: str) -> str | None:
    if "\\t" in problem or "tab" in problem:
        return "Indent with spaces, not tabs."
    if "mapping values are not allowed" in problem:
        return "Put quotes around a value that contains ': ', and check the indentation."
    if "undefined alias" in problem:
        return "Put quotes around a value that starts with '*'."
    if "expected <block end>" in problem or "did not find expected" in problem:
        return "Check the indentation and the brackets of this line and the one above."
    return None


class _Reader:
    """Turns composed nodes into plain values, noting places and collecting what breaks a rule."""

    def __init__(self, source: str, prefix: str = "") -> None:
        self.source, self.prefix = source, prefix
        self.places: dict[Path, Place] = {}
        self.errors: list[SpecError] = []
        self._open: set[int] = set()
        self._count = 0

    def tree(self, node: MappingNode) -> Tree:
        try:
            values = self.value(node, ())
        except RecursionError:
            raise SpecError("not a job: it is nested too deeply.", where=self.source) from None
        raise_all(self.errors)
        self.places.pop((), None)
        return Tree(self.source, values, self.places)

    def value(self, node: Node, path: Path, at: Node | None = None) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES:
            raise SpecError("not a job: its anchors multiply to too many values.", where=self.source)
        if id(node) in self._open:
            raise SpecError("an anchor contains itself.", where=f"{self.source}:{node.start_mark.line + 1}")
        self.places[path] = self._place(at or node, path)
        if not isinstance(node, ScalarNode) and str(node.tag).removeprefix("tag:yaml.org,2002:") not in (
            "map",
            "seq",
        ):
            self._fail(node.start_mark.line + 1, path, f"the tag {node.tag} is not allowed.", "Remove it.")
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, path)
            if isinstance(node, SequenceNode):
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            assert isinstance(node, ScalarNode)
            return self._scalar(node, path)
        finally:
            self._open.discard(id(node))

    def _place(self, node: Node, path: Path) -> Place:
        key = ".".join(part for part in (self.prefix, dotted(path)) if part)
        if self.prefix:
            return Place(0, 0, self.source, key)
        return Place(node.start_mark.line + 1, node.start_mark.column + 1, self.source, key)

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: list[Node] = []
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self._fail(line, path, "a key is text, not a list or a mapping.")
                continue
            key = key_node.value
            if key == "<<" and key_node.style is None:
                merged += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
                continue
            if key_node.style is None and not isinstance(_plain(key), str):
                self._fail(line, path, f"the key {key or '(nothing)'} is not text.", "Put it in quotes.")
                continue
            if key in lines:
                self._fail(
                    line,
                    (*path, key),
                    f"the key stands twice, on line {lines[key]} and on line {line}.",
                    "Keep one of them.",
                )
                continue
            lines[key] = line
            values[key] = self.value(value_node, (*path, key), at=key_node)
        for base in merged:
            self._merge(base, path, values)
        return values

    def _merge(self, base: Node, path: Path, values: dict[str, Any]) -> None:
        if not isinstance(base, MappingNode):
            self._fail(base.start_mark.line + 1, path, "'<<' merges a mapping, nothing else.")
            return
        for key_node, value_node in base.value:
            if isinstance(key_node, ScalarNode) and key_node.value not in values:
                values[key_node.value] = self.value(value_node, (*path, key_node.value), at=key_node)

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        tag = str(node.tag) if node.tag else ""
        if tag and not tag.startswith("tag:yaml.org,2002:"):
            self._fail(node.start_mark.line + 1, path, f"the tag {tag} is not allowed.", "Remove it.")
            return None
        explicit = tag.removeprefix("tag:yaml.org,2002:")
        if explicit.startswith("python") or explicit in {"binary", "omap", "set"}:
            self._fail(node.start_mark.line + 1, path, f"the tag !!{explicit} is not allowed.", "Remove it.")
            return None
        if node.style is not None or (explicit == "str" and not isinstance(_plain(node.value), str)):
            return node.value
        value = _plain(node.value)
        if isinstance(value, float) and not math.isfinite(value):
            self._fail(
                node.start_mark.line + 1, path, f"{node.value} is not a finite number.", "Write a number."
            )
        return value

    def _fail(self, line: int, path: Path, problem: str, hint: str | None = None) -> None:
        key = ".".join(part for part in (self.prefix, dotted(path)) if part)
        where = f"{self.source} {key}" if self.prefix else f"{self.source}:{line} {key}".rstrip()
        self.errors.append(SpecError(problem, where=where, hint=hint))


def _plain(text: str) -> Any:
    """A scalar without quotes, by YAML 1.2's core schema."""
    if len(text) > 64:  # no number that a job holds is longer
        return text
    lower = text.lower()
    if lower in _WORDS and text in (lower, lower.capitalize(), lower.upper()):
        return _WORDS[lower]
    if _INTEGER.match(text):
        return int(text.replace("_", ""))
    if _RADIX.match(text):
        return int(text.replace("_", ""), 0)
    if _FLOAT.match(text):
        return float(text.replace("_", ""))
    return _NAMED.get(lower, text)
