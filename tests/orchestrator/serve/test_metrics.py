"""What Prometheus reads, that its cardinality is bounded, and that the dashboard asks for series that exist."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import openai
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.errors import StorageError
from orchestrator.registry import Registry
from orchestrator.serve.engines.engine import Figures
from orchestrator.serve.routes.metric_files import MetricFiles, merged
from orchestrator.serve.routes.metrics import OTHER, Metrics, Timing
from tests.orchestrator.serve.scripted import ScriptedEngine, eventually, listening

DASHBOARD = Path(__file__).parents[3] / "clusters" / "grafana" / "endpoints.json"


def series(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) -> value, without the replica's label where it is empty."""
    return {
        (
            sample.name,
            tuple(sorted((key, value) for key, value in sample.labels.items() if value)),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found, name: str, **labels: str) -> float | None:
    return found.get((f"raypeft_{name}", tuple(sorted(labels.items()))))


def scrape(served) -> dict:
    answer = requests.get(f"{served.url}/metrics", timeout=30)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return series(answer.text)


def test_sums_of_adapters_count_as_one_and_take_no_adapters_place():
    metrics = Metrics(served=lambda: ["docs@1"], max_adapters=2)
    for look in (1, 2):
        for number in range(5):
            timing = Timing("/v1/completions")
            metrics.begin(timing, f"docs@1:0.{number}+cats@1:{look}")
            metrics.end(timing, 200)
        timing = Timing("/v1/completions")
        metrics.begin(timing, "docs@1")
        metrics.end(timing, 200)
        found = series(metrics.text())
        asked = {"route": "/v1/completions", "status": "200"}
        assert value(found, "requests_total", adapter="ensemble", **asked) == 5 * look
        assert value(found, "requests_total", adapter="docs@1", **asked) == look


def test_each_answer_names_the_replica_as_its_series_do():
    metrics = Metrics("t7j7w627")
    with listening(metrics=metrics) as served:
        asked = {"model": "docs", "prompt": "a", "max_tokens": 2}
        for body in (asked, {**asked, "stream": True}, {**asked, "n": 0}):
            answer = requests.post(f"{served.url}/v1/completions", json=body, timeout=30)
            assert answer.headers["x-raypeft-replica"] == "t7j7w627"
        assert 'replica="t7j7w627"' in requests.get(f"{served.url}/metrics", timeout=30).text


def test_requests_tokens_and_times_are_counted_by_adapter():
    with (
        listening(ScriptedEngine(step_s=0.002)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client,
    ):
        for stream in (False, True):
            answer = client.completions.create(model="docs", prompt="abc", max_tokens=5, stream=stream)
            assert list(answer)
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=2
        )
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="dogs", prompt="a")
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="docs", prompt="a", temperature=5)
        assert eventually(lambda: value(scrape(served), "requests_running", adapter="docs@1") == 0)
        found = scrape(served)
    docs = {"adapter": "docs@1", "route": "/v1/completions", "status": "200"}
    assert value(found, "requests_total", **docs) == 2
    assert value(found, "requests_total", **{**docs, "adapter": OTHER, "status": "404"}) == 1
    assert value(found, "requests_total", **{**docs, "adapter": OTHER, "status": "400"}) == 1
    assert value(found, "requests_total", adapter="tiny", route="/v1/chat/completions", status="200") == 1
    assert value(found, "prompt_tokens_total", adapter="docs@1") == 6
    assert value(found, "completion_tokens_total", adapter="docs@1") == 10
    for name in ("request_seconds", "first_token_seconds", "token_seconds"):
        assert value(found, f"{name}_count", adapter="docs@1") == 2, name
        assert 0 < value(found, f"{name}_sum", adapter="docs@1") < 60
    assert value(found, "first_token_seconds_sum", adapter="docs@1") < value(
        found, "request_seconds_sum", adapter="docs@1"
    )
    assert value(found, "batch_occupancy") == 0 and value(found, "adapter_slots") == 4
    assert value(found, "prefix_cache_hit_tokens_total") == 3


def test_streams_that_break_and_clients_that_leave_are_told_apart():
    engine = ScriptedEngine(step_s=0.01)
    engine.fails_at = 2
    with (
        listening(engine) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.APIError):
            list(client.completions.create(model="docs", prompt="a", stream=True))
        engine.fails_at = None
        chunks = client.completions.create(model="docs", prompt="a", max_tokens=400, stream=True)
        next(iter(chunks))
        chunks.close()

        def counted(status):
            return value(
                scrape(served), "requests_total", adapter="docs@1", route="/v1/completions", status=status
            )

        assert eventually(lambda: (counted("503"), counted("499")) == (1, 1))


def test_no_series_but_one_for_any_number_of_wrong_names():
    with listening() as served:
        for number in range(50):
            requests.post(f"{served.url}/v1/completions", json={"model": f"x{number}", "prompt": "a"})
            requests.post(f"{served.url}/v1/nowhere/{number}")
        labels = {label for name, label in scrape(served) if name == "raypeft_requests_total"}
    assert len(labels) == 2


def used(metrics: Metrics, adapter: str, tenant: str = "") -> str:
    """The label under which a request of an adapter is counted."""
    timing = Timing("/v1/completions", tenant=tenant)
    metrics.begin(timing, adapter)
    timing.token(3)
    metrics.end(timing, 200)
    return str(timing.label)


def test_adapters_beyond_the_bound_are_counted_together():
    metrics = Metrics(max_adapters=5)
    labels = [used(metrics, f"a{number}@1", tenant=f"t{number}") for number in range(20)]
    assert labels == [*(f"a{number}@1" for number in range(5)), *[OTHER] * 15]
    found = series(metrics.text())
    assert value(found, "completion_tokens_total", adapter=OTHER) == 45
    assert len([1 for name, _ in found if name == "raypeft_completion_tokens_total"]) == 6
    assert len([1 for name, _ in found if name == "raypeft_tenant_tokens_total"]) == 6


def test_what_is_served_no_more_makes_room_for_what_is():
    served = {"a@1", "b@1"}
    metrics = Metrics(max_adapters=2, served=lambda: served)
    assert [used(metrics, "a@1"), used(metrics, "b@1"), used(metrics, "c@1")] == ["a@1", "b@1", OTHER]
    running = Timing("/v1/completions")
    metrics.begin(running, "a@1")
    served.clear()
    served.add("c@1")
    assert used(metrics, "c@1") == "c@1"
    assert "b@1" not in metrics.text() and "a@1" in metrics.text()  # one that answers still is counted
    metrics.end(running, 200)
    assert "a@1" not in metrics.text()


def test_replicas_show_one_anothers_series(tmp_path):
    Registry(tmp_path).update_endpoint("tiny", lambda now: {"endpoint": "tiny"})
    replicas = 2
    first, second = (
        Metrics(
            name,
            lambda: Figures(running=3),
            files=MetricFiles(str(tmp_path), "tiny", name),
            num_replicas=lambda: replicas,
        )
        for name in ("one", "two")
    )
    used(first, "docs@1")
    used(second, "docs@1")

    async def share_and_read() -> tuple[str, str]:
        sharing = asyncio.create_task(second.share())
        while not list(Path(tmp_path).rglob("two.json")):
            await asyncio.sleep(0.01)
        both = await first.whole_text()
        sharing.cancel()
        await asyncio.gather(sharing, return_exceptions=True)
        return both, await first.whole_text()

    both, alone = asyncio.run(share_and_read())
    found = series(both)
    for replica in ("one", "two"):
        assert value(found, "completion_tokens_total", adapter="docs@1", replica=replica) == 3
        assert value(found, "batch_running", replica=replica) == 3
    names = [line.split()[2] for line in both.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) and 'replica="two"' not in alone
    replicas = 1
    assert 'replica="two"' not in asyncio.run(first.whole_text())


def test_nothing_is_written_where_the_storage_is_away(tmp_path):
    root = tmp_path / "mount"
    Registry(root).update_endpoint("tiny", lambda now: {"endpoint": "tiny"})
    files = MetricFiles(str(root), "tiny", "one")
    files.write("a 1")
    root.rename(tmp_path / "away")
    root.mkdir()
    with pytest.raises(StorageError, match="no trace of endpoint 'tiny'"):
        files.write("a 2")
    assert files.others() == [] and not any(root.iterdir())


def test_merging_keeps_the_lines_of_a_metric_together():
    one = '# HELP a x\n# TYPE a counter\na{r="1"} 1\n# HELP b y\n# TYPE b gauge\nb 2\n'
    two = '# HELP b y\n# TYPE b gauge\nb{r="2"} 3\n# HELP a x\n# TYPE a counter\na{r="2"} 4\n'
    lines = ["# HELP a x", "# TYPE a counter", 'a{r="1"} 1', 'a{r="2"} 4']
    assert merged([one, two]).splitlines() == [*lines, "# HELP b y", "# TYPE b gauge", "b 2", 'b{r="2"} 3']


# the dashboard


def expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    variables = [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]] + variables


def test_the_dashboard_asks_for_series_and_labels_that_exist():
    metrics = Metrics("r", lambda: Figures(prompt_tokens=1))
    used(metrics, "docs@1", tenant="acme")
    refused = Timing("/v1/completions", tenant="acme")
    metrics.end(refused, 429)
    labels: dict[str, set[str]] = {}
    for name, found in series(metrics.text()):
        labels.setdefault(name, set()).update(key for key, _ in found)
    asked = expressions()
    assert len(asked) > 15
    for expression in asked:
        names = re.findall(r"raypeft_\w+", expression)
        assert names, expression
        for name in names:
            assert name in labels, f"{name} of {expression}"
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        matched = re.findall(r"(\w+)=~", expression)
        for label in [*(part.strip() for group in grouped for part in group.split(",")), *matched]:
            assert label in labels[names[0]], f"{label} of {expression}"


def test_the_dashboard_shows_every_metric_there_is():
    metrics = Metrics("r")
    used(metrics, "docs@1", tenant="acme")
    text = " ".join(expressions())
    for family in text_string_to_metric_families(metrics.text()):
        assert family.name in text, family.name


def test_the_dashboard_is_whole():
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"] and board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len(ids)
    known = {each["name"] for each in board["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) <= known
