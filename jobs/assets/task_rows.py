"""Documents -> rows of the tasks other than chat: classes, tagged tokens, spans, pairs of texts.

They are made of the sentences and signatures that `questions.py` makes chats of, under its rules, so that they
too are the same byte for byte on each micro release of CPython 3.11.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from documents import Document, normal
from questions import call_signature, question, sentences, text_hash

KINDS = ("class", "function", "module")
PER_KIND = 420
"""Rows of a class, at most: nine of ten would be functions."""
MOST = 900
"""Rows of a file, at most."""
_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Said:
    """One thing of the documentation and the first sentence about it."""

    name: str
    kind: str
    signature: str
    question: str
    sentence: str
    document: str


def things(documents: Iterable[Document], corpus: Iterable[str]) -> list[Said]:
    """Each thing once, ordered by a hash of its name; none whose sentence the base has seen or that repeats."""
    known = normal(" ".join(corpus))
    seen: set[str] = set()
    found = []
    for document in documents:
        if not document.for_rows:
            continue
        for entry in document.entries:
            said = sentences(entry)
            if said is None or entry.kind not in KINDS:
                continue
            name, sentence = said[0], str(said[1][0])
            if sentence not in seen and name not in seen and sentence not in known:
                seen |= {sentence, name}
                asked = question(entry.kind, name, entry.name)
                found.append(Said(name, entry.kind, call_signature(entry), asked, sentence, document.name))
    return sorted(found, key=lambda said: text_hash(said.name))


def classification(found: list[Said]) -> list[dict]:
    """`{"text": sentence, "label": what it is about}`."""
    chosen = [said for kind in KINDS for said in [s for s in found if s.kind == kind][:PER_KIND]]
    rows = [{"text": said.sentence, "label": said.kind, "document": said.document} for said in chosen]
    return sorted(rows, key=lambda row: text_hash(row["text"]))


def token_classification(found: list[Said]) -> list[dict]:
    """`{"tokens": [...], "tags": [...]}`: signatures with owners, names, parameters and defaults in BIO."""
    rows = []
    for said in found:
        if said.kind != "function" or "," not in said.signature or len(said.name + said.signature) > 160:
            continue
        tokens, tags = tagged(said.name, said.signature)
        rows.append({"tokens": tokens, "tags": tags, "document": said.document})
    return rows[:MOST]


def tagged(name: str, signature: str) -> tuple[list[str], list[str]]:
    """The tokens of `name` and `signature` with their tags: OWNER, NAME, PARAM and DEFAULT, each B- or I-."""
    *owner, last = name.split(".")
    pairs: list[tuple[str, str]] = []
    for number, part in enumerate(owner):
        pairs += [(".", "I-OWNER")] * bool(number) + [(part, "I-OWNER" if number else "B-OWNER")]
    pairs += [(".", "O")] * bool(owner) + [(last, "B-NAME"), ("(", "O")]
    for number, argument in enumerate(_arguments(signature)):
        declared, is_given, default = argument.partition("=")
        pairs += [(",", "O")] * bool(number)
        pairs += [(token, "B-PARAM" if token.isidentifier() else "O") for token in _TOKEN.findall(declared)]
        pairs += [("=", "O")] * bool(is_given)
        for place, token in enumerate(_TOKEN.findall(default)):
            pairs.append((token, "I-DEFAULT" if place else "B-DEFAULT"))
    pairs.append((")", "O"))
    return [token for token, _ in pairs], [tag for _, tag in pairs]


def qa(found: list[Said]) -> list[dict]:
    """SQuAD's columns: a signature and what it does, and a question whose answer is a part of that."""
    rows = []
    for said in found:
        if said.kind != "function" or len(said.name + said.signature) > 160 or "." not in said.name:
            continue
        tokens, tags = tagged(said.name, said.signature)
        owner, _, name = said.name.rpartition(".")
        context = f"{said.name}{said.signature}: {said.sentence}"
        answers = [
            ("What does it do?", said.sentence, context.rindex(said.sentence)),
            ("Where is it?", owner, 0),
            ("What is its name?", name, len(owner) + 1),
        ]
        if "B-PARAM" in tags:
            first = tokens[tags.index("B-PARAM")]
            begin = re.search(rf"\b{first}\b", context[len(said.name) :])
            answers.append(
                ("What does it take first?", first, len(said.name) + (begin.start() if begin else 0))
            )
        question, text, start = answers[text_hash(said.name + "?") % len(answers)]
        answer = {"text": [text], "answer_start": [start]}
        rows.append({"question": question, "context": context, "answers": answer, "document": said.document})
    return rows[:MOST]


def seq2seq(found: list[Said]) -> list[dict]:
    """`{"source": signature, "target": a sentence that names what the function takes}`."""
    rows = []
    for said in found:
        if said.kind != "function" or len(said.name + said.signature) > 120:
            continue
        tokens, tags = tagged(said.name, said.signature)
        taken = [token for token, tag in zip(tokens, tags, strict=True) if tag == "B-PARAM"]
        if taken:
            *most, last = taken
            listed = f"{', '.join(most)} and {last}" if most else last
            target = f"{said.name.split('.')[-1]} takes {listed}."
            rows.append({"source": said.name + said.signature, "target": target, "document": said.document})
    return rows[:MOST]


def embedding(found: list[Said]) -> list[dict]:
    """`{"anchor": question, "positive": sentence}`."""
    return [{"anchor": s.question, "positive": s.sentence, "document": s.document} for s in found][:MOST]


def _arguments(signature: str) -> Iterator[str]:
    """The arguments of `(a, b=(1, 2))`, brackets and quotes kept whole."""
    depth, quote, argument = 0, "", ""
    for letter in signature[1:-1]:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if letter == "," and not depth and not quote:
            yield argument.strip()
            argument = ""
        else:
            argument += letter
    if argument.strip():
        yield argument.strip()
