"""The header that says what a request asks for, around an application that writes down what reaches it."""

from __future__ import annotations

import asyncio
import json

import pytest
from ray.serve._private.constants import SERVE_MULTIPLEXED_MODEL_ID

from orchestrator.serve.proxy import asked_model
from orchestrator.serve.proxy.asked_model import HEADER, AskedModel


class Behind:
    """What stands behind the middleware."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.messages: list[str] = []

    async def __call__(self, scope, receive, send) -> None:
        self.headers = list(scope["headers"])
        while True:
            message = await receive()
            self.messages.append(message["type"])
            self.body += message.get("body", b"")
            if message["type"] != "http.request" or not message["more_body"]:
                return

    @property
    def model(self) -> str | None:
        return next((value.decode() for name, value in reversed(self.headers) if name == HEADER), None)


def sent(*parts: bytes, path="/tiny/v1/completions", method="POST", headers=(), pause_s=0.0, hangs_up=False):
    behind, left = Behind(), list(parts)

    async def receive():
        await asyncio.sleep(pause_s)
        if not left:
            return {"type": "http.disconnect"}
        return {
            "type": "http.request",
            "body": left.pop(0),
            "more_body": bool(left) or hangs_up,
        }

    async def send(message) -> None: ...

    async def run() -> None:
        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        await AskedModel(behind)(scope, receive, send)

    asyncio.run(run())
    return behind


def body(model: str, **more) -> bytes:
    return json.dumps({**more, "model": model}).encode()


@pytest.mark.parametrize("model", ["docs", "docs@2", "a:0.7+b:0.3", "Größe", 'with "quotes"'])
def test_the_bodys_model_becomes_serves_header(model):
    whole = body(model, prompt='say "model": "no", please', max_tokens=3)
    assert HEADER.decode() == SERVE_MULTIPLEXED_MODEL_ID
    behind = sent(whole)
    assert (behind.model, behind.body) == (model, whole)


def test_it_may_come_in_parts_and_all_of_them_pass():
    whole = body("docs", prompt="x" * 300_000)
    parts = [whole[at : at + 7001] for at in range(0, len(whole), 7001)]
    behind = sent(*parts)
    assert (behind.model, behind.body) == ("docs", whole) and len(behind.messages) == len(parts)
    cut = whole.index(b'"model"') + 4
    assert sent(whole[:cut], whole[cut:]).model == "docs"


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"nothing of JSON", b'{"model": 3}', b'{"model": ""}', b'{"model": "\\ud800"}',
     b'{"model": "a\\u0000b"}', b'{"model": "' + b"x" * 600 + b'"}'],
)  # fmt: skip
def test_a_body_without_one_passes_as_it_is(text):
    behind = sent(text)
    assert (behind.model, behind.body) == (None, text)


def test_what_a_client_says_himself_is_overruled():
    behind = sent(body("docs"), headers=[(b"serve_multiplexed_model_id", b"theirs"), (b"accept", b"*/*")])
    assert behind.model == "docs" and behind.headers[1] == (b"accept", b"*/*")


def test_a_body_that_is_too_long_or_too_late_goes_on_without(monkeypatch):
    monkeypatch.setattr(asked_model, "_MOST_BYTES", 1000)
    monkeypatch.setattr(asked_model, "_PATIENCE_S", 0.05)
    long = body("docs", prompt="x" * 3000)
    behind = sent(*[long[at : at + 500] for at in range(0, len(long), 500)])
    assert (behind.model, behind.body) == (None, long)
    late = sent(body("docs"), pause_s=0.2)
    assert (late.model, late.body) == (None, body("docs"))


def test_a_client_that_hangs_up_is_seen_by_whoever_comes_next():
    behind = sent(b'{"prompt": "a', hangs_up=True)
    assert behind.messages == ["http.request", "http.disconnect"] and behind.model is None


@pytest.mark.parametrize("more", [{"path": "/other/app"}, {"method": "GET"}, {"path": "/v1"}])
def test_other_requests_are_none_of_ours(more):
    behind = sent(body("docs"), **more)
    assert (behind.model, behind.body) == (None, body("docs"))
