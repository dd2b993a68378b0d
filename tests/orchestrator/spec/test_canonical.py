import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.spec import canonical
from orchestrator.spec.canonical import (
    canonical_hash,
    canonical_values,
    changed_keys,
    keys_that_bar_resume,
    load_stored,
    resolved_yaml,
)
from orchestrator.spec.load import load_job_text

from .jobs import MINIMAL, spec_of


def test_the_stored_form_reads_back():
    spec = spec_of(
        "adapter: {alpha: 4}\ntraining: {learning_rate: 1e-5}\ndeploy: {gate: {all: [eval_loss < 1]}}\n"
    )
    text = resolved_yaml(spec)
    assert (
        text.startswith("format: 1\nname: x\n") and "lora_alpha: 4" in text and "saves_per_epoch: 1" in text
    )
    for again in (load_stored(text), load_job_text(text, "jobs/x.yaml").spec):
        assert canonical_hash(again) == canonical_hash(spec)
        assert changed_keys(spec, again) == []
        assert resolved_yaml(again) == text


def test_what_stands_at_its_default_is_left_out_of_the_hash():
    plain = spec_of()
    assert canonical_values(plain) == {
        "name": "x", "model": {"base_model": "b"}, "data": {"datasets": [{"path": "a.jsonl"}]},
    }  # fmt: skip
    written = spec_of(
        "training: {num_epochs: 1, saves_per_epoch: 1, gradient_accumulation_steps: 1}\ndeepspeed: zero2\n"
        "adapter: {type: lora, r: 8, target_modules: all-linear}\nregister: {name: x}\nretry: {start_timeout: 600}\n"
    )
    assert canonical_hash(written) == canonical_hash(plain)


def test_the_hash_stays_what_it_was():
    """A change of this number would make every stored run look new."""
    assert canonical_hash(spec_of()) == "8f058fa3d520435647df988930e0191df5363911bef0782012ea3f1ff7e78144"


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("training: {seed: 1}\n", ["training.seed"]),
        ("adapter: {r: 4}\n", ["adapter.r"]),
        ("deepspeed: zero3\n", ["deepspeed"]),
        ("resources: {labels: {a: b}}\n", ["resources.labels", "resources.labels.a"]),
        ("deploy: {}\n", None),
    ],
)
def test_changed_keys(text, keys):
    old, new = spec_of(), spec_of(text)
    assert canonical_hash(old) != canonical_hash(new)
    found = changed_keys(old, new)
    assert found == keys if keys else all(key.startswith("deploy") for key in found)


def test_what_bars_a_resume():
    old = spec_of("training: {micro_batch_size: 4}\n")
    assert (
        keys_that_bar_resume(old, spec_of("training: {micro_batch_size: 4, num_epochs: 3, save_steps: 2}\n"))
        == []
    )
    assert keys_that_bar_resume(
        old, spec_of("training: {micro_batch_size: 2}\nresources: {num_workers: 2}\n")
    ) == [], "the same rows a step"  # fmt: skip
    elastic = "training: {micro_batch_size: 2}\nresources: {num_workers: [1, 2]}\ndeepspeed: zero3\n"
    assert keys_that_bar_resume(old, spec_of(elastic)) == []
    assert keys_that_bar_resume(old, spec_of("training: {micro_batch_size: 2}\n")) == [
        "training.micro_batch_size"
    ]
    assert keys_that_bar_resume(old, spec_of("training: {micro_batch_size: 4, seed: 1}\nadapter: {r: 4}\n")) == [
        "adapter.r", "training.seed",
    ]  # fmt: skip


def test_a_newer_format_is_refused_by_name_and_unknown_keys_are_passed_over():
    text = resolved_yaml(spec_of())
    with pytest.raises(SpecError) as raised:
        load_stored(text.replace("format: 1", "format: 9"), "runs/x/spec.yaml")
    assert str(raised.value) == (
        "runs/x/spec.yaml:1 format: format 9 was written by a newer raypeft; this one reads up to format 1. "
        "Upgrade: pip install -U raypeft"
    )
    newer = text.replace("training:\n", "training:\n  later_key: 3\n") + "later_section: {a: 1}\n"
    assert canonical_hash(load_stored(newer)) == canonical_hash(spec_of())


def test_every_section_is_stored():
    assert set(canonical.resolved_values(spec_of())) == {
        "name", "cluster", "model", "data", "adapter", "training", "deepspeed", "resources", "storage", "retry",
        "secrets", "eval", "register", "deploy", "sweep", "tracking",
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=30),
    st.floats(1e-12, 1e3),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["C"]), max_size=8), st.text(max_size=8), max_size=3
    ),
)
def test_any_text_and_number_survives_the_stored_form(path, rate, labels):
    spec = spec_of()
    spec = spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"base_model": path}),
            "training": spec.training.model_copy(update={"learning_rate": rate}),
            "resources": spec.resources.model_copy(
                update={
                    "labels": {key: value for key, value in labels.items() if value.isprintable() and key}
                }
            ),
        }
    )
    assert load_stored(resolved_yaml(spec)) == load_job_text(MINIMAL, "x.yaml").spec.model_copy(
        update=dict(load_stored(resolved_yaml(spec)))
    )
    again = load_stored(resolved_yaml(spec))
    assert (again.model, again.training.learning_rate, again.resources) == (spec.model, rate, spec.resources)
