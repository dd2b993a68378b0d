"""Names that become folders, parts of URLs and ids, and which there may be. A check returns the name, or raises
ValueError with the rule."""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NAME_RULE = "A name is 1 to 100 letters, digits, '.', '_' or '-', and starts with a letter or a digit."
ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
ADAPTER_RULE = "Use letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit."
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
ALIAS_RULE = "Use letters, digits, '.', '_' and '-', at most 63, beginning with a letter."


def check_name(name: str) -> str:
    """Of a job or an endpoint."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' is not a name. {_NAME_RULE}")
    return name


def check_adapter(name: str) -> str:
    """Of an adapter: what stands before the `@` of its versions."""
    if not ADAPTER.fullmatch(name):
        raise ValueError(f"'{name}' cannot be an adapter's name. {ADAPTER_RULE}")
    return name


def check_alias(name: str) -> str:
    """Of a version: what stands behind the `@`, and cannot be taken for a version's number."""
    if name.isdigit():
        raise ValueError(f"'{name}' is not an alias: NAME@{name} means a version. Begin with a letter.")
    if not ALIAS.fullmatch(name):
        raise ValueError(f"'{name}' cannot be an alias. {ALIAS_RULE}")
    return name
