"""What a deployment makes of what an endpoint says while it comes up."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from orchestrator.errors import ServeError
from orchestrator.registry import Registry
from orchestrator.serve import endpoints, serve_cluster
from orchestrator.serve.endpoint_calls import probe
from orchestrator.serve.endpoints import RayEndpoints
from orchestrator.spec.job import DeploySpec
from tests.orchestrator.serve.scripted import listening

APP = serve_cluster.Application(
    "tiny", "RUNNING", "", "/", 1, num_running=1, num_unplaced=0, actor_options={}
)


def said(status, body, kind="application/json"):
    answer = requests.Response()
    answer.status_code, answer._content, answer.headers["content-type"] = status, body.encode(), kind
    return answer


FINE = said(200, "{}")
BUSY = said(503, '{"error": {"message": "a new one is on its way", "code": "engine_stopped"}}')
DAMAGED = said(503, '{"error": {"message": "its sha256 differs", "code": null}}')
UNKNOWN = said(404, '{"error": {"message": "does not exist"}}')
PROXY = said(404, "Path '/tiny' not found.", "text/plain")


@pytest.fixture
def awaited(monkeypatch, tmp_path):
    """Waits for `docs@1`, where each look, a second apart by the clock, gets the next of some answers."""

    def wait(*answers, app=APP):
        left, clock = itertools.chain(answers, itertools.repeat(answers[-1])), itertools.count(1.0)

        def post(*arguments, **options):
            answer = next(left)
            if isinstance(answer, Exception):
                raise answer
            return answer

        times = SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
        monkeypatch.setattr(endpoints, "time", times)
        monkeypatch.setattr(requests, "post", post)
        monkeypatch.setattr(serve_cluster, "applications", lambda: {"tiny": app})
        monkeypatch.setattr(serve_cluster, "has_free", lambda asked: True)
        found = RayEndpoints(Registry(tmp_path / "registry"), local=True)
        door: Any = SimpleNamespace(url="http://127.0.0.1:1")
        return found._await("tiny", "docs@1", "CAUSAL_LM", door, lambda event: None)

    return wait


@pytest.mark.parametrize(
    "before",
    [PROXY, BUSY, requests.ConnectionError("refused"), requests.exceptions.ChunkedEncodingError("cut")],
)
def test_what_may_pass_is_waited_for(awaited, before):
    assert awaited(*[before] * 40, FINE)


def test_what_does_not_pass_is_an_error_in_the_end(awaited):
    with pytest.raises(ServeError, match=r"^docs@1 does not answer for 120 s: a new one is on its way"):
        awaited(BUSY)
    with pytest.raises(ServeError, match=r"^docs@1 does not answer for 120 s: refused"):
        awaited(requests.ConnectionError("refused"))


def test_a_replicas_own_no_counts_sooner_and_a_refusal_at_once(awaited):
    assert awaited(UNKNOWN, UNKNOWN, PROXY, UNKNOWN, FINE)
    with pytest.raises(ServeError, match=r"^docs@1 is not served: does not exist"):
        awaited(*[UNKNOWN] * 40, FINE)
    assert awaited(DAMAGED, DAMAGED, FINE)
    with pytest.raises(ServeError, match=r"^docs@1 is not served: its sha256 differs"):
        awaited(*[DAMAGED] * 40, FINE)
    with pytest.raises(ServeError, match=r"^docs@1 is not served: NaN"):
        awaited(said(400, '{"error": {"message": "NaN"}}'), FINE)


LOST = replace(APP, status="DEPLOY_FAILED", trigger="HEALTH_CHECK_FAILED")
GIVEN_UP = replace(
    APP, status="DEPLOY_FAILED", trigger="REPLICA_STARTUP_FAILED", message="Error: no such base"
)


def test_a_replica_that_is_lost_while_code_is_rolled_fails_no_deployment(awaited):
    assert (LOST.is_recovering, LOST.has_failed, GIVEN_UP.has_failed) == (True, False, True)
    assert awaited(BUSY, FINE, app=LOST)
    with pytest.raises(ServeError, match=r"endpoint 'tiny' does not come up: Error: no such base"):
        awaited(FINE, app=GIVEN_UP)


def test_what_is_started_again_has_as_many_replicas_as_before():
    dead = replace(GIVEN_UP, num_running=0, num_replicas=3)
    assert endpoints._is_dead(dead) and not endpoints._is_dead(GIVEN_UP) and not endpoints._is_dead(LOST)
    one = serve_cluster.Placement(1, 0, 0)
    assert endpoints._as_many(dead, one, DeploySpec()).num_replicas == 3
    assert endpoints._as_many(dead, one, DeploySpec(num_replicas=1)).num_replicas == 1
    scaled = replace(dead, bounds=(0, 4), idle_s=9.0)
    assert endpoints._as_many(scaled, one, DeploySpec()).bounds == (0, 4)


def test_an_adapter_of_several_tasks_answers_for_one():
    with listening() as served:
        served.catalogue.names = ("tasks@1", "docs@1")
        for model in ("tasks@1", "docs@1"):
            status, _, is_no = probe(served.url, model, "CAUSAL_LM", {})
            assert (status, is_no) == (200, False), model
        status, message, is_no = probe(served.url, "other@1", "CAUSAL_LM", {})
        assert (status, is_no) == (404, True) and "other@1" in message
