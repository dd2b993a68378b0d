"""Versions, code and replicas that change under an endpoint on a real Ray Serve, with nobody's request lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import requests
from ray import serve

from orchestrator.keys import KeyBook
from orchestrator.registry import Registry
from orchestrator.serve import code_version, serve_cluster
from orchestrator.serve.endpoints import RayEndpoints
from orchestrator.serve.rollout import Rollout
from orchestrator.serve.rollouts.promotion import promote
from orchestrator.serve.rollouts.reports import Reports
from orchestrator.spec.job import DeploySpec
from tests.orchestrator.serve import tiny
from tests.orchestrator.serve.test_endpoints import complete, replica_pids, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


class Site:
    """An endpoint `tiny` over a registry of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.base = tiny.save_base(folder / "tiny")
        self.registry, self.scratch = Registry(folder / "registry"), folder / "scratch"
        self.endpoints = RayEndpoints(self.registry, port=port, local=True)
        self.reports = Reports(self.registry.url, "tiny")

    def deploy(self, seed: int, **spec):
        version = tiny.register(self.registry, "docs", self.base, self.scratch, seed=seed)
        return self.endpoints.deploy(version, str(self.base), "main", DeploySpec(**spec))

    def live(self):
        return [report for report in self.reports.read() if report.is_live(time.time())]


@pytest.fixture(scope="module")
def site(local_ray, tmp_path_factory) -> Iterator[Site]:
    local_ray.attach()
    ray.init(address=local_ray.gcs_address, log_to_driver=False, logging_level="ERROR", namespace="raypeft")
    door = serve_cluster.open_serve("127.0.0.1", 18731)
    made = Site(tmp_path_factory.mktemp("rolling"), door.port)
    yield made
    for row in made.endpoints.status():
        made.endpoints.undeploy(row.name)
    serve.shutdown()
    ray.shutdown()


@contextlib.contextmanager
def clients(url: str, num: int = 2) -> Iterator[list[requests.Response]]:
    """Users who ask for `docs` again and again, each under a name of its own."""
    answers: list[requests.Response] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        at = 0
        while not stop.is_set():
            at += 1
            answers.append(complete(url, "docs", max_tokens=4, user=f"user-{number}-{at}"))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(num)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_killed_replica_holds_again_what_it_held_with_no_client_doing_anything(site):
    live = site.deploy(1)
    assert (live.state, live.rollout) == ("live", None)
    wait_for(lambda: len(site.live()) == 1)
    (before,) = site.live()
    assert before.states == {"docs@1": "loaded"}
    os.kill(before.process.pid, signal.SIGKILL)

    def is_back() -> bool:
        others = [report for report in site.live() if report.process != before.process]
        return [report.states for report in others] == [{"docs@1": "loaded"}]

    wait_for(is_back, timeout_s=90)


def test_a_canary_answers_its_share_is_promoted_and_taken_back_with_no_request_lost(site):
    if not site.registry.names():
        site.deploy(1)
    canary = {
        "canary_percent": 30,
        "bake": "5m",
        "shadow_percent": 50,
        "rollback": {"any": ["error_rate > 0.5"]},
    }
    made = site.deploy(2, rollout=canary)
    assert made.state == "canary" and made.rollout.startswith(
        "30 % of docs@production by 'user', 50 % in shadow"
    )
    assert site.registry.alias("docs", "production") == 1
    wait_for(lambda: requests.get(f"{made.url}/models/docs@2", timeout=10).json().get("state") == "canary")
    with clients(made.url) as answers:
        wait_for(lambda: len(answers) > 60)
        promote(site.registry, "docs@2")
        wait_for(lambda: answers[-1].headers.get("x-raypeft-adapter") == "docs@2")
        site.deploy(3, rollout={"canary_percent": 100, "bake": "5m", "rollback": {"any": ["requests >= 5"]}})
        wait_for(lambda: site.registry.holders("docs@3") == [])
        wait_for(lambda: answers[-1].headers.get("x-raypeft-adapter") == "docs@2")
    assert {answer.status_code for answer in answers} == {200}
    rollout = Rollout("", "docs", "production", 2, canary_percent=30, state="baking")
    first = answers[:50]
    for answer in first:
        user = _user(answer)
        assert answer.headers["x-raypeft-adapter"] == ("docs@2" if rollout.answers(user) else "docs@1")
    assert {answer.headers["x-raypeft-adapter"] for answer in first} == {"docs@1", "docs@2"}
    assert [line["event"] for line in site.reports.audit() if line["event"] != "deployed"] == [
        "rollout", "began", "promoting", "promoted", "rollout", "began", "rolling back", "rolled back",
    ]  # fmt: skip
    last = site.reports.audit()[-1]
    assert last["by"] != "user" and last["stays"] == 2 and "requests >= 5: holds" in last["reasons"][0]
    assert complete(made.url, "docs@3").status_code == 404


def _user(answer: requests.Response) -> str:
    return json.loads(answer.request.body)["user"]


def test_other_code_takes_over_replica_by_replica_with_no_request_lost(site, monkeypatch):
    if not site.registry.names():
        site.deploy(1)
    pids = replica_pids("tiny")
    monkeypatch.setattr(code_version, "_code", lambda: "changed")
    version = site.registry.get("docs")
    url = f"{serve_cluster.find_door().url}/tiny/v1"
    with clients(url) as answers:
        wait_for(lambda: len(answers) > 5)
        site.endpoints.deploy(version, str(site.base), "main", DeploySpec())
        wait_for(lambda: replica_pids("tiny") and not set(replica_pids("tiny")) & set(pids), timeout_s=90)
        wait_for(lambda: len(site.live()) == 1, timeout_s=90)
    assert {answer.status_code for answer in answers} == {200}
    site.endpoints.deploy(version, str(site.base), "main", DeploySpec())  # the same code: nothing is replaced
    after = replica_pids("tiny")
    time.sleep(2)
    assert replica_pids("tiny") == after


def test_a_new_replica_killed_while_code_is_rolled_is_replaced_and_the_next_deployment_keeps_both(
    site, monkeypatch
):
    site.deploy(7, num_replicas=2)
    old = wait_for(lambda: len(replica_pids("tiny")) == 2 and replica_pids("tiny"), timeout_s=90)
    monkeypatch.setattr(code_version, "_code", lambda: "changed again")
    site.deploy(8)
    new = wait_for(lambda: set(replica_pids("tiny")) - set(old), timeout_s=90)
    os.kill(new.pop(), signal.SIGKILL)

    def is_lost_or_replaced() -> bool:
        app = serve_cluster.applications()["tiny"]
        assert not app.has_failed  # though Serve may call it a failed deployment
        return app.is_recovering or (app.num_running == 2 and not set(replica_pids("tiny")) & set(old))

    wait_for(is_lost_or_replaced, timeout_s=90)
    assert site.deploy(9).state == "live"
    wait_for(
        lambda: len(set(replica_pids("tiny")) - set(old)) == len(replica_pids("tiny")) == 2, timeout_s=90
    )
    assert serve_cluster.applications()["tiny"].num_replicas == 2


def test_it_scales_to_zero_and_the_first_request_brings_it_back(site):
    if not site.registry.names():
        site.deploy(1)
    scale = {"min_replicas": 0, "max_replicas": 2, "idle_timeout": 2}
    made = site.endpoints.deploy(site.registry.get("docs"), str(site.base), "main", DeploySpec(scale=scale))
    wait_for(lambda: not replica_pids("tiny"), timeout_s=90)
    (row,) = site.endpoints.status()
    assert row.state == "idle" and "first request" in row.message
    assert complete(made.url, "docs").status_code == 200
    assert replica_pids("tiny")

    secret = KeyBook(site.registry.url).create("acme").secret
    wait_for(lambda: not replica_pids("tiny"), timeout_s=90)
    root = made.url.removesuffix("/v1")
    for _ in range(3):
        refused = [complete(made.url, "docs")]
        refused += [requests.get(f"{root}/{path}", timeout=60) for path in ("metrics", "v1/models", "none")]
        refused += [requests.get(f"{root}/v1/models", headers=_bearer("rp-guessed"), timeout=60)]
        assert [each.status_code for each in refused] == [401] * 5
        assert all(each.json()["error"]["type"] == "authentication_error" for each in refused)
        assert requests.get(f"{root}/healthz", timeout=60).json() == {"status": "idle"}
        time.sleep(1)
    assert serve_cluster.applications()["tiny"].num_replicas == 0  # nor does one start
    models = requests.get(f"{root}/v1/models", headers=_bearer(secret), timeout=60)
    assert models.status_code == 200 and replica_pids("tiny")
    assert requests.get(f"{root}/healthz", timeout=60).json()["status"] == "ok"


def _bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}
