"""Who starts a replica of an endpoint that has none, around an application that says what reached it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Router, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from orchestrator.errors import ServeError
from orchestrator.keys import KeyBook
from orchestrator.serve.proxy import waking
from orchestrator.serve.proxy.waking import Waking
from orchestrator.serve.routes import key_check
from orchestrator.serve.serve_cluster import Application

ASLEEP = Application(
    endpoint="tiny", status="RUNNING", message="", route_prefix="/", num_replicas=0, num_running=0,
    num_unplaced=0, actor_options={}, bounds=(0, 2),
)  # fmt: skip


class Site:
    """What Serve has mounted, and a client of its proxy."""

    def __init__(self, registry_url: str) -> None:
        self.keys = KeyBook(registry_url)
        self.asleep = replace(ASLEEP, registry=registry_url)
        self.mounted: dict[str, Application | None] = {"/": self.asleep}
        self.host = "127.0.0.1"
        self.client = TestClient(Waking(PlainTextResponse("it wakes"), self._read, lambda: self.host))

    def _read(self) -> dict[str, Application | None]:
        return self.mounted

    def answer(self, path: str = "/v1/completions", key: str | None = None, method: str = "POST") -> str:
        """What a client is told: "it wakes", or the status of its error."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        got = self.client.request(method, path, headers=headers)
        if got.status_code == 200:
            return got.text
        assert got.json()["error"]["type"] == "authentication_error"
        assert got.headers["www-authenticate"] == "Bearer"
        return str(got.status_code)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    for module in (waking, key_check):
        monkeypatch.setattr(module, "_MAX_AGE_S", 0.0)
    return Site(str(tmp_path / "registry"))


def test_where_no_keys_are_asked_for_anybody_wakes_it(site):
    assert [site.answer(), site.answer(key="anything")] == ["it wakes"] * 2


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/tiny/v1/chat/completions", "/tiny/metrics", "/none", "/"]
)
@pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS"])
def test_only_a_key_in_force_wakes_it(site, path, method):
    good, old = site.keys.create("acme"), site.keys.create("acme", expires_s=0)
    assert site.answer(path, method=method) == "401"
    assert site.answer(path, "rp-guessed", method) == "401"
    assert site.answer(path, old.secret, method) == "401"
    assert site.answer(path, good.secret, method) == "it wakes"
    site.keys.revoke("acme")
    assert site.answer(path, good.secret, method) == "401"


def test_beyond_loopback_a_key_is_asked_for_although_none_was_made(site):
    site.host = "0.0.0.0"
    assert site.answer() == "401"


def test_a_health_check_is_told_that_it_sleeps_and_does_not_wake_it(site):
    site.keys.create("acme")
    for path in ("/healthz", "/tiny/healthz"):
        assert site.answer(path, method="GET") == '{"status":"idle"}'
    site.mounted = {"/": replace(site.asleep, num_running=1, num_replicas=1)}
    assert site.answer("/healthz", method="GET") == "it wakes"
    assert site.answer() == "401"  # nor does whoever has no key keep it awake


def test_who_never_sleeps_is_none_of_its_business(site):
    site.keys.create("acme")
    for bounds in (None, (1, 4)):
        site.mounted = {"/": replace(site.asleep, bounds=bounds)}
        assert site.answer() == "it wakes"


def test_each_path_is_its_own_applications(site, tmp_path):
    site.keys.create("acme")
    open_to_all = replace(site.asleep, endpoint="open", registry=str(tmp_path / "another"))
    site.mounted = {"/": site.asleep, "/other": None, "/open": open_to_all}
    paths = ["/other", "/other/v1/models", "/otherwise", "/open/v1/models", "/opening", "/v1/models"]
    assert [site.answer(path) for path in paths] == ["it wakes", "it wakes", "401", "it wakes", "401", "401"]
    site.mounted = {"/other": None}
    assert site.answer("/v1/models") == "it wakes"  # Serve says that nothing is there


def test_a_websocket_without_a_key_wakes_nobody(site):
    async def take(websocket):
        await websocket.accept()
        await websocket.close()

    site.keys.create("acme")
    app = Waking(Router([WebSocketRoute("/v1/live", take)]), site._read, lambda: site.host)
    with pytest.raises(WebSocketDisconnect), TestClient(app).websocket_connect("/v1/live"):
        pass


def test_keys_that_cannot_be_read_are_left_to_the_replica(site, caplog):
    key = site.keys.create("acme")
    Path(site.keys.url).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert site.answer() == "it wakes"
    assert "left to the replica" in caplog.text and key.secret not in caplog.text


@pytest.mark.parametrize("knew", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_controller_that_is_gone_holds_nobody_up_and_leaves_what_was_known(site, monkeypatch, knew, fails):
    monkeypatch.setattr(waking, "_PATIENCE_S", 0.05)
    site.keys.create("acme")
    back = threading.Event()
    calls = []

    def read() -> dict[str, Application | None]:
        calls.append(1)
        if knew and len(calls) == 1:
            return site.mounted
        if fails:
            raise ServeError("the controller does not answer", where="serve")
        back.wait(30)
        return site.mounted

    async def run() -> None:
        app = httpx.ASGITransport(Waking(PlainTextResponse("it wakes"), read, lambda: site.host))
        async with httpx.AsyncClient(transport=app, base_url="http://proxy") as client:
            began = time.monotonic()
            said = {(await client.post("/v1/completions")).status_code for _ in range(5)}
            assert said == {401 if knew else 200} and time.monotonic() - began < 5
            if not fails:
                assert len(calls) == 1 + knew  # nobody asks again while an answer is outstanding
                back.set()
                await asyncio.sleep(0.2)
                assert (await client.post("/v1/completions")).status_code == 401

    asyncio.run(run())
