"""The JSON Schema of a job, for editors: `raypeft schema > job.schema.json`."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError

from .adapter import MethodField, method_fields, method_names
from .alias_table import DATASET_TYPES, ROWS, SECTION_ALIASES
from .job import JobSpec
from .load import FORMAT
from .places import MISSING


def json_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12: every key, its type, default and meaning; aliases; each method's fields."""
    schema = JobSpec.model_json_schema(by_alias=True)
    definitions, properties = schema["$defs"], schema["properties"]
    definitions["AdapterSpec"] = _adapter(definitions["AdapterSpec"])
    dataset_type = definitions["DatasetSpec"]["properties"]["type"]
    dataset_type["enum"] = [*dataset_type["enum"], *DATASET_TYPES]
    definitions["DatasetSpec"]["properties"]["field"] = {
        "type": "string",
        "description": "alias of field_text",
    }
    properties["adapter"] = {
        "description": "what is trained: a method's name, or its name and fields",
        "anyOf": [{"$ref": "#/$defs/AdapterSpec"}, {"enum": method_names()}],
    }
    properties["extends"] = {
        "type": "string",
        "description": "the job that this one overrides, relative to it",
    }
    properties["format"] = {"const": FORMAT, "description": "of what is stored; written by raypeft"}
    for row in ROWS:
        if row.target:
            properties.setdefault(row.name, {"description": f"alias of {row.target}"})
    training = definitions["TrainingSpec"]["properties"]
    for key, (target, _) in SECTION_ALIASES.items():
        training[key.split(".")[1]] = {"type": ["boolean", "string"], "description": f"alias of {target}"}
    for tracker in definitions["TrackingSpec"]["properties"].values():
        tracker["anyOf"].append({"type": "boolean"})
    for section in ("ModelSpec", "DataSpec"):
        definitions[section].pop("required", None)
    del schema["required"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "raypeft job",
        "description": "One YAML file is one job.",
        **{key: value for key, value in schema.items() if key not in ("title", "description")},
        "if": {"not": {"required": ["extends"]}},
        "then": {"allOf": [_given("model", "base_model"), _given("data", "datasets")]},
    }


def _given(section: str, key: str) -> dict[str, Any]:
    """`section.key` stands in its section, or under one of its aliases at the top."""
    aliases = [row.name for row in ROWS if row.target == f"{section}.{key}"]
    return {
        "anyOf": [
            {"required": [section], "properties": {section: {"required": [key]}}},
            *({"required": [alias]} for alias in aliases),
        ]
    }


def _adapter(schema: dict[str, Any]) -> dict[str, Any]:
    ours = {name: value for name, value in schema["properties"].items() if name != "type"}
    return {
        "type": "object",
        "description": "The method and its fields.",
        "oneOf": [_method(kind, ours) for kind in method_names()],
    }


def _method(kind: str, ours: dict[str, Any]) -> dict[str, Any]:
    fields = method_fields(kind)
    properties = {"type": {"const": kind, "description": "a method of `raypeft methods`"}, **ours}
    for field in fields.values():
        properties[field.name] = _field(field)
        for alias in field.aliases:
            properties[alias] = {**_field(field), "description": f"alias of {field.name}"}
    required = [field.name for field in fields.values() if field.default is MISSING]
    if kind != "lora":
        required = ["type", *required]
    return {
        "type": "object",
        "title": kind,
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _field(field: MethodField) -> dict[str, Any]:
    try:
        schema = TypeAdapter(field.annotation).json_schema()
    except PydanticSchemaGenerationError:
        schema = {}
    schema = {**_inlined(schema, schema.get("$defs", {})), "description": field.help or field.name}
    if field.default is not MISSING:
        schema["default"] = field.default
    return schema


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema without references: a field's own definitions would be out of place below the job's."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if reference := schema.get("$ref"):
        return _inlined(definitions[reference.rsplit("/", 1)[-1]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items() if key != "$defs"}
