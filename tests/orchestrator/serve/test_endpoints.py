"""Endpoints on a real Ray Serve: deployed, found again, moved, killed, waiting, undeployed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
import requests
from ray import serve
from ray.serve.context import _get_global_client

from orchestrator.ask import ask, curl_line
from orchestrator.errors import PlacementError, RegistryError, ServeError
from orchestrator.identity import base_identity
from orchestrator.registry import Registry
from orchestrator.serve import serve_cluster
from orchestrator.serve.desired import Desired
from orchestrator.serve.endpoint_rows import rows_over_http
from orchestrator.serve.endpoints import RayEndpoints
from orchestrator.serve.rollout import falls_below
from orchestrator.serve.rollouts.reports import Reports
from orchestrator.service import Deployment
from orchestrator.spec.job import DeploySpec
from tests.orchestrator.serve import tiny
from tests.patience import patience

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def driver(local_ray) -> Iterator[None]:
    """This process as a driver of the session's Ray; Serve ends with the module where it began here."""
    local_ray.attach()
    ray.init(address=local_ray.gcs_address, log_to_driver=False, logging_level="ERROR", namespace="raypeft")
    was_up = serve_cluster.find_door() is not None
    yield
    if not was_up:
        serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def door(driver) -> serve_cluster.Door:
    """Serve's address; the port that was asked for is taken while it starts."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        return serve_cluster.open_serve("127.0.0.1", other.getsockname()[1])


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny.save_base(folder / name, seed=seed) for seed, name in enumerate(("tiny", "zebra"))}


class Site:
    """A registry with adapters for the bases, and the endpoints over it."""

    def __init__(self, registry: Registry, bases: dict[str, Path], scratch: Path, port: int) -> None:
        self.registry, self.bases, self._scratch, self._port = registry, bases, scratch, port
        self.endpoints = self.with_options(local=True)

    def with_options(self, **options: Any) -> RayEndpoints:
        return RayEndpoints(self.registry, port=self._port, **options)

    def register(self, name: str, base: str = "tiny", **options: Any):
        return tiny.register(self.registry, name, self.bases[base], self._scratch, **options)

    def deploy(
        self,
        version,
        base: str = "tiny",
        *,
        endpoints: RayEndpoints | None = None,
        force: bool = False,
        **spec: Any,
    ):
        chosen = endpoints or self.endpoints
        return chosen.deploy(version, str(self.bases[base]), "main", DeploySpec(**spec), force=force)

    def clear(self) -> None:
        """Ends every endpoint."""
        for row in self.endpoints.status():
            self.endpoints.undeploy(row.name)

    def rows(self) -> dict[str, Any]:
        return {row.name: row for row in self.endpoints.status()}


@pytest.fixture(scope="module")
def site(door, bases, tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    site = Site(Registry(folder / "registry"), bases, folder / "scratch", door.port)
    yield site
    site.clear()


@pytest.fixture
def live(site) -> Deployment:
    """The endpoint `tiny`, serving docs@1; the same replica from test to test."""
    if "docs" not in site.registry.names():
        site.register("docs")
    return site.deploy(site.registry.get("docs@1"))


@pytest.fixture
def bare(site, door, bases, tmp_path) -> Iterator[Site]:
    """A registry of its own, and no endpoint at all, before and after."""
    site.clear()
    bare = Site(Registry(tmp_path / "registry"), bases, tmp_path / "scratch", door.port)
    yield bare
    bare.clear()


def replica_pids(endpoint: str) -> list[int]:
    details = _get_global_client().get_serve_details()["applications"][f"raypeft-{endpoint}"]
    replicas = details["deployments"]["endpoint"]["replicas"]
    # One that is given new settings answers meanwhile, and stays the process that it is.
    there = ("RUNNING", "UPDATING")
    return sorted(replica["pid"] for replica in replicas if replica["state"] in there)


def wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    began = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - began < patience(timeout_s), "it did not happen"
        time.sleep(0.2)
    return found


def complete(url: str, model: str, **options: Any) -> requests.Response:
    body = {"model": model, "prompt": "def f(", "max_tokens": 8, "temperature": 0, **options}
    return requests.post(f"{url}/completions", json=body, timeout=60)


@contextlib.contextmanager
def under_load(url: str, model: str, **options: Any) -> Iterator[list[requests.Response]]:
    """One client that asks again and again."""
    answers: list[requests.Response] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            answers.append(complete(url, model, max_tokens=2, **options))

    thread = threading.Thread(target=client)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()


def test_a_port_that_is_taken_is_replaced_and_said(door):
    assert door.note is None or door.note.startswith("port ")
    again = serve_cluster.open_serve("127.0.0.1", 1)
    assert again.port == door.port
    assert again.note == f"Serve already listens on 127.0.0.1:{door.port}, not 127.0.0.1:1"


def test_the_openai_client_gets_chats_completions_and_streams(live, door):
    assert (live.endpoint, live.model, live.base_name, live.state) == ("tiny", "docs@1", "tiny", "live")
    root = f"http://127.0.0.1:{door.port}"
    assert live.url == f"{root}/tiny/v1"
    texts = set()
    for url in (live.url, f"{root}/v1"):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        assert [card.id for card in client.models.list()] == ["tiny", "docs@1", "docs@production", "docs"]
        for model in ("docs", "tiny"):
            completion = client.completions.create(model=model, prompt="def f(", max_tokens=8, temperature=0)
            texts.add((model, completion.choices[0].text))
        talk = [{"role": "user", "content": "What is a list?"}]
        chat = client.chat.completions.create(model="docs", messages=talk, max_tokens=8, temperature=0)
        stream = client.chat.completions.create(
            model="docs", messages=talk, max_tokens=8, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == chat.choices[0].message.content and len(pieces) > 2
        raw = client.completions.with_raw_response.create(model="docs", prompt="a", max_tokens=1)
        assert raw.headers["x-raypeft-adapter"] == "docs@1"
        with pytest.raises(openai.NotFoundError, match="Here are: tiny, docs@1"):
            client.completions.create(model="dogs", prompt="a")
        with pytest.raises(openai.BadRequestError, match="maximum context length is 96 tokens"):
            client.completions.create(model="docs", prompt="a" * 100)
    assert len(texts) == 2  # the same at both URLs, another from the adapter than from the base
    line = curl_line(live.url, "docs", "What is a list?", max_tokens=8)
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    answer = json.loads(said)["choices"][0]["message"]["content"]
    assert answer == ask(live.url, "docs", "What is a list?", max_tokens=8)


def test_another_version_takes_over_without_a_restart(site, live):
    site.deploy(site.register("swap", seed=2))
    pids = replica_pids("tiny")
    assert complete(live.url, "swap").headers["x-raypeft-adapter"] == "swap@1"
    site.deploy(site.register("swap", seed=3))
    assert complete(live.url, "swap").headers["x-raypeft-adapter"] == "swap@2"
    site.registry.set_alias("swap", 1, "production")
    assert complete(live.url, "swap").headers["x-raypeft-adapter"] == "swap@1"
    assert complete(live.url, "swap@2").headers["x-raypeft-adapter"] == "swap@2"
    assert replica_pids("tiny") == pids
    assert {"swap@1", "swap@2"} < set(site.rows()["tiny"].adapters)
    with pytest.raises(RegistryError, match="endpoint 'tiny' serves it"):
        site.registry.remove_alias("swap", "production")
        site.registry.delete("swap@2")


def test_on_this_machine_an_endpoint_takes_no_place_from_training(live):
    wait_for(lambda: ray.available_resources().get("CPU") == 2)


def test_one_adapter_is_taken_away_and_the_others_stay(site, live):
    site.deploy(site.register("away", seed=4))
    site.deploy(site.register("away", seed=5))
    pids = replica_pids("tiny")
    site.endpoints.undeploy("tiny", "away@1")
    assert complete(live.url, "away@1").status_code == 404
    assert complete(live.url, "away@2").status_code == 200
    assert site.registry.holders("away@1") == [] and site.registry.holders("away@2") == ["tiny"]
    with pytest.raises(ServeError) as raised:
        site.endpoints.undeploy("tiny", "away@1")
    assert str(raised.value).startswith("endpoint 'tiny' does not serve 'away@1'. It serves docs@1")
    site.endpoints.undeploy("tiny", "away")
    assert complete(live.url, "away@2").status_code == 404
    assert complete(live.url, "tiny").status_code == 200
    assert replica_pids("tiny") == pids
    audit = Reports(site.registry.url, "tiny").audit()
    steps = [(step["event"], step["adapter"]) for step in audit if step["adapter"].startswith("away")]
    assert steps == [
        ("deployed", "away@1"), ("deployed", "away@2"), ("undeployed", "away@1"), ("undeployed", "away@2"),
    ]  # fmt: skip
    with pytest.raises(ServeError, match=r"there is no endpoint 'tinny'\. Closest: 'tiny'\."):
        site.endpoints.undeploy("tinny")


def test_a_damaged_adapter_leaves_the_endpoint_as_it_was(site, live):
    bad = site.register("bad", seed=6)
    with open(f"{bad.url}/adapter_model.safetensors", "r+b") as file:
        file.truncate(100)
    state = site.registry.endpoint_state("tiny")
    with pytest.raises(ServeError, match="bad@1 is not served: "):
        site.deploy(bad)
    assert site.registry.endpoint_state("tiny") == state and site.registry.holders("bad@1") == []
    assert site.registry.alias("bad", "production") is None
    assert complete(live.url, "docs").status_code == 200


WATCHED = {"rollout": {"canary_percent": 30, "bake": "10m"}}


@pytest.fixture
def watched(site, live) -> Any:
    """Three versions of a new name: the first has the alias, and the second is watched on its way there; a user who
    gets the second."""
    name = f"watched-{len(site.registry.names())}"
    versions = [site.register(name, seed=seed) for seed in (21, 22, 23)]
    site.deploy(versions[0])
    assert site.deploy(versions[1], **WATCHED).state == "canary"
    ref = versions[1].ref
    user = next(str(user) for user in range(99) if falls_below(30, f"{ref}:{user}"))
    wait_for(lambda: complete(live.url, name, user=user).headers["x-raypeft-adapter"] == ref)
    return versions, user


def rollout_steps(site, name: str) -> list[tuple[str, str]]:
    audit = Reports(site.registry.url, "tiny").audit()
    return [(step["event"], step["adapter"]) for step in audit if step["adapter"].startswith(name)][1:]


def test_a_version_that_fails_leaves_what_is_watched_and_how_replicas_are_set_up(site, live, watched):
    (_, second, third), user = watched
    with open(f"{third.url}/adapter_model.safetensors", "r+b") as file:
        file.truncate(100)
    state = site.registry.endpoint_state("tiny")
    with pytest.raises(ServeError, match=f"{third.ref} is not served: "):
        site.deploy(third, engine={"max_context": 16}, num_replicas=2, **WATCHED)
    assert site.registry.endpoint_state("tiny") == state
    wait_for(lambda: len(replica_pids("tiny")) == 1)
    wait_for(lambda: complete(live.url, "tiny", max_tokens=32).status_code == 200)
    assert complete(live.url, second.name, user=user).headers["x-raypeft-adapter"] == second.ref
    assert rollout_steps(site, second.name) == [("rollout", second.ref), ("began", second.ref)]


def test_other_terms_for_what_is_watched_take_it_from_nobody(site, live, watched):
    (_, second, _), user = watched
    with under_load(live.url, second.name, user=user) as answers:
        site.deploy(second, rollout={"canary_percent": 60, "bake": "10m"})
        time.sleep(3)
    assert {answer.headers["x-raypeft-adapter"] for answer in answers} == {second.ref}
    rollout = Desired.from_dict(site.registry.endpoint_state("tiny")).rollout(second.name, "production")
    assert (rollout.canary_percent, rollout.state) == (60, "baking")
    site.deploy(second)
    assert site.registry.alias(second.name, "production") == 2
    assert Desired.from_dict(site.registry.endpoint_state("tiny")).rollout(second.name, "production") is None
    assert [event for event, _ in rollout_steps(site, second.name)] == [
        "rollout", "began", "rollout", "deployed",
    ]  # fmt: skip


def test_another_version_takes_the_place_of_what_is_watched(site, watched):
    (_, second, third), _ = watched
    assert site.deploy(third, **WATCHED).state == "canary"
    desired = Desired.from_dict(site.registry.endpoint_state("tiny"))
    assert desired.served(second.ref) is None and desired.rollout(third.name, "production").ref == third.ref
    assert rollout_steps(site, second.name)[:5] == [
        ("rollout", second.ref), ("began", second.ref), ("rolling back", second.ref),
        ("rolled back", second.ref), ("rollout", third.ref),
    ]  # fmt: skip


def test_a_replica_that_can_never_be_placed_is_refused(site):
    with pytest.raises(PlacementError) as raised:
        site.deploy(site.register("big", seed=7), gpus_per_replica=3)
    assert str(raised.value) == (
        "deploy.gpus_per_replica: a replica asks for 3 GPUs, and this machine has fewer. "
        "Lower it, or leave it at auto."
    )
    assert site.registry.holders("big@1") == []


def test_another_registrys_endpoint_is_not_taken_over(site, live, bases, tmp_path):
    other = Site(Registry(tmp_path / "other"), bases, tmp_path / "scratch", site.endpoints._port)
    with pytest.raises(ServeError) as raised:
        other.deploy(other.register("theirs"))
    assert str(raised.value) == (
        f"endpoint 'tiny' on this cluster follows the registry {site.registry.url}, this command uses "
        f"{other.registry.url}. Deploy under another name (--endpoint NAME), or end that one first."
    )
    assert other.registry.endpoint_names() == [] and other.registry.holders("theirs@1") == []


def test_endpoints_are_listed_over_http_too(site, live, door):
    (row,) = rows_over_http(site.registry, f"http://127.0.0.1:{door.port}")
    assert (row.name, row.url, row.state) == ("tiny", live.url, "live")
    assert "docs@1" in row.adapters
    (row,) = rows_over_http(site.registry, "http://127.0.0.1:9")
    assert (row.url, row.state) == ("", "down")


def test_another_registrys_endpoint_of_the_same_name_is_not_ours(site, live, door, tmp_path):
    other = Registry(tmp_path / "other")
    other.update_endpoint("tiny", lambda stored: site.registry.endpoint_state("tiny"))
    (row,) = rows_over_http(other, f"http://127.0.0.1:{door.port}")
    assert (row.name, row.url, row.state) == ("tiny", "", "down")


def test_a_client_that_hangs_up_frees_the_engine(live):
    """Its generation is cancelled: a short one right behind it need not wait for all of it."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 90, "temperature": 0, "n": 16, "stream": True}
    began = time.monotonic()
    for _ in requests.post(f"{live.url}/completions", json=body, timeout=60).iter_lines():
        pass
    whole_s = time.monotonic() - began
    with requests.post(f"{live.url}/completions", json=body, stream=True, timeout=60) as response:
        next(response.iter_lines())
    began = time.monotonic()
    assert complete(live.url, "tiny", max_tokens=1).status_code == 200
    assert time.monotonic() - began < whole_s / 2


def test_a_killed_replica_comes_back_with_what_it_held(live):
    before = complete(live.url, "docs@1").json()["choices"]
    (pid,) = replica_pids("tiny")
    os.kill(pid, signal.SIGKILL)

    def answers_again() -> bool:
        with contextlib.suppress(requests.RequestException):
            return complete(live.url, "docs@1").status_code == 200
        return False

    wait_for(answers_again)
    assert replica_pids("tiny") != [pid]
    assert complete(live.url, "docs@1").json()["choices"] == before


def test_two_bases_answer_at_once_and_v1_goes_with_the_last(bare):
    one, two = bare.deploy(bare.register("docs")), bare.deploy(bare.register("stripes", "zebra"), "zebra")
    root = one.url.removesuffix("/tiny/v1")
    assert two.url == f"{root}/zebra/v1"
    threads = [
        threading.Thread(target=complete, args=(url, model))
        for url, model in ((one.url, "docs"), (two.url, "stripes"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert complete(one.url, "docs").status_code == complete(two.url, "stripes").status_code == 200
    assert complete(one.url, "stripes").status_code == 404
    wait_for(lambda: requests.get(f"{root}/v1/models", timeout=10).status_code == 404)
    error = requests.get(f"{root}/v1/models", timeout=10).json()["error"]["message"]
    assert error == "Several endpoints answer here, so /v1 alone names none. Use one of /tiny/v1, /zebra/v1."
    assert bare.rows()["tiny"].routes == (one.url,)
    pids = replica_pids("zebra")
    with under_load(two.url, "stripes") as answers:
        bare.endpoints.undeploy("tiny")
        wait_for(lambda: complete(f"{root}/v1", "stripes").status_code == 200)
    assert {answer.status_code for answer in answers} == {200}
    assert replica_pids("zebra") == pids  # moved in place
    assert bare.rows()["zebra"].routes == (two.url, f"{root}/v1")
    assert requests.get(f"{one.url}/models", timeout=10).status_code == 404
    assert bare.registry.endpoint_names() == ["zebra"] and bare.registry.holders("docs@1") == []


def test_bases_of_one_name_get_endpoints_of_their_own(bare, tmp_path):
    bare.bases = {**bare.bases, "twin": tiny.save_base(tmp_path / "tiny", seed=5)}
    one, two = bare.deploy(bare.register("docs")), bare.deploy(bare.register("twins", "twin"), "twin")
    assert one.endpoint == "tiny"
    assert two.endpoint == f"tiny-{base_identity(str(bare.bases['twin'])).content_hash[:8]}"
    assert complete(two.url, "twins").headers["x-raypeft-adapter"] == "twins@1"
    assert two.base_name == "tiny" and complete(two.url, two.base_name).status_code == 200


def test_a_deployment_without_a_place_waits_and_becomes_live_by_itself(bare):
    @ray.remote(num_cpus=2)
    class Training:
        def ready(self) -> None:
            pass

    training = Training.remote()
    ray.get(training.ready.remote())
    cluster = bare.with_options(local=False, place_timeout_s=3)
    deployed = bare.deploy(bare.register("docs"), endpoints=cluster)
    assert deployed.state == "waiting"
    row = bare.rows()["tiny"]
    assert (row.state, row.message, row.adapters) == ("waiting", "for room on the cluster", ("docs@1",))
    assert bare.registry.alias("docs", "production") is None
    second = bare.deploy(bare.register("docs", seed=2), endpoints=cluster, alias="candidate")
    assert second.state == "waiting"
    ray.kill(training)
    wait_for(lambda: bare.registry.alias("docs", "candidate") == 2)
    assert bare.registry.alias("docs", "production") == 1
    wait_for(lambda: requests.get(deployed.url + "/models", timeout=10).status_code == 200)
    assert complete(deployed.url, "docs").headers["x-raypeft-adapter"] == "docs@1"
    assert bare.rows()["tiny"].state == "live"


def test_replicas_are_added_in_place(bare):
    bare.deploy(bare.register("docs"))
    (pid,) = replica_pids("tiny")
    bare.deploy(bare.registry.get("docs@1"), num_replicas=2)
    pids = wait_for(lambda: len(replica_pids("tiny")) == 2 and replica_pids("tiny"))
    assert pid in pids
    bare.deploy(bare.registry.get("docs@1"))  # says nothing of replicas: both stay
    assert replica_pids("tiny") == pids


def test_an_endpoint_that_does_not_come_up_leaves_nothing_behind(bare, tmp_path):
    base = tiny.save_base(tmp_path / "broken")
    (base / "tokenizer.json").write_text("{")
    (base / "tokenizer_config.json").unlink()
    bare.bases = {**bare.bases, "broken": base}
    with pytest.raises(ServeError, match="endpoint 'broken' does not come up: ") as raised:
        bare.deploy(bare.register("docs", "broken"), "broken")
    assert "Traceback" not in str(raised.value) and "\n" not in str(raised.value)
    assert bare.rows() == {}
    assert bare.registry.endpoint_names() == [] and bare.registry.holders("docs@1") == []


def test_applications_of_others_are_left_alone(bare):
    @serve.deployment(name="hello", ray_actor_options={"num_cpus": 0})
    class Hello:
        def __call__(self) -> str:
            return "hello"

    serve.run(Hello.bind(), name="theirs", route_prefix="/")
    try:
        deployed = bare.deploy(bare.register("docs"))
        root = deployed.url.removesuffix("/tiny/v1")
        assert requests.get(root, timeout=10).text == "hello"
        assert complete(deployed.url, "docs").status_code == 200
        assert bare.rows()["tiny"].routes == (deployed.url,)
        bare.endpoints.undeploy("tiny")
        assert requests.get(root, timeout=10).text == "hello"
    finally:
        serve.delete("theirs")


def test_an_endpoint_that_ended_with_its_ray_comes_back_with_all_it_served(bare):
    bare.deploy(bare.register("docs", seed=1))
    serve_cluster.delete_application("tiny")  # as `raypeft down` does: the desired state stays
    assert bare.rows()["tiny"].state == "down"
    deployed = bare.deploy(bare.register("docs", seed=2))
    assert complete(deployed.url, "docs@1").status_code == complete(deployed.url, "docs@2").status_code == 200
