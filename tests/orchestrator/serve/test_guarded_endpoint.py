"""On a real Ray Serve: keys, a killed replica as clients see it, and an engine whose thread has died."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
import requests
from ray import serve

from orchestrator.errors import ServeError
from orchestrator.keys import KeyBook
from orchestrator.registry import Registry
from orchestrator.serve import serve_cluster
from orchestrator.serve.endpoints import RayEndpoints
from orchestrator.spec.job import DeploySpec
from tests.orchestrator.serve import tiny
from tests.patience import patience

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(local_ray, tmp_path_factory):
    """An endpoint `tiny` of two replicas with one adapter, behind keys; its URL, its registry and a key."""
    folder = tmp_path_factory.mktemp("guarded")
    base = tiny.save_base(folder / "tiny")
    registry = Registry(folder / "registry")
    version = tiny.register(registry, "docs", base, folder / "scratch")
    local_ray.attach()
    ray.init(address=local_ray.gcs_address, log_to_driver=False, logging_level="ERROR", namespace="raypeft")
    was_up = serve_cluster.find_door() is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    secret = KeyBook(registry.url).create("acme").secret
    endpoints = RayEndpoints(registry, port=port, local=True)
    made = endpoints.deploy(version, str(base), "main", DeploySpec(num_replicas=2))
    assert eventually(lambda: serve_cluster.applications()["tiny"].num_running == 2)
    yield made.url, registry, secret
    endpoints.undeploy("tiny")
    if not was_up:
        serve.shutdown()
    ray.shutdown()


def eventually(holds: Any, timeout_s: float = 120.0) -> bool:
    """Whether `holds()` becomes true in time; what it raises on the way is a no."""
    deadline = time.monotonic() + patience(timeout_s)
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException, KeyError):
            if holds():
                return True
        time.sleep(0.2)
    return False


def replicas() -> dict[str, int]:
    """Actor name -> process of each replica that runs."""
    details = serve_cluster._client().get_serve_details()["applications"]["raypeft-tiny"]["deployments"]
    found = next(iter(details.values()))["replicas"]
    return {each["actor_name"]: each["pid"] for each in found if each["state"] == "RUNNING"}


def cpu_ticks(pid: int) -> int:
    """What a process has worked until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def within(actor_name: str, function: Any) -> Any:
    """Calls a function in a replica's process."""
    actor = ray.get_actor(actor_name, namespace="serve")
    return ray.get(actor.__ray_call__.remote(function), timeout=60)


def test_beyond_loopback_nothing_is_deployed_without_keys(tmp_path):
    base = tiny.save_base(tmp_path / "tiny")
    registry = Registry(tmp_path / "registry")
    version = tiny.register(registry, "docs", base, tmp_path / "scratch")
    endpoints = RayEndpoints(registry, host="0.0.0.0", local=True)
    with pytest.raises(ServeError, match="raypeft keys create TENANT"):
        endpoints.deploy(version, str(base), "main", DeploySpec())
    assert registry.endpoint_names() == []


def test_an_endpoint_behind_keys_asks_for_them_and_shows_all_replicas_metrics(site):
    url, registry, secret = site
    assert requests.get(f"{url}/models", timeout=30).status_code == 401
    headers = {"authorization": f"Bearer {secret}"}
    with openai.OpenAI(base_url=url, api_key=secret) as client:
        for _ in range(12):
            assert client.completions.create(model="docs", prompt="a", max_tokens=2).choices
    metrics = url.removesuffix("/v1") + "/metrics"

    def answering() -> set[str]:
        text = requests.get(metrics, headers=headers, timeout=30).text
        return {line.split('replica="')[1].split('"')[0] for line in text.splitlines() if 'replica="' in line}

    assert eventually(lambda: len(answering()) == 2)
    assert eventually(
        lambda: (
            {row.tenant for row in KeyBook(registry.url).rows()} == {"acme"}
            and requests.get(metrics, timeout=30).status_code == 401
        )
    )


def test_requests_of_a_killed_replica_end_in_openais_form_and_are_retried(site):
    url, _, secret = site
    client = openai.OpenAI(base_url=url, api_key=secret, max_retries=0, timeout=120)
    retrying = openai.OpenAI(base_url=url, api_key=secret, max_retries=8, timeout=120)
    asked = {"model": "docs", "prompt": "def f(", "temperature": 0}
    # Of the 256 answers that may be under way for a model at one replica, 30 requests make 240.
    asked = {**asked, "max_tokens": 80, "n": 8}
    expected = [choice.text for choice in client.completions.create(**asked).choices]

    begun = threading.Event()
    ends, statuses = set(), set()

    def stream() -> str:
        texts = dict.fromkeys(range(8), "")
        try:
            for chunk in client.completions.create(**asked, stream=True):
                texts[chunk.choices[0].index] += chunk.choices[0].text
                begun.set()
        except openai.APIError as error:
            assert all(whole.startswith(texts[at]) for at, whole in enumerate(expected))
            return str(error.code)
        assert list(texts.values()) == expected
        return "whole"

    def once() -> int:
        try:
            assert [choice.text for choice in client.completions.create(**asked).choices] == expected
        except openai.InternalServerError as error:
            assert int(error.response.headers["retry-after"]) >= 1 and error.code == "replica_gone"
            return error.status_code
        return 200

    def again() -> list[str]:
        return [choice.text for choice in retrying.completions.create(**asked).choices]

    # Which replica answers what is Serve's choice: again until a kill met a stream and one a whole answer.
    for _ in range(6):
        begun.clear()
        before = {pid: cpu_ticks(pid) for pid in replicas().values()}
        with ThreadPoolExecutor(30) as pool:
            streams, whole, retried = (
                [pool.submit(each) for _ in range(10)] for each in (stream, once, again)
            )
            assert begun.wait(60)
            killed = max(before, key=lambda pid: cpu_ticks(pid) - before[pid])
            os.kill(killed, signal.SIGKILL)
            ends |= {each.result() for each in streams}
            statuses |= {each.result() for each in whole}
            assert [each.result() for each in retried] == [expected] * 10
        assert eventually(lambda gone=killed: len(set(replicas().values()) - {gone}) == 2)
        if "replica_gone" in ends and 503 in statuses:
            break
    assert {"replica_gone"} <= ends <= {"whole", "replica_gone"} and {503} <= statuses <= {200, 503}


def kill_engine_thread(actor: Any) -> None:
    """Runs in a replica: ends the thread that owns the model, as an error there would."""
    thread = next(each for each in threading.enumerate() if each.name.startswith("engine"))
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    for each in gc.get_objects():  # a thread that sleeps sees it when it wakes
        if type(each).__name__ == "SequentialEngine":
            each._tasks.put(None)
        elif type(each).__name__ == "BatchingEngine":
            each._wake.set()


def test_a_dead_engine_thread_is_noticed_within_15_s(site):
    url, _, secret = site
    assert eventually(lambda: len(replicas()) == 2)
    sick = next(iter(replicas()))
    within(sick, kill_engine_thread)
    began = time.monotonic()
    while sick in replicas() and time.monotonic() - began < 60:
        time.sleep(0.1)
    took = time.monotonic() - began
    print(f"a dead engine was out of service after {took:.1f} s")
    assert took < 15
    with openai.OpenAI(base_url=url, api_key=secret, max_retries=8) as client:
        assert client.completions.create(model="docs", prompt="a", max_tokens=2).choices
