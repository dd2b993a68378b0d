from dataclasses import replace

import pytest

from orchestrator.spec import rules
from orchestrator.spec.load import load_job_text
from orchestrator.spec.rules import accumulation, produced_metrics
from orchestrator.spec.tasks import task_type
from peft_dist.catalog import METHODS

from .jobs import MINIMAL, refused, refused_after_minimal, spec_of

BATCH = "training: {{micro_batch_size: 4, global_batch_size: {size}{more}}}\nresources: {{num_workers: 2}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BATCH.format(size=10, more=""), "training.global_batch_size: 10 does not divide into 2 workers x 4 rows = 8. "
                                         "The nearest that do: 8 or 16."),
        (BATCH.format(size=3, more=""), "training.global_batch_size: 3 does not divide into 2 workers x 4 rows = 8. "
            "The nearest that do: 8."),
        (BATCH.format(size=16, more=", gradient_accumulation_steps: 4"),
         "training.global_batch_size: 16 is not 2 workers x 4 rows x 4 accumulation steps = 32. "
         "Remove training.gradient_accumulation_steps: 2 follows from the others."),
        ("deploy: {gate: {}}\n", "deploy.gate: has neither all nor any. "
                                 'Write gate: {all: ["eval_loss < base.eval_loss"]}.'),
        ("deploy: {gate: {all: [eval_loss < 1], any: [eval_loss < 1]}}\n",
         'deploy.gate: has both all and any. Write gate: {all: ["eval_loss < base.eval_loss"]}.'),
        ("deploy: {gate: {all: []}}\n",
         "deploy.gate.all: is an empty list. Write a condition, or remove the gate: it then always holds."),
        ("deploy: {gate: {any: [eval_los < 1]}}\n",
         "deploy.gate.any.0: 'eval_los' is not measured by this job. Closest: 'eval_loss'. It measures: train_loss, "
         "eval_loss, base.eval_loss, production.eval_loss."),
        ("deploy: {gate: {all: [exact_match > 0.5]}}\n",
         "deploy.gate.all.0: 'exact_match' is not measured by this job. Write eval: {metrics: [exact_match]}."),
        ("deploy: {gate: {all: [base.contains > 0.5]}}\n",
         "deploy.gate.all.0: 'base.contains' is not measured by this job. Write eval: {metrics: [contains]}."),
        ("deploy: {gate: {all: [1 < 2]}}\n",
         "deploy.gate.all.0: '1 < 2' names no metric. "
         "Write a comparison such as eval_loss < base.eval_loss, or exact_match >= 0.8."),
        ("secrets: {TOKEN: file:here}\n", "secrets.TOKEN: the file's path is not absolute. Write file:/path."),
        ("secrets: {A-B: env}\n", "secrets: a name is not that of an environment variable. Write {HF_TOKEN: env}."),
    ],
)  # fmt: skip
def test_rules_across_sections(text, message):
    found = refused_after_minimal(text)
    assert found.partition(" ")[2] == message


def test_a_gate_needs_an_evaluation():
    text = "model: {base_model: b}\ndata: {datasets: [{path: a}], val_set_size: 0}\n"
    gate = "deploy: {gate: {all: [eval_loss < base.eval_loss]}}\n"
    with pytest.raises(
        Exception, match=r"Nothing is evaluated: set data.val_set_size above 0, or give eval.datasets."
    ):
        load_job_text(text + gate, "x.yaml")
    assert load_job_text(text + gate + "eval: {datasets: [{path: e}]}\n", "x.yaml").spec.deploy


def test_generated_metrics_need_answers():
    text = "model: {base_model: b}\ndata: {datasets: [{path: a, type: text}]}\neval: {metrics: [contains]}\n"
    with pytest.raises(Exception, match=r"x.yaml:2 data.datasets.0.type: rows of type 'text' have no answer"):
        load_job_text(text, "x.yaml")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("notes.txt", ".txt"), ("s3://bucket/a.TXT.gz?v=1", ".txt"), ("/data/*.xlsx", ".xlsx"), ("a.md", ".md"),
        ("a.jsonl", None), ("a.csv.zst", None), ("owner/corpus-v1.5", None), ("/data/v2.1", None), ("a.txt/", None),
    ],
)  # fmt: skip
def test_files_that_hold_no_rows_are_refused_by_their_names(path, found):
    text = f"model: {{base_model: b}}\ndata: {{datasets: [{{path: a}}]}}\neval: {{datasets: [{{path: '{path}'}}]}}\n"
    if found is None:
        assert load_job_text(text, "x.yaml").spec
        return
    message = refused(text, source="x.yaml")
    assert message.startswith(
        f"x.yaml:3 eval.datasets.0.path: '{path}': rows are not read from {found} files."
    )
    assert ".jsonl" in message and ("with type: text" in message) == (found in (".txt", ".md"))


SECRET = "hf_aVeryPlainToken"


def test_a_literal_secret_is_refused_and_never_repeated():
    for text in (f"secrets: {{HF_TOKEN: {SECRET}}}\n", f"secrets: {SECRET}\n", f"secrets: [{SECRET}]\n",
                 f"secrets: {{HF_TOKEN: {{a: {SECRET}}}}}\n", f"secrets: {{{SECRET}: env:x}}\n"):  # fmt: skip
        message = refused_after_minimal(text)
        assert SECRET not in message.replace(f"secrets.{SECRET}", "").replace(f"{SECRET}: ", "").replace(
            f"variable {SECRET} ", ""
        )
    assert refused_after_minimal(f"secrets: {{HF_TOKEN: {SECRET}}}\n") == (
        "jobs/x.yaml:3 secrets.HF_TOKEN: is a literal; a secret never stands in a job. Write HF_TOKEN: env (the "
        "variable HF_TOKEN of whoever submits), or HF_TOKEN: file:/path."
    )


def test_secrets_that_are_named():
    assert spec_of("secrets: {HF_TOKEN: env, OTHER: file:/run/other}\n").secrets["OTHER"] == "file:/run/other"


def test_accumulation():
    assert accumulation(spec_of(BATCH.format(size=32, more=""))) == (4, 32)
    assert accumulation(spec_of("training: {micro_batch_size: 3, gradient_accumulation_steps: 5}\n")) == (
        5,
        15,
    )
    assert accumulation(spec_of()) == (1, 1)


def test_produced_metrics():
    spec = spec_of("eval: {metrics: [contains]}\n")
    assert produced_metrics(spec) == [
        "train_loss", "eval_loss", "contains", "base.eval_loss", "base.contains", "production.eval_loss",
        "production.contains",
    ]  # fmt: skip


def test_the_method_must_train_the_task(monkeypatch):
    monkeypatch.setitem(rules.METHODS, "LORA", replace(METHODS["LORA"], task_types=("SEQ_CLS",)))
    assert refused_after_minimal("adapter: {type: lora}\n") == (
        "jobs/x.yaml:3 adapter.type: lora does not train CAUSAL_LM, which rows of type 'chat' need. It trains: SEQ_CLS."
    )
    assert task_type(spec_of("adapter: ia3\n")) == "CAUSAL_LM"


def test_warnings():
    job = load_job_text(MINIMAL + "training: {max_steps: 3, num_epochs: 2}\ndeploy: {}\n", "x.yaml")
    assert job.warnings == (
        "training.max_steps ends the run, whatever training.num_epochs says.",
        "deploy has no gate: every version of this job is served.",
    )
