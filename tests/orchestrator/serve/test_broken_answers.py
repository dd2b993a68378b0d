"""The wrapper of Serve's proxy, around applications that break off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from orchestrator.local_ray import READABLE_ERRORS
from orchestrator.serve.proxy.asked_model import AskedModel
from orchestrator.serve.proxy.broken_answers import CALLBACK, CALLBACK_VARIABLE, WholeAnswers, middlewares
from orchestrator.serve.proxy.waking import Waking

PATHS = ["/v1/completions", "/tiny/v1/chat/completions", "/tiny/v1/embeddings"]


def client(*messages, error: Exception | None = None) -> TestClient:
    async def app(scope, receive, send):
        for message in messages:
            await send(message)
        if error:
            raise error

    return TestClient(WholeAnswers(app), raise_server_exceptions=False)


def start(status=200, kind=b"application/json", **headers):
    named = [(b"content-type", kind), *((key.encode(), value) for key, value in headers.items())]
    return {"type": "http.response.start", "status": status, "headers": named}


def body(data: bytes, more: bool = False):
    return {"type": "http.response.body", "body": data, "more_body": more}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "broken",
    [
        {"messages": []},
        {"messages": [], "error": RuntimeError("the actor died")},
        {"messages": [start(500, b"text/plain"), body(b"Traceback: ActorDiedError")]},
        {"messages": [start(503, b"text/plain; charset=utf-8"), body(b"unavailable")]},
    ],
)
def test_an_answer_that_never_began_is_a_503_in_openais_form(path, broken):
    answer = client(*broken["messages"], error=broken.get("error")).post(path)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "replica_gone" and "Traceback" not in answer.text


def test_a_full_proxy_is_a_429():
    answer = client(start(429, b"text/plain"), body(b"busy")).post("/v1/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")


@pytest.mark.parametrize("error", [None, RuntimeError("gone")])
def test_a_stream_that_breaks_off_ends_with_an_error_event(error):
    stream = start(kind=b"text/event-stream; charset=utf-8")
    answer = client(stream, body(b'data: {"a":1}\n\ndata: {"b', more=True), error=error).post(
        "/v1/completions"
    )
    parts = answer.text.split("\n\n")
    assert parts[0] == 'data: {"a":1}' and parts[-2] == "data: [DONE]"
    assert json.loads(parts[-3].removeprefix("data: "))["error"]["code"] == "replica_gone"


@pytest.mark.parametrize(
    "messages",
    [
        [start(200), body(b"{}")],
        [start(503), body(b'{"error": {}}')],
        [start(500), body(b'{"error": {}}')],
        [start(404, b"text/plain"), body(b"no")],
        [
            start(200, b"text/event-stream"),
            body(b"data: 1\n\n", True),
            body(b"data: [DONE]\n\n", True),
            body(b""),
        ],
    ],
)
def test_whole_answers_pass_untouched(messages):
    answer = client(*messages).post("/v1/completions")
    assert answer.status_code == messages[0]["status"]
    assert answer.content == b"".join(message["body"] for message in messages[1:])


def test_other_paths_are_none_of_ours():
    answer = client(start(500, b"text/plain"), body(b"theirs")).get("/other/app")
    assert (answer.status_code, answer.text) == (500, "theirs")


def test_serve_is_told_to_load_it():
    assert READABLE_ERRORS == {CALLBACK_VARIABLE: CALLBACK}
    assert (
        f"{CALLBACK_VARIABLE}={CALLBACK}" in (Path(__file__).parents[3] / "clusters/Dockerfile").read_text()
    )
    assert [each.cls for each in middlewares()] == [AskedModel, Waking, WholeAnswers]
