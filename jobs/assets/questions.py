"""Documents -> question/answer rows in chat form: what the documentation itself says, asked for by name.

A row is left out where its answer is also found in the base's corpus, where another row gives the same
answer, or where its text differs between micro releases of CPython 3.11 (`UNSTABLE`): the file is the same
byte for byte on each.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from documents import Document, Entry, normal

MIN_CHARS, MAX_CHARS = 14, 160
MAX_BODY = 2000
TURNS = (
    ("section", ("What does the Python reference say about {name}?", "Explain {name} in Python.")),
    ("module", ("What is the module {name} for?", "What is {name} in Python?")),
    ("class", ("What is {name}?", "What is the class {name} for?")),
    ("function", ("What does {name} do?", "What is {name} for?")),
)
QUESTIONS = dict(TURNS)
MORE = "Tell me more."
HOW = "How is {name} called?"

# Compared between 3.11.2 (as Debian patches it) and 3.11.7; a name that ends in a dot stands for all below it.
UNSTABLE = (
    "asyncio.streams.StreamReader.read", "asyncio.taskgroups", "asyncio.taskgroups.",
    "collections.OrderedDict.__new__", "email.errors.HeaderWriteError", "email.utils.getaddresses",
    "email.utils.parseaddr", "logging", "pdb.runeval", "pydoc.doc", "shutil.rmtree", "shutil.unpack_archive",
)  # fmt: skip
BELOW_UNSTABLE = tuple(name for name in UNSTABLE if name.endswith("."))
UNSTABLE_SECTIONS = (
    "Attribute references", "Dictionary view objects", "String Methods", "`pdb` — The Python Debugger",
)  # fmt: skip


def rows(documents: Iterable[Document], corpus: Iterable[str]) -> list[dict]:
    """`{"messages": [...], "document": name}` rows, ordered by a hash of the question."""
    known = normal(" ".join(corpus))
    seen: set[str] = set()
    found = []
    for document in documents:
        if not document.for_rows:
            continue
        for entry in document.entries:
            for messages in _dialogues(entry):
                answers = [m["content"] for m in messages if m["role"] == "assistant"]
                if any(text in seen for text in answers) or messages[0]["content"] in seen:
                    continue
                if any(text in known for text in answers):
                    continue
                seen.update(answers, [messages[0]["content"]])
                found.append({"messages": messages, "document": document.name})
    return sorted(found, key=lambda row: text_hash(row["messages"][0]["content"]))


def topic_rows(documents: Iterable[Document], corpus: Iterable[str]) -> list[dict]:
    """`{"title": ..., "body": ...}`: the prose of those sections of the language reference that the base has
    not seen."""
    known = normal(" ".join(corpus))
    found = []
    for document in documents:
        if not document.for_rows or not document.name.startswith("topic "):
            continue
        for entry in document.entries:
            body = "\n\n".join(text for text in entry.paragraphs if text.isascii() and text not in known)
            if entry.kind == "section" and len(body) >= 200 and entry.name not in UNSTABLE_SECTIONS:
                found.append({"title": entry.name, "body": body[:MAX_BODY]})
    return found


def to_jsonl(found: list[dict]) -> str:
    """One row a line, the same text for the same rows."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


def sha256(path: Path) -> str:
    """The file's sha256, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sentences(entry: Entry) -> tuple[str, list[str | None]] | None:
    """(its public name, the first sentences of its first paragraphs); None where it is private, unstable or its
    first paragraph says nothing plain. A paragraph that is a signature is passed over."""
    name = _public(entry.name)
    if name is None or entry.name in UNSTABLE or entry.name.startswith(BELOW_UNSTABLE):
        return None
    said = [_answer(paragraph) for paragraph in entry.paragraphs[:3]]
    if said and said[0] is None and len(said) > 1 and _is_signature(entry.paragraphs[0]):
        said = said[1:]
    return (name, said) if said and said[0] is not None else None


def call_signature(entry: Entry) -> str:
    """`(iterable=None, /, **kwds)`: as one who calls it writes it."""
    return re.sub(r"^\(\$?(self|cls|module|type)(, /)?(, )?", "(", entry.signature)


def question(kind: str, name: str, full_name: str) -> str:
    """It asked for by name, one way or the other."""
    choices = QUESTIONS[kind]
    return choices[text_hash(full_name) % len(choices)].format(name=name)


def _dialogues(entry: Entry) -> Iterator[list[dict]]:
    found = sentences(entry)
    if found is None:
        return
    name, said = found
    messages = _turn(question(entry.kind, name, entry.name), str(said[0]))
    if len(said) > 1 and said[1] is not None and text_hash(entry.name + "?") % 4 == 0:
        messages += _turn(MORE, said[1])
    yield messages
    call = f"{name}{call_signature(entry)}"
    if entry.kind == "function" and "," in call_signature(entry) and len(call) <= 160:
        yield _turn(HOW.format(name=name), call)


def _turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _public(name: str) -> str | None:
    """The name as a reader would write it; None for private ones."""
    if " " in name or "`" in name:
        return name  # a section's title
    parts = name.split(".")
    if any(part.startswith("_") and not re.fullmatch(r"__\w+__", part) for part in parts):
        return None
    return name


def _is_signature(paragraph: str) -> bool:
    return re.match(r"[\w.]+\(", paragraph) is not None


def _answer(paragraph: str) -> str | None:
    """The paragraph's first sentence, or None where the paragraph is no plain prose of a fitting length."""
    lines = paragraph.splitlines()
    if any(line.startswith(("    ", ">>>", "-", "*", "=", "+", "|", ":", "#", "@", ".. ")) for line in lines):
        return None
    text = _first_sentence(normal(paragraph))
    plain = text.isascii() and not re.search(r"::=|>>>|\bXXX\b|Copyright|\bTODO\b|->.*->", text)
    if not plain or not MIN_CHARS <= len(text) <= MAX_CHARS or len(text.split()) < 3 or _is_signature(text):
        return None
    return text if text[0].isupper() and text[-1] in ".!:)" else None


def _first_sentence(text: str) -> str:
    match = re.match(r".+?[.!](?= [A-Z])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)", text)
    return match[0] if match and match[0].count("(") == match[0].count(")") else text


def text_hash(text: str) -> int:
    """A number that follows from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
