"""Requests that nobody should send, and clients that behave as nobody should: an error each, the server unharmed."""

from __future__ import annotations

import http.client
import json
import os
import random
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from orchestrator.serve.engines.heads import ROUTES
from orchestrator.serve.routes.admission import Admission
from orchestrator.serve.routes.body import MAX_BODY_BYTES
from orchestrator.serve.routes.head_api import (
    ClassifyRequest,
    EmbeddingRequest,
    QuestionAnsweringRequest,
    TokenClassifyRequest,
)
from orchestrator.serve.routes.openai_api import ChatRequest, CompletionRequest
from tests.orchestrator.serve.scripted import (
    FixedCatalogue,
    ScriptedEngine,
    ScriptedHeads,
    app_of,
    eventually,
    listening,
    spoken,
)

KINDS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/classify": ClassifyRequest,
    "/v1/token-classify": TokenClassifyRequest,
    "/v1/question-answering": QuestionAnsweringRequest,
}


# requests made from the schemas themselves

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def mostly(usual: st.SearchStrategy, odd: st.SearchStrategy) -> st.SearchStrategy:
    """The first, and the second once in a dozen times."""
    return st.integers(0, 11).flatmap(lambda drawn: odd if drawn == 7 else usual)


MODELS = mostly(
    st.sampled_from(["tiny", "docs", "docs@1", "slow@1"]),
    st.sampled_from(["dogs", "", "docs@99", "a:0.5+b:0.5", "../x", "\x00"]),
)
EDGES = st.sampled_from(
    [0, 1, -1, 17, 128, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.0, 1e-9, 1e308, 2.0, 2.0001]
)
WORDS = mostly(
    st.text(min_size=1, max_size=12),
    st.sampled_from(["", "\ud800", "\x00", "é" * 40, "<|end|>", "a" * 600, "😀" * 9]),
)


def values(schema: dict[str, Any], whole: dict[str, Any]) -> st.SearchStrategy:
    """Values of a JSON schema: mostly of its type, often at or beyond its bounds."""
    if "$ref" in schema:
        return values(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return st.one_of([values(each, whole) for each in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    match schema.get("type"):
        case "string":
            return WORDS
        case "integer":
            low = schema.get("minimum", 0)
            return mostly(st.integers(low, min(schema.get("maximum", low + 9), low + 9)), EDGES)
        case "number":
            return mostly(st.floats(0, 1, exclude_min=True), EDGES)
        case "boolean":
            return st.booleans()
        case "array":
            return st.lists(
                values(schema.get("items", {}), whole), min_size=schema.get("minItems", 0), max_size=5
            )
        case "object":
            return bodies(schema, whole)
        case "null":
            return st.none()
    return ANYTHING


def bodies(schema: dict[str, Any], whole: dict[str, Any]) -> st.SearchStrategy:
    """Objects: each key of its own kind, now and then of any kind, left out, or one that nobody knows."""
    known = {name: values(each, whole) for name, each in schema.get("properties", {}).items()}
    if "model" in known:
        known["model"] = MODELS
    needed = {name: known[name] for name in schema.get("required", [])}
    rest = {name: each for name, each in known.items() if name not in needed}
    good = st.fixed_dictionaries(needed, optional=rest)
    odd = st.dictionaries(st.sampled_from([*known, "tools", "echo", "logit_bias", "x"]), ANYTHING, max_size=2)
    return st.builds(lambda one, two: {**one, **two}, good, mostly(st.just({}), odd))


def texts(route: str) -> st.SearchStrategy[bytes]:
    """Bodies of a route, some of them broken on the way."""
    schema = KINDS[route].model_json_schema()
    whole = bodies(schema, schema).map(dumped)
    broken = st.tuples(whole, st.integers(0, 400), st.binary(max_size=6)).map(
        lambda made: made[0][: made[1]] + made[2] + made[0][made[1] :]
    )
    return st.one_of(whole, whole, whole, broken, st.binary(max_size=60))


def dumped(value: Any) -> bytes:
    return json.dumps(value, default=lambda raw: raw.hex()).encode("utf-8", "surrogatepass")


REQUESTS = st.sampled_from(list(KINDS)).flatmap(lambda route: st.tuples(st.just(route), texts(route)))


def check_answer(route: str, body: bytes, answer: Any) -> None:
    """An answer in OpenAI's form or an error in it, and never a failure of ours."""
    assert answer.status_code in (200, 400, 404), (route, body, answer.status_code, answer.text)
    if answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text, (route, body)
        return
    data = answer.json()
    if answer.status_code == 200:
        assert "model" in data and ("choices" in data or "data" in data)
        return
    error = data["error"]
    assert isinstance(error["message"], str) and error["message"], (route, body)
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


class Endpoints:
    """One that generates and one of each task, in this process: each request goes to its own."""

    def __init__(self) -> None:
        self.works = {route: ScriptedHeads(task) for task, route in ROUTES.items()}
        engine = ScriptedEngine(end_after=20)
        self.works |= {"/v1/completions": engine, "/v1/chat/completions": engine}
        self.catalogue = FixedCatalogue()
        self._running = ExitStack()
        made = {
            id(work): self._running.enter_context(TestClient(app_of(work, self.catalogue)))
            for work in {id(work): work for work in self.works.values()}.values()
        }
        self.clients = {route: made[id(work)] for route, work in self.works.items()}

    def __enter__(self) -> Endpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()

    def fuzz(self, count: int, seed: int | None = None) -> dict[int, int]:
        """Sends so many random requests; returns how many had each status."""
        statuses: dict[int, int] = {}

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=seed is None,
            suppress_health_check=list(HealthCheck),
        )
        @given(REQUESTS)
        def send(made: tuple[str, bytes]) -> None:
            route, body = made
            answer = self.clients[route].post(route, content=body)
            check_answer(route, body, answer)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1

        send()
        return statuses

    def is_unharmed(self) -> None:
        """Nothing is held, nothing runs, and every route answers as before."""
        assert self.catalogue.held == 0 and all(work.running == 0 for work in self.works.values())
        for route, client in self.clients.items():
            body = {
                "/v1/completions": {"prompt": "a", "max_tokens": 3, "seed": 1},
                "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
                "/v1/question-answering": {"question": "a", "context": "b"},
            }.get(route, {"input": "abc"})
            answer = client.post(route, json={"model": "docs@1", **body})
            assert answer.status_code == 200, (route, answer.text)
            if route == "/v1/completions":
                assert answer.json()["choices"][0]["text"] == spoken("a", "docs@1", 1, 3)


def test_random_requests_are_answered_or_refused():
    with Endpoints() as endpoints:
        statuses = endpoints.fuzz(300)
        assert statuses.get(200, 0) > 20 and statuses.get(400, 0) > 20  # they go both ways, or show nothing
        endpoints.is_unharmed()


@pytest.mark.matrix  # minutes
@pytest.mark.timeout(3600)
def test_ten_thousand_random_requests_are_answered_or_refused():
    with Endpoints() as endpoints:
        statuses = endpoints.fuzz(10_000, seed=1)
        assert sum(statuses.values()) >= 10_000 and statuses[200] > 500 and statuses[400] > 500
        endpoints.is_unharmed()
        print(statuses)


# requests by hand


@pytest.fixture(scope="module")
def endpoint():
    with listening(ScriptedEngine(end_after=8), Admission()) as served:
        yield served


DEEP = b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
ABSURD = [
    DEEP,
    b'{"model": "tiny", "messages": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    b'{"model": "tiny", "prompt": "a", "metadata": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"model": "tiny", "prompt": "a", "max_tokens": 1e400}',
    b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
    b'{"model": "tiny", "prompt": "a", "seed": 1.5}',
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "' + b"m" * 1_000_000 + b'", "prompt": "a"}',
    b'{"model": "tiny", "prompt": "' + b"a" * 2_000_000 + b'"}',
    b'{"model": "tiny", "prompt": [' + b"1," * 500_000 + b"1]}",
    b'{"model": "tiny", "prompt": "a", "stop": ["' + b"s" * 100_000 + b'"]}',
    b'{"model": "tiny", "prompt": ["a"], "n": 17}',
    b'{"model": "tiny", "prompt": ' + json.dumps(["a"] * 64).encode() + b', "n": 16}',
    b'{"model": "tiny", "prompt": "a", "' + b"k" * 100_000 + b'": 1}',
    b'{"model": "tiny", "model": "tiny"}',
    b"\x00" * 1000,
    b"\xff\xfe{\x00}\x00",
    b"null",
    b"",
]


@pytest.mark.parametrize(
    "body", ABSURD, ids=[f"{number}-{body[:24]!r}" for number, body in enumerate(ABSURD)]
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_absurd_bodies_are_a_400_that_is_short(endpoint, route, body):
    answer = requests.post(endpoint.url + route, data=body, timeout=60)
    assert answer.status_code in (400, 404), answer.text[:300]
    assert len(answer.content) < 5000 and answer.json()["error"]["message"]
    assert requests.get(f"{endpoint.url}/healthz", timeout=10).status_code == 200


@pytest.mark.parametrize("text", ["a" * 12_000_000, "a b " * 3_000_000])
def test_a_huge_prompt_is_refused_without_counting_its_tokens(endpoint, text):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
    for route, body in (("completions", {"model": "tiny", "prompt": text}), ("chat/completions", chat)):
        began = time.process_time()
        error = requests.post(f"{endpoint.url}/v1/{route}", json=body, timeout=120).json()["error"]
        assert time.process_time() - began < 8  # to read it whole takes a minute
        assert error["code"] == "context_length_exceeded" and "Your prompt has at least" in error["message"]


def test_a_long_prompt_holds_nobody_up(endpoint):
    body = {
        "model": "tiny",
        "prompt": " " * 400_000,
    }  # spaces may be nothing, so they are counted, beside the others
    with ThreadPoolExecutor() as pool:
        began = time.monotonic()
        long = pool.submit(requests.post, f"{endpoint.url}/v1/completions", json=body, timeout=120)
        slowest, asked = 0.0, 0
        while not long.done():
            asked_at = time.monotonic()
            requests.get(f"{endpoint.url}/healthz", timeout=60)
            slowest, asked = max(slowest, time.monotonic() - asked_at), asked + 1
        took = time.monotonic() - began
        assert "Your prompt has 400000" in long.result().json()["error"]["message"]
    assert asked > 1 and slowest < max(0.5, took * 0.8)


def test_a_body_without_end_is_cut_off(endpoint):
    def endless():
        for _ in range(MAX_BODY_BYTES // 2**20 + 8):
            yield b" " * 2**20

    try:
        answer = requests.post(f"{endpoint.url}/v1/completions", data=endless(), timeout=60)
        assert answer.status_code == 413
    except requests.ConnectionError:
        pass  # the server hung up on us, as it may
    assert requests.get(f"{endpoint.url}/healthz", timeout=10).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS where none is
        b"GET /v1/models HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{",  # and then nothing
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"A" * 100_000,
        b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v1/models/%00%ff%2e%2e HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_what_is_no_http_ends_its_own_connection_only(endpoint, raw):
    with socket.create_connection(address(endpoint), timeout=5) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(5)
        try:
            while connection.recv(65536):
                pass
        except OSError:
            pass
    assert requests.get(f"{endpoint.url}/healthz", timeout=10).status_code == 200
    assert eventually(lambda: endpoint.catalogue.held == 0)


def test_strange_headers_and_keys(endpoint):
    for value in ("Bearer", "Bearer ", "Bearer \u00e9", "x" * 8000, "Basic YTpi"):
        answer = requests.get(
            f"{endpoint.url}/v1/models", headers={"authorization": value.encode("latin-1")}, timeout=10
        )
        assert answer.status_code == 200  # this endpoint asks for no keys


# slow readers and clients that vanish


def address(endpoint) -> tuple[str, int]:
    host, _, port = endpoint.url.removeprefix("http://").partition(":")
    return host, int(port)


def ask_raw(endpoint, body: dict[str, Any]) -> socket.socket:
    """A connection with a small buffer that has asked, and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address(endpoint))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def is_at_rest(engine: ScriptedEngine) -> bool:
    """Whether no token comes for a while."""
    before = engine.num_tokens
    time.sleep(0.5)
    return before > 0 and engine.num_tokens == before


def test_a_slow_reader_gets_all_of_its_answer_and_holds_nobody_up():
    engine = ScriptedEngine()
    body = {
        "model": "docs",
        "prompt": "a",
        "max_tokens": 400,
        "n": 16,
        "seed": 1,
        "stream": True,
        "logprobs": 20,
    }
    with listening(engine) as served:
        slow = ask_raw(served, body)
        assert eventually(lambda: is_at_rest(engine), timeout_s=30)
        assert 0 < engine.num_tokens < 16 * 400  # the generations wait with the reader: nothing piles up
        quick = requests.post(
            f"{served.url}/v1/completions",
            json={"model": "docs", "prompt": "b", "max_tokens": 20},
            timeout=20,
        )
        assert quick.status_code == 200
        slow.settimeout(30)
        data = bytearray()
        while b"[DONE]" not in data[-200:]:
            part = slow.recv(1 << 20)
            assert part
            data += part
        slow.close()
        assert eventually(lambda: served.catalogue.held == 0)
    lines = [line for line in data.decode().replace("\r\n", "\n").split("\n") if line.startswith("data: {")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    said = dict.fromkeys(range(16), "")
    for chunk in chunks:
        for choice in chunk["choices"]:
            said[choice["index"]] += choice["text"]
    assert said[0] == spoken("a", "docs@1", 1, 400) and said[15] == spoken("a", "docs@1", 16, 400)


def test_a_reader_that_takes_nothing_for_too_long_is_dropped(monkeypatch):
    from orchestrator.serve.routes import event_stream

    monkeypatch.setattr(event_stream.EventStream.__init__, "__defaults__", (0.5,))
    engine = ScriptedEngine()
    body = {"model": "docs", "prompt": "a", "max_tokens": 400, "n": 16, "stream": True, "logprobs": 20}
    with listening(engine) as served:
        stuck = ask_raw(served, body)
        assert eventually(lambda: engine.running > 0)
        assert eventually(lambda: (engine.running, served.catalogue.held) == (0, 0), timeout_s=15)
        assert engine.cancelled > 0
        stuck.close()


def test_clients_that_vanish_by_the_dozen_leave_nothing_behind():
    engine = ScriptedEngine(step_s=0.005)
    with listening(engine) as served:
        for number in range(60):
            body = {"model": "docs", "prompt": "a", "max_tokens": 400, "stream": number % 2 == 0, "n": 2}
            connection = ask_raw(served, body)
            if number % 3:
                time.sleep(random.Random(number).uniform(0, 0.05))
            connection.close()
        assert eventually(lambda: (engine.running, served.catalogue.held) == (0, 0), timeout_s=20)
        assert requests.get(f"{served.url}/healthz", timeout=10).status_code == 200


def test_thousands_of_requests_leak_neither_files_nor_memory():
    with listening(ScriptedEngine(end_after=3)) as served:
        connection = http.client.HTTPConnection(*address(served))

        def ask(count: int) -> None:
            for number in range(count):
                model = "docs" if number % 2 else f"nobody{number}"
                body = json.dumps({"model": model, "prompt": "a", "stream": number % 4 == 1})
                connection.request("POST", "/v1/completions", body)
                connection.getresponse().read()

        ask(300)
        files, memory = len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ask(1500)
        assert len(os.listdir("/proc/self/fd")) <= files + 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 20_000  # KiB
        connection.close()
