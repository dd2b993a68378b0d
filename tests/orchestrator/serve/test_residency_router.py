"""Which replica gets a request, over replicas that only say what they hold."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import RunningReplica

from orchestrator.serve.proxy.residency_router import (
    HAS_ROOM,
    MODELS,
    MOST_REMEMBERED,
    SPARE_REQUESTS,
    ResidencyRouter,
    parts_of,
)
from orchestrator.serve.replica import ROUTER

DEPLOYMENT = DeploymentID("endpoint", "raypeft-tiny")


def replica(name: str, *models: str, has_room: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        replica_id=ReplicaID(name, DEPLOYMENT), routing_stats={MODELS: list(models), HAS_ROOM: has_room}
    )


class Scene:
    def __init__(self, *replicas: SimpleNamespace) -> None:
        self.router = ResidencyRouter(
            deployment_id=DEPLOYMENT,
            handle_source=DeploymentHandleSource.PROXY,
            use_replica_queue_len_cache=True,
            self_node_id="node",  # what a router is given that it has no use for
        )
        self.replicas = list(replicas)

    def load(self, **requests: int) -> None:
        for name, number in requests.items():
            self.router.replica_queue_len_cache.update(ReplicaID(name, DEPLOYMENT), number)

    def ranked(self, model: str) -> list[str]:
        pending = SimpleNamespace(metadata=SimpleNamespace(multiplexed_model_id=model))
        chosen = asyncio.run(self.router.choose_replicas(self.replicas, pending))
        assert all(len(rank) == 1 for rank in chosen)
        return [rank[0].replica_id.unique_id for rank in chosen]


def test_a_holder_gets_it_though_it_is_busier():
    scene = Scene(replica("one", "a"), replica("two", "b"))
    scene.load(one=SPARE_REQUESTS, two=0)
    assert scene.ranked("a") == ["one", "two"]
    assert scene.ranked("b") == ["two", "one"]


def test_an_overloaded_holder_is_helped_by_the_least_loaded():
    scene = Scene(replica("one", "a"), replica("two"), replica("three"))
    scene.load(one=SPARE_REQUESTS + 2, two=3, three=1)
    assert scene.ranked("a")[0] == "three"
    scene.load(one=2)
    assert scene.ranked("a")[0] == "three"  # it is loading it now, and has less to do
    scene.load(three=3)
    assert scene.ranked("a")[0] == "one"


@pytest.mark.parametrize("first", ["one", "two"])
def test_a_copy_that_nobody_asks_for_makes_room_for_what_none_holds(first):
    """One replica answers for three adapters in two places, the other for one, and holds a copy of one of the three."""
    scene = Scene(replica("one", "b", "c"), replica("two", "b", "c"))
    scene.load(**{first: 0, "two" if first == "one" else "one": 1})
    for model in ("b", "c@1", "c", "c@production"):
        assert scene.ranked(model)[0] == first
    scene.load(one=0, two=0)
    assert {scene.ranked(model)[0] for model in ("a", "a", "a@1")} == {"two" if first == "one" else "one"}


def test_of_two_holders_the_less_loaded_gets_it():
    scene = Scene(replica("one", "a"), replica("two", "a"), replica("three"))
    scene.load(one=3, two=2, three=0)
    assert scene.ranked("a") == ["two", "one", "three"]


def test_what_nobody_holds_goes_to_the_least_loaded_and_its_next_requests_too():
    scene = Scene(replica("one", "a"), replica("two", "b"))
    scene.load(one=2, two=1)
    assert scene.ranked("new")[0] == "two"
    scene.load(one=0, two=SPARE_REQUESTS)  # its report has not come yet
    assert scene.ranked("new")[0] == "two"
    scene.router._given["new"] = (ReplicaID("two", DEPLOYMENT), -1e9)  # and never came
    assert scene.ranked("new")[0] == "one"


def test_among_equals_room_decides_and_then_the_name():
    scene = Scene(replica("one"), replica("two", has_room=True))
    assert {scene.ranked(f"model-{number}")[0] for number in range(20)} == {"two"}
    scene = Scene(replica("one"), replica("two"))
    first = Counter(scene.ranked(f"model-{number}")[0] for number in range(400))
    assert set(first) == {"one", "two"} and min(first.values()) > 120
    again = Scene(replica("two"), replica("one"))
    assert all(scene.ranked(f"model-{n}")[0] == again.ranked(f"model-{n}")[0] for n in range(40))


def test_an_ensemble_goes_where_most_of_it_is():
    assert parts_of("a:0.7+b@2:0.3") == {"a", "b@2"} and parts_of("") == frozenset()
    scene = Scene(replica("one", "a"), replica("two", "a", "b@2", "c"), replica("three", "b@2"))
    assert scene.ranked("a:0.7+b@2:0.3")[0] == "two"


def test_without_a_model_any_of_the_least_loaded_gets_it():
    scene = Scene(replica("one", "a"), replica("two", "b"), replica("three"))
    scene.load(three=1)
    assert {scene.ranked("")[0] for _ in range(60)} == {"one", "two"}
    assert not scene.router._given


def test_a_replica_that_says_nothing_is_one_that_holds_nothing():
    quiet = SimpleNamespace(replica_id=ReplicaID("quiet", DEPLOYMENT), routing_stats={})
    assert Scene(quiet, replica("two", "a")).ranked("a") == ["two", "quiet"]
    assert Scene().ranked("a") == []


def test_names_that_are_made_up_fill_no_memory():
    scene = Scene(replica("one"))
    for number in range(MOST_REMEMBERED + 50):
        name = f"made-up-{number}"
        scene.router._pending_requests_by_model_id[name].append(object())  # as Serve does with each request
        scene.ranked(name)
    assert len(scene.router._given) == MOST_REMEMBERED
    assert not scene.router._pending_requests_by_model_id


WITHOUT_US = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("orchestrator", "peft_dist"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refused())
from ray import cloudpickle
print(cloudpickle.loads(sys.stdin.buffer.read()).__mro__[1].__name__)
"""


def test_a_proxy_without_this_project_can_run_it():
    """Serve sends the router's file by value; it may import nothing that such a process lacks."""
    sent = RequestRouterConfig(request_router_class=ROUTER).get_serialized_request_router_cls()
    said = subprocess.run([sys.executable, "-c", WITHOUT_US], input=sent, capture_output=True, check=True)
    assert said.stdout.split()[-1] == b"RequestRouter"
    by_name = subprocess.run(
        [sys.executable, "-c", WITHOUT_US], input=pickle.dumps(ResidencyRouter), capture_output=True
    )
    assert b"ModuleNotFoundError: orchestrator" in by_name.stderr  # the control


@pytest.mark.parametrize("name", ["routing_stats", "replica_id"])
def test_what_it_reads_of_serves_replicas_is_there(name):
    assert isinstance(getattr(RunningReplica, name), property)
