"""The routes of task heads over HTTP, with the `openai` client where it has a call for them."""

from __future__ import annotations

import base64
import struct

import openai
import pytest
import requests

from orchestrator.serve.engines.heads import ROUTES
from tests.orchestrator.serve.scripted import ScriptedEngine, ScriptedHeads, eventually, listening


@pytest.fixture(scope="module", params=list(ROUTES))
def endpoint(request):
    with listening(ScriptedHeads(request.param)) as served:
        yield served


@pytest.fixture
def of(request):
    """An endpoint of one task."""
    with listening(ScriptedHeads(request.param)) as served:
        yield served


def ask(served, route, **body):
    return requests.post(f"{served.url}{route}", json={"model": "docs@1", **body}, timeout=60)


EMBEDDING, CLASSES, ENTITIES, ANSWERS = (ROUTES[task] for task in ROUTES)


# embeddings


@pytest.mark.parametrize("of", ["FEATURE_EXTRACTION"], indirect=True)
def test_embeddings_with_the_openai_client(of):
    with openai.OpenAI(base_url=f"{of.url}/v1", api_key="x") as client:
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = client.embeddings.create(model="docs", input=["abc", "defghij"], **options)
            assert [row.index for row in answer.data] == [0, 1] and answer.model == "docs@1"
            vectors = [row.embedding for row in answer.data]
            if options.get("encoding_format") == "base64":
                vectors = [list(struct.unpack("<3f", base64.b64decode(vector))) for vector in vectors]
            assert vectors == [pytest.approx([0.6, -0.8, count / 7], rel=1e-6) for count in (3, 7)]
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == 10
        with pytest.raises(openai.BadRequestError, match="'dimensions' is not supported here"):
            client.embeddings.create(model="docs", input="abc", dimensions=8)
        with pytest.raises(
            openai.BadRequestError, match="maximum context length is 60 tokens, and input 1 has 61"
        ):
            client.embeddings.create(model="docs", input=["a", "a" * 61])


@pytest.mark.parametrize("of", ["FEATURE_EXTRACTION"], indirect=True)
def test_inputs_of_every_form(of):
    for given, counts in [("abc", [3]), (["a", "bc"], [1, 2]), ([5, 6, 7], [3]), ([[5], [6, 7]], [1, 2])]:
        rows = ask(of, EMBEDDING, input=given).json()["data"]
        assert [round(row["embedding"][2] * 7) for row in rows] == counts
    for bad in ("", [], [""], [[]], [5, -1], [300], [5, "a"], {}, None, 7, [["a"]], ["a"] * 513):
        answer = ask(of, EMBEDDING, input=bad)
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("input"), bad


# the others


@pytest.mark.parametrize("of", ["SEQ_CLS"], indirect=True)
def test_classes_with_the_adapters_own_labels(of):
    answer = ask(of, CLASSES, input=["abc", {"text": "a", "text_pair": "bc"}], top_k=2)
    assert answer.headers["x-raypeft-adapter"] == "docs@1"
    first, second = answer.json()["data"]
    assert (first["label"], first["score"]) == ("docs@1", 0.7) and second["index"] == 1
    assert first["scores"] == [{"label": "docs@1", "score": 0.7}, {"label": "b", "score": 0.2}]
    assert ask(of, CLASSES, input="abc").json()["data"][0]["scores"][2] == {"label": "c", "score": 0.1}
    assert ask(of, CLASSES, input="abc", model="tiny").json()["data"][0]["label"] == "base"
    assert of.engine.asked[0] == ("docs@1", "docs@1") and of.engine.asked[-1] == (None, "tiny")


@pytest.mark.parametrize("of", ["TOKEN_CLS"], indirect=True)
def test_entities_with_their_places_in_the_text(of):
    row = ask(of, ENTITIES, input="see Ada and Bob").json()["data"][0]
    assert row["entities"] == [
        {"label": "NAME", "score": 0.9, "start": 4, "end": 7, "text": "Ada"},
        {"label": "NAME", "score": 0.9, "start": 12, "end": 15, "text": "Bob"},
    ]


@pytest.mark.parametrize("of", ["QUESTION_ANS"], indirect=True)
def test_answers_to_one_question_or_several(of):
    row = ask(of, ANSWERS, question="who?", context="Ada, Bob", top_k=2).json()["data"][0]
    assert [each["text"] for each in row["answers"]] == ["Ada", "da,"]
    several = [{"question": "who?", "context": "Ada"}, {"question": "when?", "context": "now"}]
    rows = ask(of, ANSWERS, input=several).json()["data"]
    assert [each["answers"][0]["text"] for each in rows] == ["Ada", "now"]
    bad = [{}, {"question": "a"}, {"context": "a"}, {"question": "a", "context": "b", "input": several}]
    for body in [*bad, {"question": "a", "input": several}, {"input": []}, {"question": "", "context": "b"}]:
        answer = ask(of, ANSWERS, **body)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", body


# all alike


def test_other_tasks_routes_say_where_to_ask(endpoint):
    own = ROUTES[endpoint.engine.task]
    for route in [*ROUTES.values(), "/v1/completions", "/v1/chat/completions"]:
        answer = ask(endpoint, route, input="abc", question="a")
        if route == own:
            assert answer.status_code in (200, 400)
            continue
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "wrong_task") and f"it answers {own}." in error[
            "message"
        ]


def test_a_base_that_generates_says_so():
    with listening(ScriptedEngine()) as served:
        for route in ROUTES.values():
            answer = ask(served, route, input="abc")
            assert (
                answer.status_code == 404
                and "it answers /v1/completions." in answer.json()["error"]["message"]
            )


def test_health_models_and_metrics_are_there(endpoint):
    ids = [card["id"] for card in requests.get(f"{endpoint.url}/v1/models").json()["data"]]
    assert ids == ["tiny", "docs@1", "slow@1"]
    assert requests.get(f"{endpoint.url}/healthz").status_code == 200
    assert "raypeft_batch_running" in requests.get(f"{endpoint.url}/metrics").text


def test_unknown_models_and_bad_bodies(endpoint):
    own = ROUTES[endpoint.engine.task]
    body = {"question": "a", "context": "b"} if own == ANSWERS else {"input": "abc"}
    assert ask(endpoint, own, **{**body, "model": "dogs"}).json()["error"]["code"] == "model_not_found"
    assert "unknown key" in ask(endpoint, own, **body, inptu="a").json()["error"]["message"].lower()
    assert requests.post(f"{endpoint.url}{own}", data=b"{").status_code == 400
    assert endpoint.catalogue.held == 0


def test_a_client_that_hangs_up_ends_the_work():
    heads = ScriptedHeads("SEQ_CLS", step_s=0.05)
    with listening(heads) as served:
        with pytest.raises(requests.Timeout):
            requests.post(
                f"{served.url}{CLASSES}", json={"model": "docs", "input": ["a"] * 200}, timeout=(5, 0.4)
            )
        assert eventually(lambda: (heads.running, heads.cancelled, served.catalogue.held) == (0, 1, 0))
