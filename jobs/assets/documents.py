"""The text that every CPython 3.11 carries, as named documents, and which side each document belongs to.

A document is a topic of `pydoc_data`, a module of the standard library, or a built-in type or C module.
Sources are parsed and never imported, so that nothing depends on what else is installed; only built-in
objects are asked for their `__doc__`. A document's side follows from the hash of its name, so that it stays
on its side when a later release edits its text: the rows come from one side, the base's corpus from the
other.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import itertools
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

SHARE_OF_ROWS = 0.55
"""The share of documents whose text becomes question/answer rows; the base trains on the rest."""

# Absent or patched in some distributions, generated at build time, or not documentation.
SKIPPED = {
    "antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site", "sysconfig", "test",
    "this", "tkinter", "turtle", "turtledemo", "venv", "webbrowser", "__hello__", "__phello__", "__future__",
    "_bootsubprocess", "_aix_support", "_osx_support", "_distutils_system_mod", "_collections_abc",
    "_pydecimal", "_pyio", "pip", "setuptools", "pkg_resources",
}  # fmt: skip
SKIPPED_PARTS = {
    "test", "tests", "__pycache__", "site-packages", "dist-packages", "lib-dynload", "_vendor", "encodings",
    "macholib",
}  # fmt: skip

# Modules that repeat one another's text stay together on one side.
FAMILIES = {
    "ntpath": "os.path", "posixpath": "os.path", "genericpath": "os.path", "os": "os.path",
    "_pydatetime": "datetime", "_strptime": "time", "_weakrefset": "weakref", "_threading_local": "threading",
    "sre_compile": "re", "sre_parse": "re", "sre_constants": "re", "_sitebuiltins": "builtins",
}  # fmt: skip

C_TYPES = (
    "bool", "bytearray", "bytes", "classmethod", "complex", "dict", "enumerate", "filter", "float",
    "frozenset", "int", "list", "map", "memoryview", "object", "property", "range", "reversed", "set",
    "slice", "staticmethod", "str", "super", "tuple", "type", "zip",
)  # fmt: skip
C_MODULES = (
    "array", "atexit", "binascii", "builtins", "cmath", "errno", "faulthandler", "gc", "itertools", "math",
    "time", "marshal", "unicodedata", "zlib", "_bisect", "_codecs", "_collections", "_csv", "_functools",
    "_heapq", "_json", "_operator", "_random", "_signal", "_sre", "_struct", "_thread", "_weakref",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One documented thing. `kind`: module | class | function | section; `signature` where it has one."""

    name: str
    kind: str
    signature: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A topic, a module or a built-in; `source` is empty for built-ins."""

    name: str
    entries: tuple[Entry, ...]
    source: str

    @property
    def for_rows(self) -> bool:
        """Whether the rows, and not the base's corpus, are made from this document."""
        digest = hashlib.sha256(_family(self.name).encode()).digest()
        return int.from_bytes(digest[:4], "big") < SHARE_OF_ROWS * 2**32


def all_documents() -> list[Document]:
    """Every document, in the order of its name."""
    found = [*_topics(), *_modules(), *_built_ins()]
    return sorted(found, key=lambda document: document.name)


def corpus(documents: list[Document]) -> list[str]:
    """The base's training text, one string per document: signatures and docstrings first, then the source."""
    texts = []
    for document in documents:
        if document.for_rows:
            continue
        if document.name.startswith("topic "):
            texts.append(document.source)
            continue
        described = [
            f"{entry.name}{entry.signature}\n\n" + "\n\n".join(entry.paragraphs) for entry in document.entries
        ]
        if described:
            texts.append("\n\n".join(described))
        if document.source:
            texts.append(document.source)
    return texts


def normal(text: str) -> str:
    """`text` with every run of white space as one blank: what counts as the same text."""
    return " ".join(text.split())


def _family(name: str) -> str:
    top = re.split(r"[ .]", name.removeprefix("built-in "))[0] if name.startswith("built-in ") else name
    top = top.lstrip("_") if name.startswith("built-in ") else top
    return FAMILIES.get(top, FAMILIES.get(name, top))


def _topics() -> Iterator[Document]:
    for key, text in topics.items():
        yield Document(f"topic {key}", tuple(_sections(text)), text)


def _sections(text: str) -> Iterator[Entry]:
    """Titled sections, and the definitions (`str.strip(...)` above an indented text) inside them."""
    lines = text.splitlines()
    title, body = "", []
    for i, line in enumerate(lines):
        under = lines[i + 1] if i + 1 < len(lines) else ""
        if line and re.fullmatch(r"([*=\-^~])\1{2,}", under) and len(under) == len(line):
            yield from _section(title, body)
            title, body = line, []
        elif not re.fullmatch(r"([*=\-^~])\1{2,}", line):
            body.append(line)
    yield from _section(title, body)


def _section(title: str, body: list[str]) -> Iterator[Entry]:
    blocks = [block for block in "\n".join(body).split("\n\n") if block.strip()]
    if title:
        plain = [normal(block) for block in blocks if not block.startswith((" ", "*", "+", "|", "-"))]
        yield Entry(title.replace('"', "`"), "section", "", tuple(plain))
    for head, after in itertools.pairwise(blocks):
        match = re.fullmatch(r"(?:class )?([A-Za-z_]\w*\.[\w.]*)(\([^()]*\))", head.strip())
        if match and after.startswith("   ") and not after.startswith("    ") and not head.startswith(" "):
            yield Entry(match[1], "function", match[2], (normal(after),))


def _modules() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_PARTS & set(parts) or parts[0] in SKIPPED or parts[0].startswith("_sysconfigdata"):
            continue
        if any("-" in part for part in parts) or parts[0] == "sitecustomize":
            continue
        name = ".".join(part for part in parts if part != "__init__")
        source = path.read_text(encoding="utf-8", errors="replace")
        yield Document(name, tuple(_definitions(name, source)), source)


def _definitions(module: str, source: str) -> Iterator[Entry]:
    tree = ast.parse(source)
    text = ast.get_docstring(tree)
    if text:
        yield Entry(module, "module", "", _paragraphs(text))
    yield from _children(module, tree)


def _children(prefix: str, node: ast.AST) -> Iterator[Entry]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            name = f"{prefix}.{child.name}"
            text = ast.get_docstring(child)
            if text:
                yield Entry(name, "class", "", _paragraphs(text))
            yield from _children(name, child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(child)
            if text:
                signature = f"({ast.unparse(child.args)})"
                yield Entry(f"{prefix}.{child.name}", "function", signature, _paragraphs(text))


def _built_ins() -> Iterator[Document]:
    import builtins

    for name in C_TYPES:
        cls = getattr(builtins, name)
        entries = [Entry(name, "class", "", _paragraphs(cls.__doc__ or ""))]
        entries += _members(name, cls)
        yield Document(f"built-in {name}", tuple(entries), "")
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        public = name.lstrip("_")
        yield Document(f"built-in {public}", tuple(_members(public, module)), "")


def _members(prefix: str, owner: object) -> Iterator[Entry]:
    inherited = (
        set() if inspect.ismodule(owner) or owner is object else {m.__doc__ for m in vars(object).values()}
    )
    for name, member in sorted(vars(owner).items()):
        text = member.__doc__
        if not callable(member) or not isinstance(text, str) or text in inherited:
            continue
        if inspect.isclass(member) and prefix == "builtins":
            continue  # types have documents of their own, and exceptions say little
        kind = "class" if inspect.isclass(member) else "function"
        signature = getattr(member, "__text_signature__", None) or ""
        yield Entry(f"{prefix}.{name}".removeprefix("builtins."), kind, signature, _paragraphs(text))


def _paragraphs(docstring: str) -> tuple[str, ...]:
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return tuple(block.rstrip() for block in blocks if block.strip())
