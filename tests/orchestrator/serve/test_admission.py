"""Who is let in, how often and how much: the pure parts, and over HTTP with the `openai` client."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from pathlib import Path

import openai
import pytest
import requests

from orchestrator.errors import ServeError, StorageError
from orchestrator.keys import KeyBook, KeyRing, Limits
from orchestrator.serve.api_error import ApiError
from orchestrator.serve.engines.ensemble import parse_ensemble
from orchestrator.serve.routes.admission import Admission
from orchestrator.serve.routes.key_check import KeyCheck, Tenant, is_loopback, require_keys
from orchestrator.serve.routes.replies import Usage
from orchestrator.serve.routes.token_bucket import TokenBucket
from orchestrator.spending import Spending
from tests.orchestrator.serve.scripted import ScriptedEngine, eventually, listening

CHAT = [{"role": "user", "content": "hi"}]


# rates


def test_a_bucket_gives_a_minutes_worth_and_then_its_rate():
    bucket = TokenBucket(60, now=0)
    for _ in range(60):
        assert bucket.wait_s(1, 0) == 0
        bucket.take(1, 0)
    assert bucket.wait_s(1, 0) == pytest.approx(1.0)
    assert bucket.wait_s(1, 0.5) == pytest.approx(0.5)
    assert bucket.wait_s(1, 1.0) == 0
    assert bucket.wait_s(60, 1000) == 0  # saved up, but no more than a minute's worth
    bucket.take(60, 1000)
    assert bucket.wait_s(1, 1000) > 0


def test_more_than_a_minutes_worth_waits_for_a_full_bucket_and_is_paid_back():
    bucket = TokenBucket(60, now=0)
    bucket.take(1, 0)
    assert bucket.wait_s(300, 0) == pytest.approx(1.0)
    assert bucket.wait_s(300, 1) == 0
    bucket.take(300, 1)
    assert bucket.wait_s(1, 1) == pytest.approx(241)
    bucket.take(-300, 1)  # given back
    assert bucket.wait_s(60, 1) == 0


def test_a_rate_of_nothing_and_a_changed_rate():
    assert TokenBucket(0, now=0).wait_s(1, 10) == float("inf")
    bucket = TokenBucket(60, now=0)
    bucket.take(60, 0)
    bucket.set_rate(120, 0)
    assert bucket.wait_s(60, 0) == 0


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def admission(**options) -> tuple[Admission, Clock]:
    clock = Clock()
    return Admission(clock=clock, now=clock, **options), clock


def enter(admission: Admission, tenant: Tenant, tokens: int, spent: int | None = None, adapter="docs@1", n=1):
    """One request that takes `tokens` at most and `spent` in truth."""
    usage = Usage()
    with admission.admitted(tenant, adapter, n, tokens, usage):
        usage.prompt_tokens = tokens if spent is None else spent


def books_at(folder: Path) -> Spending:
    """The books of a registry, which has a key."""
    KeyBook(str(folder)).create("acme")
    return Spending(str(folder))


def refused(admission: Admission, tenant: Tenant, tokens: int, **options) -> ApiError:
    with pytest.raises(ApiError) as error:
        enter(admission, tenant, tokens, **options)
    return error.value


def test_requests_per_minute():
    door, clock = admission()
    tenant = Tenant("acme", Limits(requests_per_minute=2))
    enter(door, tenant, 5)
    enter(door, tenant, 5)
    error = refused(door, tenant, 5)
    assert (error.status, error.code, error.headers["retry-after"]) == (429, "rate_limit_exceeded", "30")
    enter(door, Tenant("other", Limits(requests_per_minute=2)), 5)
    clock.now += 30
    enter(door, tenant, 5)


def test_tokens_per_minute_give_back_what_was_not_used():
    door, clock = admission()
    tenant = Tenant("acme", Limits(tokens_per_minute=100))
    for _ in range(7):
        enter(door, tenant, 40, spent=9)  # 280 were reserved in all, 63 used
    error = refused(door, tenant, 40)
    assert error.status == 429 and error.retry_after_s == pytest.approx(3 / 100 * 60)
    clock.now += error.retry_after_s
    enter(door, tenant, 40)


def test_replicas_share_a_rate():
    replicas = 2
    door, _ = admission(num_replicas=lambda: replicas)
    tenant = Tenant("acme", Limits(requests_per_minute=4))
    enter(door, tenant, 1)
    enter(door, tenant, 1)
    refused(door, tenant, 1)
    replicas = 1
    enter(door, tenant, 1)


def test_a_refused_request_costs_nothing():
    door, _ = admission()
    tenant = Tenant("acme", Limits(requests_per_minute=2, tokens_per_minute=10))
    enter(door, tenant, 10)
    for _ in range(5):
        refused(door, tenant, 10)
    with pytest.raises(ApiError, match="on tokens per minute: 10"):
        enter(door, tenant, 10)


def test_a_budget_counts_what_runs_and_what_was_spent_before(tmp_path):
    books = books_at(tmp_path)
    door, clock = admission(books=books)
    books.add("acme", 50, 1, clock.now)
    tenant = Tenant("acme", Limits(token_budget=100, budget_period="day"))

    async def ask():
        await door.know(tenant)
        usage = Usage()
        with door.admitted(tenant, "docs@1", 1, 40, usage):
            error = refused(door, tenant, 20)
            usage.completion_tokens = 10
        enter(door, tenant, 40)
        last = refused(door, tenant, 1)
        await door.stop()
        return error, last

    error, last = asyncio.run(ask())
    assert error.code == last.code == "insufficient_quota" and "of 100 are left 0" in last.message
    assert last.retry_after_s == pytest.approx(86400 - clock.now % 86400)
    assert books.read("acme").tokens["total"] == 100
    clock.now += 86400
    enter(door, tenant, 100)


def test_a_budget_holds_over_replicas(tmp_path):
    tenant = Tenant("acme", Limits(token_budget=100, budget_period="total"))

    async def ask() -> None:
        (one, _), (two, _) = (admission(books=books_at(tmp_path)) for _ in range(2))
        for door in (one, two):
            await door.know(tenant)
        enter(one, tenant, 90)
        await one.stop()  # writes down
        enter(two, tenant, 1)  # it has looked a moment ago
        two._clock.now += 6
        await two.know(tenant)
        refused(two, tenant, 20)
        assert "left 9" in refused(two, tenant, 20).message

    asyncio.run(ask())


def test_a_budget_for_good_has_no_time_to_come_again():
    door, _ = admission()
    error = refused(door, Tenant("acme", Limits(token_budget=5, budget_period="total")), 6)
    assert error.status == 429 and "retry-after" not in error.headers


def test_books_that_cannot_be_written_wait(tmp_path, monkeypatch):
    books = books_at(tmp_path)
    door, _ = admission(books=books)
    enter(door, Tenant("acme"), 7)
    monkeypatch.setattr(books, "add", lambda *_: (_ for _ in ()).throw(StorageError("full")))
    asyncio.run(door.stop())
    monkeypatch.undo()
    asyncio.run(door.stop())
    assert books.read("acme").tokens["total"] == 7


def test_a_budget_whose_books_are_away_is_held_against_what_was_known(tmp_path):
    root = tmp_path / "mount"
    books = books_at(root)
    tenant = Tenant("acme", Limits(token_budget=100, budget_period="total"))
    (knowing, clock), (new, _) = admission(books=books), admission(books=books)

    async def ask() -> ApiError:
        books.add("acme", 60, 1)
        await knowing.know(tenant)
        root.rename(tmp_path / "away")
        root.mkdir()
        clock.now += 6
        await knowing.know(tenant)
        enter(knowing, tenant, 30)
        assert "of 100 are left 10" in refused(knowing, tenant, 11).message
        with pytest.raises(ApiError) as error:
            await new.know(tenant)
        await new.know(Tenant("acme"))  # without a budget nothing need be known
        await knowing.stop()
        assert not any(root.iterdir())
        root.rmdir()
        (tmp_path / "away").rename(root)
        await knowing.stop()
        await new.know(tenant)
        assert "of 100 are left 10" in refused(new, tenant, 11).message
        return error.value

    error = asyncio.run(ask())
    assert (error.status, error.code, error.headers["retry-after"]) == (503, "budget_unknown", "2")


def test_what_is_written_down_after_midnight_counts_for_the_day_before(tmp_path):
    books = books_at(tmp_path)
    door, clock = admission(books=books)
    clock.now += 86400 - clock.now % 86400 - 1  # a second to midnight
    tenant = Tenant("acme", Limits(token_budget=100, budget_period="day"))
    enter(door, tenant, 100)
    refused(door, tenant, 1)
    before = clock.now
    clock.now += 2
    enter(door, tenant, 30)
    refused(door, tenant, 71)
    asyncio.run(door.stop())
    used = books.read("acme")
    assert (used.tokens_in("day", before), used.tokens_in("day", clock.now)) == (100, 30)
    assert used.tokens_in("total", clock.now) == 130
    refused(door, tenant, 71)
    enter(door, tenant, 70)


@pytest.mark.parametrize(
    ("options", "tenant", "whose"),
    [
        ({"max_per_adapter": 3}, Tenant(), "for the model 'docs@1'"),
        ({"max_per_tenant": 3}, Tenant("acme"), "of yours"),
        ({}, Tenant("acme", Limits(max_parallel=3)), "of yours"),
        ({"max_in_all": 3}, Tenant(), "here"),
    ],
)
def test_no_more_wait_than_may(options, tenant, whose):
    door, _ = admission(**options)
    with door.admitted(tenant, "docs@1", 2, 5, Usage()):
        with door.admitted(tenant, "docs@1", 1, 5, Usage()):
            error = refused(door, tenant, 5)
        enter(door, tenant, 5)
    assert (error.status, error.code) == (429, "queue_full") and whose in error.message
    assert error.headers["retry-after"] == "2"
    assert refused(door, tenant, 5, n=4).status == 400  # it never can
    if "adapter" in str(options):
        enter(door, tenant, 5, adapter="other@1")


def test_a_full_queue_of_one_adapter_leaves_room_for_others():
    door, _ = admission(max_per_adapter=1)
    with door.admitted(Tenant(), "docs@1", 1, 5, Usage()):
        refused(door, Tenant(), 5)
        enter(door, Tenant(), 5, adapter="other@1")


# who may ask


def test_models_that_a_key_may_use():
    tenant = Tenant("acme", Limits(models=("docs", "tiny")))
    for model in ("docs", "docs@3", "docs@production", "tiny", "docs:0.7+tiny:0.3", "docs@1:0.5+docs@2:0.5"):
        tenant.check_model(model)
    for model in ("cats", "cats@1", "docs:0.7+cats:0.3", "docsx", ""):
        with pytest.raises(ApiError) as error:
            tenant.check_model(model)
        assert error.value.status == 403
    Tenant("free").check_model("anything")


def test_a_key_is_held_to_the_adapters_that_an_ensemble_is_of():
    """Read as whoever answers reads it: no other name comes of two that are allowed."""
    tenant = Tenant("acme", Limits(models=("code", "docs", "a")))
    for model in ("code+docs", "a:1e+2+code", "a + docs : 0.5"):
        assert tenant.may_use(model) and {name for name, _ in parse_ensemble(model)} <= {
            *tenant.limits.models
        }
    assert not tenant.may_use("codedocs") and not tenant.may_use("a:1e+2+cats")


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "")),
    ],
)
def test_what_is_loopback(host, own):
    assert is_loopback(host) is own


def test_beyond_loopback_nothing_starts_without_a_key_in_force(tmp_path):
    keys = KeyBook(str(tmp_path))
    require_keys("127.0.0.1", keys.read())
    with pytest.raises(ServeError, match="raypeft keys create TENANT"):
        require_keys("0.0.0.0", keys.read())
    made = keys.create("acme")
    require_keys("0.0.0.0", keys.read())
    keys.revoke(made.id)
    keys.lend()  # raypeft's own key for an hour is nobody's
    with pytest.raises(ServeError, match="no key that is in force"):
        require_keys("0.0.0.0", keys.read())


# over HTTP


@pytest.fixture
def guarded(tmp_path):
    """An endpoint that asks for keys, and its keys."""
    keys = KeyBook(str(tmp_path))
    door = Admission(KeyCheck(keys, required=True), Spending(str(tmp_path)))
    with listening(ScriptedEngine(), door) as served:
        yield served, keys


def client_of(served, secret, **options):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=secret, max_retries=0, **options)


def test_without_a_known_key_nothing_answers_but_health(guarded):
    served, keys = guarded
    made = keys.create("acme")
    body = {"model": "tiny", "prompt": "a"}
    paths = [("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")]
    paths += [("GET", "/v1/models/tiny"), ("GET", "/metrics"), ("POST", "/tiny/v1/completions")]
    for method, path in paths:
        for wrong in ({}, {"authorization": "Bearer nope"}, {"authorization": f"Basic {made.secret}"}):
            answer = requests.request(method, served.url + path, json=body, headers=wrong)
            assert answer.status_code == 401, (path, wrong)
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert requests.get(served.url + "/healthz").status_code == 200
    with client_of(served, made.secret) as client:
        assert client.completions.create(**body).choices and client.models.list().data
    with (
        client_of(served, "nope") as client,
        pytest.raises(openai.AuthenticationError, match="not known here"),
    ):
        client.models.list()


def test_a_new_key_opens_at_once_and_a_revoked_one_within_a_second(guarded):
    served, keys = guarded
    with client_of(served, keys.create("acme").secret) as client:
        client.models.list()
        keys.revoke("acme")
        assert eventually(lambda: _is_refused(client), timeout_s=5)
    with client_of(served, keys.create("zeta").secret) as client:
        client.models.list()
    expired = client_of(served, keys.create("soon", expires_s=0.0).secret)
    with expired, pytest.raises(openai.AuthenticationError, match="has expired"):
        expired.models.list()


def _is_refused(client) -> bool:
    try:
        client.models.list()
    except openai.AuthenticationError as error:
        assert "has been revoked" in str(error)
        return True
    return False


def test_limits_over_http(guarded):
    served, keys = guarded
    made = keys.create("acme", {"requests_per_minute": 2, "models": ("docs",)})
    with client_of(served, made.secret) as client:
        assert [card.id for card in client.models.list()] == ["docs@1"]
        with pytest.raises(openai.PermissionDeniedError, match="may not use the model 'tiny'"):
            client.completions.create(model="tiny", prompt="a")
        for _ in range(2):
            client.completions.create(model="docs", prompt="a", max_tokens=3)
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="docs", messages=CHAT, stream=True)
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 30
        assert error.value.code == "rate_limit_exceeded"


def test_a_budget_over_http_and_in_the_books(guarded, tmp_path):
    served, keys = guarded
    made = keys.create("acme", {"token_budget": 30, "budget_period": "total"})
    with client_of(served, made.secret) as client:
        client.completions.create(model="docs", prompt="a" * 10, max_tokens=10)
        with pytest.raises(openai.RateLimitError, match="of 30 are left 10") as error:
            client.completions.create(model="docs", prompt="a" * 10, max_tokens=10)
        assert error.value.code == "insufficient_quota"
        for _ in client.completions.create(model="docs", prompt="a", max_tokens=4, stream=True):
            pass
    assert eventually(lambda: Spending(str(tmp_path)).read("acme").tokens.get("total") == 25, timeout_s=20)


def test_keys_are_not_asked_for_on_loopback_until_there_is_one(tmp_path):
    keys = KeyBook(str(tmp_path))
    with listening(ScriptedEngine(), Admission(KeyCheck(keys, required=False))) as served:
        assert requests.get(served.url + "/v1/models").status_code == 200
        keys.create("acme")
        assert eventually(lambda: requests.get(served.url + "/v1/models").status_code == 401, timeout_s=5)
        keys.revoke("acme")  # the last key goes, the door stays shut
        time.sleep(1.1)
        assert requests.get(served.url + "/v1/models").status_code == 401


def test_a_storage_that_fails_leaves_the_known_keys_in_force():
    class Flaky:
        ring, fails = KeyRing(), False

        def read(self) -> KeyRing:
            if self.fails:
                raise StorageError("gone")
            return self.ring

    async def ask() -> None:
        flaky = Flaky()
        check = KeyCheck(flaky, required=True)
        await check.start()
        flaky.fails = True
        with pytest.raises(ApiError, match="not known here"):
            await check.tenant("Bearer x")
        starting = KeyCheck(flaky, required=True)
        with pytest.raises(StorageError):
            await starting.start()

    asyncio.run(ask())


def test_a_storage_that_forgot_its_keys_opens_nothing(tmp_path):
    keys = KeyBook(str(tmp_path))
    secret = keys.create("acme").secret

    async def ask() -> None:
        check = KeyCheck(keys, required=False)
        await check.start()
        Path(keys.url).rename(tmp_path / "away")  # as where a folder is mounted no more
        await asyncio.sleep(1.1)
        with pytest.raises(ApiError, match="did not provide an API key"):
            await check.tenant(None)
        assert (await check.tenant(f"Bearer {secret}")).name == "acme"
        (tmp_path / "away").rename(keys.url)
        keys.revoke("acme")
        await asyncio.sleep(1.1)
        with pytest.raises(ApiError, match="has been revoked"):
            await check.tenant(f"Bearer {secret}")

    asyncio.run(ask())


def test_guessing_keys_reads_the_storage_once_a_second_at_most():
    class Counting:
        reads = 0

        def read(self) -> KeyRing:
            self.reads += 1
            return KeyRing()

    async def guess() -> int:
        keys = Counting()
        check = KeyCheck(keys, required=True)
        await check.start()
        began = time.monotonic()
        answers = await asyncio.gather(
            *(check.tenant(f"Bearer {number}") for number in range(200)), return_exceptions=True
        )
        assert all(isinstance(answer, ApiError) and answer.status == 401 for answer in answers)
        return keys.reads - 1 - int(time.monotonic() - began)

    assert asyncio.run(guess()) <= 1


def test_whoever_guesses_keys_keeps_nobody_else_waiting(tmp_path):
    keys = KeyBook(str(tmp_path))
    secret = keys.create("acme").secret

    async def ask() -> None:
        check = KeyCheck(keys, required=True)
        await check.start()
        guess = asyncio.create_task(check.tenant("Bearer x"))  # waits until the keys may be read again
        await asyncio.sleep(0)
        began = time.monotonic()
        assert (await check.tenant(f"Bearer {secret}")).name == "acme"
        assert not guess.done() and time.monotonic() - began < 0.5
        with pytest.raises(ApiError):
            await guess

    asyncio.run(ask())


def test_keys_are_never_logged(guarded, caplog):
    served, keys = guarded
    secret = keys.create("acme").secret
    with caplog.at_level(logging.DEBUG), client_of(served, secret) as client:
        client.completions.create(model="docs", prompt="a")
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="docs", prompt="a", temperature=7)
    server_logs = [record.getMessage() for record in caplog.records if "openai" not in record.name]
    assert not [line for line in server_logs if secret in line]


def test_a_flood_of_one_adapter_is_told_to_wait_and_others_go_on():
    engine = ScriptedEngine(step_s=0.01)
    with listening(engine, Admission(max_per_adapter=4)) as served:
        statuses = []

        def flood():
            body = {"model": "slow@1", "prompt": "a", "max_tokens": 100}
            statuses.append(requests.post(f"{served.url}/v1/completions", json=body, timeout=60).status_code)

        threads = [threading.Thread(target=flood) for _ in range(12)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: engine.running == 4)
        other = requests.post(f"{served.url}/v1/completions", json={"model": "docs", "prompt": "a"})
        for thread in threads:
            thread.join()
    assert other.status_code == 200 and sorted(statuses) == [200] * 4 + [429] * 8
    assert {request.queue for request in engine.asked} == {"slow@1", "docs@1"}
