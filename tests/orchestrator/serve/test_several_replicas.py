"""Two replicas that may each hold half of the adapters: requests go where theirs is."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import requests
from ray import serve

from orchestrator.registry import Registry
from orchestrator.serve import serve_cluster
from orchestrator.serve.endpoints import RayEndpoints
from orchestrator.serve.proxy.residency_router import SPARE_REQUESTS
from orchestrator.serve.rollouts.reports import Reports
from orchestrator.spec.job import DeploySpec
from tests.orchestrator.serve import tiny
from tests.orchestrator.serve.test_endpoints import complete, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]  # starts two replicas

NAMES = ("red", "green", "blue", "grey")


class Two:
    """The endpoint `tiny` with `NAMES`, and what its replicas report."""

    def __init__(self, url: str, reports: Reports) -> None:
        self.url, self._reports = url, reports

    def answered(self) -> dict[str, Counter[str]]:
        """Replica -> version -> requests that it answered."""
        live = [report for report in self._reports.read() if report.is_live(time.time())]
        return {
            report.replica: Counter({ref: each.requests for ref, each in report.totals.items()})
            for report in live
        }

    def held(self) -> list[set[str]]:
        """What each replica holds."""
        live = [report for report in self._reports.read() if report.is_live(time.time())]
        return [{ref for ref, state in each.states.items() if state == "loaded"} for each in live]

    def since(self, before: dict[str, Counter[str]], num_requests: int) -> dict[str, Counter[str]]:
        """Version -> replica -> requests, of so many since `before`, once all have been reported."""

        def news() -> dict[str, Counter[str]]:
            found: dict[str, Counter[str]] = {}
            for replica, totals in self.answered().items():
                for ref, number in (totals - before.get(replica, Counter())).items():
                    found.setdefault(ref, Counter())[replica] += number
            return found

        wait_for(lambda: sum(sum(each.values()) for each in news().values()) >= num_requests)
        return news()


@pytest.fixture(scope="module")
def two(local_ray, tmp_path_factory) -> Iterator[Two]:
    local_ray.attach()
    ray.init(address=local_ray.gcs_address, log_to_driver=False, logging_level="ERROR", namespace="raypeft")
    door = serve_cluster.open_serve("127.0.0.1", 18751)
    folder = tmp_path_factory.mktemp("several")
    base, registry = tiny.save_base(folder / "tiny"), Registry(folder / "registry")
    endpoints = RayEndpoints(registry, port=door.port, local=True)
    options: dict[str, Any] = {"num_replicas": 2, "engine": {"max_adapters": 2}}
    for seed, name in enumerate(NAMES, start=1):
        version = tiny.register(registry, name, base, folder / "scratch", seed=seed)
        made = endpoints.deploy(version, str(base), "main", DeploySpec(**options))
        options = {}
    found = Two(made.url, Reports(registry.url, "tiny"))
    wait_for(lambda: len(found.held()) == 2)
    yield found
    for row in endpoints.status():
        endpoints.undeploy(row.name)
    serve.shutdown()
    ray.shutdown()


def settle(two: Two) -> None:
    """Asks for all until the replicas hold them all together, and have said so to whoever routes."""

    def is_shared_out() -> bool:
        for name in NAMES:
            assert complete(two.url, name, max_tokens=1).status_code == 200
        time.sleep(1.2)  # until the next reports
        one, other = two.held()
        return len(one) == len(other) == 2 and not one & other

    wait_for(is_shared_out)
    time.sleep(2.5)  # Serve asks each replica every second, and tells its proxies then


def test_each_adapter_is_answered_where_it_is_held(two):
    settle(two)

    def are_answered_where_they_are_held() -> bool:
        """32 requests, none of which loads anything. Routing by chance would manage that once in 2**28 times."""
        before, held = two.answered(), two.held()
        for round in range(8):
            for name in NAMES if round % 2 else reversed(NAMES):
                model = (name, f"{name}@1", f"{name}@production")[round % 3]
                assert complete(two.url, model, max_tokens=1).headers["x-raypeft-adapter"] == f"{name}@1"
        found = two.since(before, 8 * len(NAMES))
        assert {ref: sum(each.values()) for ref, each in found.items()} == {f"{name}@1": 8 for name in NAMES}
        return all(len(each) == 1 for each in found.values()) and sorted(map(sorted, two.held())) == sorted(
            map(sorted, held)
        )

    wait_for(are_answered_where_they_are_held)  # on a busy machine Serve hears late who holds what


def test_whoever_hides_what_it_asks_for_is_sent_anywhere(two):
    """The control: without the hint replicas answer all the same, each for every adapter."""
    settle(two)
    before = two.answered()
    for number in range(32):
        body = {"model": NAMES[number % 4], "prompt": "def f(", "max_tokens": 1, "temperature": 0}
        text = json.dumps(body).replace('"model"', '"mod\\u0065l"')
        answer = requests.post(
            f"{two.url}/completions", data=text, headers={"content-type": "application/json"}, timeout=60
        )
        assert answer.status_code == 200 and answer.headers["x-raypeft-adapter"] == f"{body['model']}@1"
    assert any(len(each) == 2 for each in two.since(before, 32).values())


def test_a_flood_of_one_adapter_is_helped_with_by_the_other_replica(two):
    settle(two)

    def is_helped_with() -> bool:
        before, num = two.answered(), 3 * SPARE_REQUESTS
        threads = [
            threading.Thread(target=complete, args=(two.url, "red"), kwargs={"max_tokens": 80})
            for _ in range(num)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(two.since(before, num)["red@1"]) == 2

    wait_for(is_helped_with)  # on a busy machine so many are not asked for at once each time
