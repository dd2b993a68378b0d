"""The chain from one YAML, on a real Ray with a real endpoint under load: train, gate, canary, promote; what the gate
refuses; what passes it and is taken back."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import requests

from orchestrator import api
from tests.patience import patience

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.ray,  # the workers, the endpoint and its replica are the real ones
    pytest.mark.matrix,  # four trainings and two bakes: minutes
    pytest.mark.timeout(1500),
]

JOB = """
name: chain
model: {{base_model: {root}/jobs/assets/tiny-llama}}
data: {{datasets: [{{path: {here}/answers.jsonl, type: chat}}], val_set_size: 0, sequence_len: 128}}
eval: {{datasets: [{{path: {here}/held.jsonl, type: chat}}]}}
adapter: {{type: lora, r: 8}}
training: {{max_steps: 60, micro_batch_size: 8, learning_rate: 3e-3, seed: 1}}
storage: {{path: {here}/runs}}
register: {{name: chained}}
deploy:
  gate: {{all: ["eval_loss < base.eval_loss", "eval_loss <= production.eval_loss + 0.02"]}}
  rollout:
    canary_percent: 30
    shadow_percent: 100
    bake: 12s
    rollback: {{all: ["shadow.requests >= 5", "shadow.agreement < 0.6"]}}
"""


def write_rows(folder: Path) -> list[str]:
    """Rows to train on, the same with their answers shuffled, and held-out ones; returns questions."""
    lines = (ROOT / "jobs/assets/python-docs.jsonl").read_text().splitlines()[:700]
    rows = [json.loads(line)["messages"] for line in lines]
    held, kept = rows[:60], rows[60:]
    answers = [row[1] for row in kept]
    random.Random(0).shuffle(answers)
    shuffled = [[row[0], answer] for row, answer in zip(kept, answers, strict=True)]
    for name, each in (("held", held), ("answers", kept), ("shuffled", shuffled)):
        text = "".join(json.dumps({"messages": row}) + "\n" for row in each)
        (folder / f"{name}.jsonl").write_text(text)
    return [row[0]["content"] for row in held]


@contextmanager
def users(url: str, questions: list[str]) -> Iterator[list[requests.Response]]:
    """Each asks one question, and the next one comes."""
    answers: list[requests.Response] = []
    stop = threading.Event()

    def ask() -> None:
        for number in range(10**6):
            if stop.is_set():
                return
            talk = [{"role": "user", "content": questions[number % len(questions)]}]
            body = {"model": "chained", "messages": talk, "max_tokens": 12, "temperature": 0}
            body["user"] = f"user-{number}"
            answers.append(requests.post(f"{url}/chat/completions", json=body, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()


def settled(events: int, timeout_s: float = 90) -> list[dict]:
    """The steps of all rollouts, once there are so many and none is under way."""
    end = time.monotonic() + patience(timeout_s)
    while True:
        steps = api.audit("chained")
        if len(steps) >= events and not api.rollouts("chained"):
            return steps
        assert time.monotonic() < end, steps
        time.sleep(0.5)


def test_train_gate_canary_promote_and_what_is_refused_or_taken_back(tmp_path, local_ray):
    questions = write_rows(tmp_path)
    job = tmp_path / "chain.yaml"
    job.write_text(JOB.format(root=ROOT, here=tmp_path))
    worse = [f"data.datasets.0.path={tmp_path / 'shuffled.jsonl'}", "adapter.init_from=chained@1"]
    worse += ["training.learning_rate=1e-2"]
    try:
        first = api.run(job)
        assert first.state == "done" and first.adapter == "chained@1", first
        assert first.endpoint.state == "live"  # there is nothing to compare it with
        with users(first.endpoint.url, questions) as answers:
            better = ["adapter.init_from=chained@1", "training.learning_rate=2e-4", "training.max_steps=20"]
            second = api.run(job, better, new=True)
            assert (second.adapter, second.endpoint.state) == ("chained@2", "canary"), second
            assert api.show("chained@production").version == 1  # not before it has baked
            steps = settled(5)
            assert [step["event"] for step in steps] == [
                "deployed", "rollout", "began", "promoting", "promoted",
            ], steps  # fmt: skip
            assert api.show("chained@production").version == 2

            third = api.run(job, worse, new=True)
            assert third.state == "registered, refused by the gate" and third.adapter == "chained@3"
            assert any("production.eval_loss + 0.02: fails" in reason for reason in third.reasons)

            fourth = api.run(job, [*worse, "deploy.gate={all: [eval_loss < 100]}"], new=True)
            assert (fourth.adapter, fourth.endpoint.state) == ("chained@4", "canary"), fourth
            steps = settled(9)
            last = ["rollout", "began", "rolling back", "rolled back"]
            assert [step["event"] for step in steps[5:]] == last, steps
            assert any("shadow.agreement < 0.6: holds" in reason for reason in steps[-1]["reasons"])
            assert api.show("chained@production").version == 2
            assert api.show("chained@4").endpoints == ()
        assert {answer.status_code for answer in answers} == {200}
        served = {answer.headers["x-raypeft-adapter"] for answer in answers}
        assert {"chained@1", "chained@2"} <= served <= {"chained@1", "chained@2", "chained@4"}
        assert api.rollback("chained")[1] == "chained@1"  # and by hand, to the version before
        rows = {row.model: row for row in next(api.top())}
        assert rows["chained@1"].requests > 0 and rows["chained@1"].aliases == ("production",)
    finally:
        for row in api.endpoints():
            if any(adapter.startswith("chained@") for adapter in row.adapters):
                api.undeploy(row.name)
        if ray.is_initialized():
            ray.shutdown()
