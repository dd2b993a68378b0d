"""A stopped trial's place on real workers, where Ray's dashboard is off: free at once, and nothing is left of it."""

import time

import pytest
import ray

from orchestrator.plan import make_plan
from orchestrator.plan.layout import Layout
from orchestrator.runner import TrainRequest
from orchestrator.spec.load import load_job_text
from orchestrator.spec.sharing import base_key
from orchestrator.sweep.runner import SweepRunner
from orchestrator.sweep.trials import STOPPED, read_trials
from orchestrator.train.driver.warm import WarmGroup
from orchestrator.train.packing import Packing
from tests.own_ray import join, own_ray
from tests.patience import patience

# a Ray of its own, and workers that load a base
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.matrix, pytest.mark.timeout(600)]

JOB = """
name: places
model: {{base_model: {root}/jobs/assets/tiny-llama}}
data: {{datasets: [{{path: {root}/jobs/assets/python-docs.jsonl, type: chat}}], val_set_size: 8, sequence_len: 64}}
adapter: {{type: lora, r: 4}}
training: {{max_steps: 12, eval_steps: 2, micro_batch_size: 2}}
sweep:
  num_trials: 8
  max_concurrent: 2
  scheduler: {{type: asha, reduction_factor: 2}}
  space: {{training.learning_rate: {{loguniform: [1e-6, 1e-2]}}}}
"""


def test_a_stopped_trial_is_gone_and_the_next_steps(repository, tmp_path):
    with own_ray(num_cpus=2) as cluster:
        join(cluster)
        stopped_and_stepped(JOB.format(root=repository), tmp_path)


def stopped_and_stepped(text, folder):
    spec = load_job_text(text, "jobs/places.yaml").spec
    request = TrainRequest(spec, make_plan(spec, None, None), str(folder / "places-1"), "places-1", "data")
    groups_before = set(ray.util.placement_group_table())
    runner = SweepRunner(
        lambda request, layout: WarmGroup(request, Packing(places=layout.pack, joined=layout.joined)),
        lambda request: base_key(request.spec),
        lambda request, trials: Layout(1, 2, 2),
        lambda request, starting: True,
    )
    runner.start(request)
    stops, firsts, free = [], {}, []
    for event in runner.events():
        if event["event"] == "trial" and event["state"] == STOPPED:
            stops.append(event["t"])
            free.append(ray.available_resources().get("CPU", 0.0))
        if event["event"] == "progress":
            firsts.setdefault(event["trial"], event["t"])
    runner.outcome()
    trials = read_trials(request.run_dir)
    assert len(trials) == 8 and sum(trial.state == STOPPED for trial in trials) == len(stops) >= 3
    assert set(free) == {1.0}, free  # the group's worker holds the other; no trial holds any
    later = sorted(firsts.values())[2:]
    waits = [next((first - stop for first in later if first > stop), None) for stop in stops]
    measured = sorted(wait for wait in waits if wait is not None)
    print("from a stop to the next trial's first step:", [round(wait, 2) for wait in measured])
    assert measured[len(measured) // 2] < patience(1.0), measured
    end = time.monotonic() + patience(20.0)
    while ray.available_resources().get("CPU", 0.0) < 2.0 and time.monotonic() < end:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2.0
    left = {
        name: each["state"]
        for name, each in ray.util.placement_group_table().items()
        if name not in groups_before
    }
    assert set(left.values()) <= {"REMOVED"}, left
