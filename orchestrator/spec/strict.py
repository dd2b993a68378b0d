"""Plain values -> JobSpec, strictly: nothing is converted but what YAML cannot say."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from .job import JobSpec


def strict_job(values: dict[str, Any]) -> JobSpec:
    """pydantic's strict mode, by way of JSON: lists are taken for tuples, and nothing else is converted. Whole floats
    become whole numbers in `values` where one is asked for."""
    for _ in range(2):
        try:
            return JobSpec.model_validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            if not _whole_floats(values, error):
                raise
    return JobSpec.model_validate_json(json.dumps(values), strict=True)


def _whole_floats(values: dict[str, Any], error: ValidationError) -> bool:
    """YAML's `1e4` is a float: where a whole number is asked for and this is one, it is taken as one."""
    changed = False
    for detail in error.errors():
        value = detail["input"]
        if detail["type"] != "int_type" or not isinstance(value, float) or value != int(value):
            continue
        parent: Any = values
        *way, last = detail["loc"]
        for part in way:
            parent = parent[part] if not isinstance(parent, dict) or part in parent else None
            if parent is None:
                break
        if isinstance(parent, dict) and parent.get(last) == value:
            parent[last] = int(value)
            changed = True
    return changed
