import glob

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from orchestrator.spec.adapter import method_names
from orchestrator.spec.alias_table import ROWS
from orchestrator.spec.canonical import resolved_yaml
from orchestrator.spec.job import JobSpec
from orchestrator.spec.schema import json_schema
from orchestrator.spec.words import known_paths

from .jobs import spec_of

SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
GOOD = {"model": {"base_model": "b"}, "data": {"datasets": [{"path": "a"}]}}


def errors(job):
    return [error.json_path for error in VALIDATOR.iter_errors(job)]


def test_the_schema_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "path", sorted(glob.glob("jobs/*.yaml") + glob.glob("orchestrator/templates/*.yaml"))
)
def test_every_job_keeps_it(path):
    with open(path) as text:
        assert errors(YAML(typ="safe", pure=True).load(text)) == []


def test_the_resolved_form_keeps_it():
    assert errors(YAML(typ="safe", pure=True).load(resolved_yaml(spec_of("deploy: {}\n")))) == []


@pytest.mark.parametrize(
    "job",
    [
        {},
        {"model": {"base_model": "b"}},
        {**GOOD, "nope": 1},
        {**GOOD, "training": {"nope": 1}},
        {**GOOD, "training": {"lr_scheduler": "cosin"}},
        {**GOOD, "adapter": {"type": "lora", "rr": 1}},
        {**GOOD, "adapter": {"type": "lora", "r": "x"}},
        {**GOOD, "adapter": {"type": "nope"}},
        {**GOOD, "adapter": {"type": "ia3", "r": 8}},
        {**GOOD, "model": {}},
    ],
)
def test_what_breaks_it(job):
    assert errors(job)


@pytest.mark.parametrize(
    "job",
    [
        {**GOOD, "adapter": {"alpha": 3, "dropout": 0.1}},
        {**GOOD, "adapter": "lora"},
        {"base_model": "b", "datasets": [{"path": "a", "type": "sharegpt"}]},
        {"extends": "base.yaml"},
        {"extends": "base.yaml", "model": {"revision": "x"}},
        {**GOOD, "retry": {"start_timeout": "10m"}},
    ],
)
def test_what_keeps_it(job):
    assert errors(job) == []


def test_every_key_is_described():
    assert [key for key, field in known_paths(JobSpec).items() if not field.description] == []
    for row in ROWS:
        assert row.target is None or row.name in SCHEMA["properties"]


def test_each_method_has_its_own_fields():
    variants = {each["title"]: each for each in SCHEMA["$defs"]["AdapterSpec"]["oneOf"]}
    assert list(variants) == method_names()
    assert variants["lora"]["properties"]["r"]["default"] == 8 and "r" not in variants["ia3"]["properties"]
    assert all("description" in field for each in variants.values() for field in each["properties"].values())
