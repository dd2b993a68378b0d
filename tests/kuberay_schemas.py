"""KubeRay's own schemas, for tests: strict, as `kubectl apply --validate=strict` is."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parent.parent.parent / "shared" / "data" / "kuberay-crds"


def problems(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay's CRD of the manifest's kind says is wrong. Skips the test where the CRDs are not at
    hand."""
    assert manifest["apiVersion"] == "ray.io/v1"
    errors = validator(manifest["kind"]).iter_errors(manifest)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors]


@functools.cache
def validator(kind: str) -> Draft202012Validator:
    """The validator of `RayJob`, `RayCluster` or `RayService`."""
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CRD schemas are not at hand ({path.name} is looked for beside the checkout)")
    with open(path) as file:
        definition = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(each for each in definition["spec"]["versions"] if each["name"] == "v1")
    return Draft202012Validator(_strict(version["schema"]["openAPIV3Schema"], top=True))


def _strict(schema: Any, top: bool = False) -> Any:
    """The schema with unknown keys refused: Kubernetes drops them in silence, so a typing error would
    pass."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {
        key: {name: _strict(each) for name, each in value.items()} if key == "properties" else _strict(value)
        for key, value in schema.items()
        if key != "default"
    }
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    if top:
        # metadata is Kubernetes' own; the CRD says only that it is an object
        strict["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict
