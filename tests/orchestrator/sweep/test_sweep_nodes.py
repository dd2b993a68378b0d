"""A sweep over several nodes, one of which dies in the middle: its trials go on elsewhere from their checkpoints."""

from pathlib import Path

import pytest

from orchestrator.plan import make_plan
from orchestrator.plan.layout import lay_out
from orchestrator.runner import TrainRequest
from orchestrator.spec.load import load_job_text
from orchestrator.spec.sharing import base_key
from orchestrator.sweep.runner import SweepRunner
from orchestrator.sweep.trials import FINISHED, read_trials
from orchestrator.train.driver.nodes import RayCluster
from orchestrator.train.driver.placement import places_in_all, places_now
from orchestrator.train.driver.warm import WarmGroup
from orchestrator.train.packing import Packing
from tests.own_ray import STORE, join, own_ray

# minutes: three nodes, and workers that load a base
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.matrix, pytest.mark.timeout(900)]

JOB = """
name: nodes
model: {{base_model: {root}/jobs/assets/tiny-llama}}
data: {{datasets: [{{path: {root}/jobs/assets/python-docs.jsonl, type: chat}}], val_set_size: 16, sequence_len: 96}}
adapter: {{type: lora, r: 4}}
training: {{max_steps: 60, eval_steps: 10, save_steps: 5, micro_batch_size: 2}}
resources: {{labels: {{trains: "yes"}}}}
sweep:
  num_trials: 4
  max_concurrent: 4
  pack: 2
  searcher: grid
  space: {{training.learning_rate: {{choice: [1e-4, 3e-4, 1e-3, 3e-3]}}}}
"""


def test_a_node_dies_and_its_trials_go_on(repository, tmp_path):
    with own_ray(num_cpus=1) as cluster:
        nodes = [
            cluster.add_node(num_cpus=1, object_store_memory=STORE, labels={"trains": "yes"})
            for _ in range(2)
        ]
        join(cluster)
        run_and_kill(JOB.format(root=repository), tmp_path, nodes[1])


def run_and_kill(text, folder: Path, node):
    spec = load_job_text(text, "jobs/nodes.yaml").spec
    request = TrainRequest(spec, make_plan(spec, None, None), str(folder / "nodes-1"), "nodes-1", "data")
    groups = []

    def open_group(request, layout):
        groups.append(WarmGroup(request, Packing(places=layout.pack, joined=layout.joined)))
        return groups[-1]

    def layout(request, trials):
        room = places_in_all(request.plan, RayCluster().rooms())
        assert room == 2, "the head has not the label"
        return lay_out(request.spec.sweep, trials, room)

    runner = SweepRunner(
        open_group,
        lambda request: base_key(request.spec),
        layout,
        lambda request, starting: places_now(request.plan, RayCluster().rooms()) > starting,
    )
    runner.start(request)
    steps, failures = {}, []
    for event in runner.events():
        if event["event"] == "failure":
            failures.append(event)
        if event["event"] == "progress":
            steps.setdefault(event["trial"], []).append(event["step"])
            if len(steps) == 4 and node is not None and min(each[-1] for each in steps.values()) >= 8:
                node.kill_raylet()
                node = None
    outcome = runner.outcome()
    trials = read_trials(request.run_dir)
    assert node is None and len(groups) >= 2
    assert [trial.state for trial in trials] == [FINISHED] * 4 and len(failures) == 1
    assert failures[0]["will_retry"] and failures[0]["kind"] in ("node lost", "worker lost")
    repeated = {number: len(each) - len(set(each)) for number, each in steps.items()}
    assert all(set(each) == set(range(1, 61)) for each in steps.values())
    assert sum(count > 0 for count in repeated.values()) <= 2 and max(repeated.values()) <= 10, repeated
    assert outcome.metrics["eval_loss"] == min(trial.value("eval_loss") for trial in trials)
