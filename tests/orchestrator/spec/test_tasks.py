"""The dataset types of all tasks: their columns, their metrics, and what fits together."""

import pytest

from orchestrator.spec.job import DATASET_FIELDS, DatasetSpec, Metric
from orchestrator.spec.load import load_job_text
from orchestrator.spec.rules import produced_metrics
from orchestrator.spec.tasks import TASKS, measured_metrics, task_type

from .jobs import refused


def job(kind, more="", **columns):
    dataset = ", ".join(["path: a.jsonl", f"type: {kind}", *(f"{k}: {v}" for k, v in columns.items())])
    return f"model: {{base_model: b}}\ndata: {{datasets: [{{{dataset}}}]}}\n{more}"


def spec(kind, more=""):
    return load_job_text(job(kind, more), "x.yaml").spec


TASK_OF = {
    "classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "qa": "QUESTION_ANS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "embedding": "FEATURE_EXTRACTION",
}


@pytest.mark.parametrize("kind", TASK_OF)
def test_each_type_has_its_task_and_its_own_metrics(kind):
    made = spec(kind)
    assert task_type(made) == TASK_OF[kind]
    own = TASKS[kind].by_default
    assert measured_metrics(made) == own and set(own) <= set(TASKS[kind].metrics) <= set(Metric.__args__)
    assert produced_metrics(made) == [
        "train_loss", "eval_loss", *own, "base.eval_loss", *(f"base.{name}" for name in own), "production.eval_loss",
        *(f"production.{name}" for name in own),
    ]  # fmt: skip
    chosen = spec(kind, f"eval: {{metrics: [{own[1]}]}}\n")
    assert measured_metrics(chosen) == (own[1],)


@pytest.mark.parametrize("kind", TASK_OF)
def test_each_column_can_be_renamed(kind):
    for name in DATASET_FIELDS[kind]:
        assert getattr(DatasetSpec(path="a", type=kind, **{name: "x"}), name) == "x"
        assert getattr(load_job_text(job(kind, **{name: "x"}), "x.yaml").spec.data.datasets[0], name) == "x"


def test_every_type_has_a_row_in_each_table():
    assert set(TASKS) == set(DATASET_FIELDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (job("classifcation"), "x.yaml:2 data.datasets.0.type: 'classifcation' is not one of chat, "
         "prompt_completion, alpaca, text, classification, token-classification, qa, seq2seq, embedding. Closest: "
         "'classification'."),
        (job("qa", field_label="x"), "x.yaml:2 data.datasets.0.field_label: a dataset of type qa has no such column. "
         "It has: field_question, field_context, field_answers."),
        (job("qa", field_contxt="x"), "x.yaml:2 data.datasets.0.field_contxt: no such key. Closest: "
         "'data.datasets.0.field_context'."),
        (job("classification", "eval: {metrics: [chrf]}\n"), "x.yaml:3 eval.metrics.0: 'chrf' is not measured of "
         "rows of type 'classification'. Of those: accuracy, f1."),
        (job("classification", "deploy: {gate: {all: [recall_at_5 > 0.5]}}\n"), "x.yaml:3 deploy.gate.all.0: "
         "'recall_at_5' is not measured by this job. It measures: train_loss, eval_loss, accuracy, f1, base.eval_loss, "
         "base.accuracy, base.f1, production.eval_loss, production.accuracy, production.f1."),
        (job("classification", "eval: {metrics: [f1]}\ndeploy: {gate: {all: [accuracy > 0.5]}}\n"),
         "x.yaml:4 deploy.gate.all.0: 'accuracy' is not measured by this job. Write eval: {metrics: [f1, accuracy]}."),
        (job("qa", "adapter: {type: cpt}\n"), "x.yaml:3 adapter.type: cpt does not train QUESTION_ANS, which rows of "
         "type 'qa' need. It trains: CAUSAL_LM."),
        ("model: {base_model: b}\ndata:\n  datasets:\n  - {path: a, type: qa}\n  - {path: b, type: chat}\n",
         "x.yaml:5 data.datasets.1.type: rows of type 'chat' train CAUSAL_LM, those of the first dataset QUESTION_ANS. "
         "One job trains one task."),
    ],
)  # fmt: skip
def test_what_does_not_fit(text, message):
    assert refused(text, source="x.yaml").startswith(message)


def test_a_gate_over_the_task_s_metrics():
    made = load_job_text(job("qa", "deploy: {gate: {all: [f1 > base.f1, exact_match >= 0.5]}}\n"), "x.yaml")
    assert made.warnings == () and made.spec.deploy is not None
    ungated = load_job_text(job("qa", "deploy: {}\n"), "x.yaml")
    assert ungated.warnings == ("deploy has no gate: every version of this job is served.",)
    placed = load_job_text(job("embedding", "deploy: {endpoint: e, num_replicas: 2}\n"), "x.yaml").spec.deploy
    assert placed is not None and (placed.endpoint, placed.num_replicas) == ("e", 2)
