"""A gate's comparisons, read: `eval_loss <= production.eval_loss + 0.01`.

    comparison = sum ("<" | "<=" | ">" | ">=" | "==" | "!=") sum
    sum        = product (("+" | "-") product)*
    product    = value (("*" | "/") value)*
    value      = number | metric | "-" value | "(" sum ")"

A metric is a name, alone or after `base.` or `production.`. Nothing is ever evaluated as Python.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)"
    r"|(?P<sign><=|>=|==|!=|<|>|[-+*/()]))"
)
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_RULE = "Write a comparison such as eval_loss < base.eval_loss, or exact_match >= 0.8."

Term = tuple
"""`("number", x)`, `("name", text)`, or `(sign, Term, Term)`."""


@dataclass(frozen=True)
class Comparison:
    """One comparison. `names` are its metrics, in the order they stand."""

    text: str
    left: Term
    sign: str
    right: Term
    names: tuple[str, ...]

    def sides(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """The values of both sides. Raises KeyError with the name of a metric that is not there."""
        return _value(self.left, metrics), _value(self.right, metrics)

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether it holds; a NaN on either side never does. Raises KeyError for a metric that is not there."""
        left, right = self.sides(metrics)
        return left == left and right == right and _COMPARE[self.sign](left, right)


def parse_comparison(text: str) -> Comparison:
    """Raises ValueError, with the rule, where `text` is no comparison."""
    tokens = _tokens(text)
    reader = _Parser(text, tokens)
    left = reader.sum()
    sign = reader.next()
    if sign not in _COMPARE:
        raise ValueError(f"'{text}' is not a comparison. {_RULE}")
    right = reader.sum()
    if reader.peek() is not None:
        raise ValueError(f"'{text}' is not one comparison: '{reader.peek()}' is left over. {_RULE}")
    names = tuple(dict.fromkeys(value for kind, value in tokens if kind == "name"))
    if not names:
        raise ValueError(f"'{text}' names no metric. {_RULE}")
    return Comparison(text, left, sign, right, names)


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, position, end = [], 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(
                f"'{text}' is not a comparison: '{text[position:].strip()[0]}' has no meaning here. {_RULE}"
            )
        tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
        position = match.end()
    return tokens


class _Parser:
    def __init__(self, text: str, tokens: list[tuple[str, str]]) -> None:
        self.text, self.tokens, self.position = text, tokens, 0

    def peek(self) -> str | None:
        return self.tokens[self.position][1] if self.position < len(self.tokens) else None

    def next(self) -> str | None:
        token = self.peek()
        self.position += 1
        return token

    def sum(self) -> Term:
        return self._chain(self.product, "+-")

    def product(self) -> Term:
        return self._chain(self.value, "*/")

    def _chain(self, inner: Callable[[], Term], signs: str) -> Term:
        term = inner()
        while (sign := self.peek()) is not None and sign in signs:
            self.next()
            term = (sign, term, inner())
        return term

    def value(self) -> Term:
        if self.position >= len(self.tokens):
            raise ValueError(f"'{self.text}' is not a comparison: it ends too early. {_RULE}")
        kind, token = self.tokens[self.position]
        self.position += 1
        if kind == "number":
            return ("number", float(token))
        if kind == "name":
            return ("name", token)
        if token == "-":
            return ("-", ("number", 0.0), self.value())
        if token == "(":
            inner = self.sum()
            if self.next() != ")":
                raise ValueError(f"'{self.text}' is not a comparison: a bracket is not closed. {_RULE}")
            return inner
        raise ValueError(f"'{self.text}' is not a comparison: '{token}' cannot stand there. {_RULE}")


def _value(term: Term, metrics: Mapping[str, float]) -> float:
    kind = term[0]
    if kind == "number":
        return term[1]
    if kind == "name":
        return float(metrics[term[1]])
    left, right = _value(term[1], metrics), _value(term[2], metrics)
    if kind == "/":
        return left / right if right else float("nan")
    return {"+": operator.add, "-": operator.sub, "*": operator.mul}[kind](left, right)
