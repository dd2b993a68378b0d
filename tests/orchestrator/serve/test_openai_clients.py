"""The `openai` client and plain curl against an endpoint on a real port."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess

import openai
import pytest
import requests

from tests.orchestrator.serve.scripted import (
    ScriptedEngine,
    eventually,
    is_logprob,
    listening,
    spoken,
)

CHAT = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def endpoint():
    with listening() as served:
        yield served


@pytest.fixture
def client(endpoint):
    with openai.OpenAI(base_url=f"{endpoint.url}/tiny/v1", api_key="none", max_retries=0) as made:
        yield made


# whole answers


def test_a_completion(client):
    answer = client.completions.create(model="docs@1", prompt="def f(", max_tokens=9, seed=5)
    assert answer.choices[0].text == spoken("def f(", "docs@1", 5, 9)
    assert (answer.choices[0].finish_reason, answer.model) == ("length", "docs@1")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        6,
        9,
        15,
    )
    assert answer.system_fingerprint.startswith("fp_")


def test_a_chat_completion(client):
    answer = client.chat.completions.create(model="docs", messages=CHAT, max_completion_tokens=7, seed=1)
    text = spoken("<|user|>What is a list?<|end|><|assistant|>", "docs@1", 1, 7)
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"


def test_an_answers_own_message_goes_back_among_the_next_ones(client):
    """As clients keep a conversation: with the keys that an answer has and that say nothing."""
    asked = {"model": "docs", "max_tokens": 7, "seed": 1}
    said = client.chat.completions.create(**asked, messages=CHAT).choices[0].message
    more = {"role": "user", "content": "And a dict?"}
    plain = {"role": "assistant", "content": said.content}
    expected = client.chat.completions.create(**asked, messages=[*CHAT, plain, more]).choices[0].message
    for kept in (said, said.model_dump(), {**plain, "tool_calls": [], "annotations": []}):
        answer = client.chat.completions.create(**asked, messages=[*CHAT, kept, more])
        assert answer.choices[0].message.content == expected.content
    with pytest.raises(openai.BadRequestError, match=r"messages\.1\.tool_calls"):
        client.chat.completions.create(
            **asked, messages=[*CHAT, {**plain, "tool_calls": [{"id": "1"}]}, more]
        )


def test_the_fingerprint_tells_versions_apart(client):
    prints = [
        client.completions.create(model=model, prompt="a", max_tokens=1).system_fingerprint
        for model in ("tiny", "docs@1", "docs", "tiny")
    ]
    assert prints[0] == prints[3] and prints[1] == prints[2] and prints[0] != prints[1]


def test_the_fingerprint_tells_how_the_base_is_kept():
    prints = set()
    for kept_as in ("None False", "nf4 False", "None True", "None False"):
        with listening(kept_as=kept_as) as served:
            asked = {"model": "docs", "prompt": "a", "max_tokens": 1}
            answer = requests.post(f"{served.url}/v1/completions", json=asked, timeout=30).json()
            prints.add(answer["system_fingerprint"])
    assert len(prints) == 3


def test_the_version_that_answered_is_in_a_header(client):
    for stream in (False, True):
        raw = client.completions.with_raw_response.create(
            model="docs", prompt="a", max_tokens=2, stream=stream
        )
        assert raw.headers["x-raypeft-adapter"] == "docs@1"


def test_choices_of_several_prompts_come_in_openais_order_and_run_at_once():
    engine = ScriptedEngine(step_s=0.02)
    with listening(engine) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        answer = client.completions.create(model="tiny", prompt=["ab", "cd"], n=3, max_tokens=10, seed=3)
    assert [choice.index for choice in answer.choices] == list(range(6))
    expected = [spoken(prompt, None, 3 + at, 10) for at, prompt in enumerate(["ab"] * 3 + ["cd"] * 3)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 60 and answer.usage.prompt_tokens == 4
    assert engine.most_running == 6


def test_stop(client):
    whole = spoken("a", None, 4, 60)
    stop = whole[20:23]
    answer = client.completions.create(model="tiny", prompt="a", max_tokens=60, seed=4, stop=stop)
    assert answer.choices[0].text == whole[: whole.find(stop)] and answer.choices[0].finish_reason == "stop"


# log-probabilities


def test_logprobs_of_a_completion(client):
    answer = client.completions.create(model="tiny", prompt="a", max_tokens=6, seed=4, logprobs=3)
    said = answer.choices[0].logprobs
    assert "".join(said.tokens) == answer.choices[0].text
    assert said.text_offset == [0, 1, 2, 3, 4, 5] and all(map(is_logprob, said.token_logprobs))
    assert [len(top) for top in said.top_logprobs] == [3] * 6
    assert all(token in top for token, top in zip(said.tokens, said.top_logprobs, strict=True))


def test_logprobs_of_a_chat(client):
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=5, seed=2, logprobs=True, top_logprobs=2
    )
    said = answer.choices[0].logprobs.content
    assert "".join(each.token for each in said) == answer.choices[0].message.content
    assert all(bytes(each.bytes).decode() == each.token for each in said)
    assert [len(each.top_logprobs) for each in said] == [2] * 5 and said[0].top_logprobs[0].token == said[
        0
    ].token


def test_without_logprobs_there_are_none(client):
    completion = client.completions.create(model="tiny", prompt="a", max_tokens=2)
    chat = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=2)
    assert completion.choices[0].logprobs is None and chat.choices[0].logprobs is None


@pytest.mark.parametrize("num", [0, 2])
def test_streams_have_the_same_logprobs_as_whole_answers(client, num):
    asked = {
        "model": "tiny",
        "messages": CHAT,
        "max_tokens": 8,
        "seed": 2,
        "logprobs": True,
        "top_logprobs": num,
    }
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    parts = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part] == whole

    asked = {"model": "tiny", "prompt": "a", "max_tokens": 8, "seed": 2, "logprobs": num}
    said = client.completions.create(**asked).choices[0].logprobs
    parts = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
    ]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in parts for value in getattr(part, key)] == getattr(said, key)


def test_the_end_token_and_what_a_stop_cut_off_have_no_logprobs():
    with (
        listening(ScriptedEngine(end_after=5)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as client,
    ):
        ended = client.completions.create(model="tiny", prompt="a", max_tokens=9, seed=1, logprobs=0).choices[
            0
        ]
        assert ended.finish_reason == "stop" and len(ended.logprobs.tokens) == 5
        stop = ended.text[2:4]
        cut = client.completions.create(model="tiny", prompt="a", max_tokens=9, seed=1, logprobs=0, stop=stop)
        assert "".join(cut.choices[0].logprobs.tokens) == cut.choices[0].text == ended.text[:2]


# streams


def test_a_stream_joins_to_the_whole(client):
    asked = {"model": "docs", "messages": CHAT, "max_tokens": 20, "seed": 6}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
        == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_choices_of_a_stream_come_mixed_and_whole():
    with (
        listening(ScriptedEngine(step_s=0.01)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as client,
    ):
        texts, order = {0: "", 1: "", 2: ""}, []
        for chunk in client.chat.completions.create(
            model="tiny", messages=CHAT, n=3, max_tokens=12, seed=9, stream=True
        ):
            choice = chunk.choices[0]
            texts[choice.index] += choice.delta.content or ""
            order.append(choice.index)
    prompt = "<|user|>What is a list?<|end|><|assistant|>"
    assert texts == {at: spoken(prompt, None, 9 + at, 12) for at in range(3)}
    assert order != sorted(order)  # one after the other would be sorted


def test_the_stream_helper_and_the_async_client_work():
    async def ask(url):
        async with openai.AsyncOpenAI(base_url=url, api_key="x") as client:
            answers = [client.completions.create(model="docs", prompt=f"{at}", seed=at) for at in range(8)]
            return [answer.choices[0].text for answer in await asyncio.gather(*answers)]

    with (
        listening(ScriptedEngine(end_after=6)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as client,
    ):
        with client.chat.completions.stream(model="tiny", messages=CHAT, seed=1) as stream:
            events = [event.type for event in stream]
            final = stream.get_final_completion()
        assert asyncio.run(ask(f"{served.url}/v1")) == [spoken(f"{at}", "docs@1", at, 6) for at in range(8)]
    assert "content.delta" in events
    assert final.choices[0].message.content == spoken(
        "<|user|>What is a list?<|end|><|assistant|>", None, 1, 6
    )


# errors


def test_errors_are_the_clients_own_classes(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="dogs", prompt="a")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="tiny", prompt="a", temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512"):
        client.completions.create(model="tiny", prompt="a" * 513)
    with pytest.raises(openai.BadRequestError, match="'echo' is not supported here; leave it out"):
        client.completions.create(model="tiny", prompt="a", echo=True)


def test_an_engine_that_dies_is_a_503_or_an_event_of_the_stream():
    engine = ScriptedEngine()
    engine.fails_at = 3
    with (
        listening(engine) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError) as whole:
            client.completions.create(model="tiny", prompt="a", max_tokens=9)
        assert whole.value.status_code == 503 and whole.value.response.headers["retry-after"] == "2"
        said = []
        with pytest.raises(openai.APIError, match="The engine has stopped"):
            for chunk in client.completions.create(
                model="tiny", prompt="a", max_tokens=9, seed=1, stream=True
            ):
                said.append(chunk.choices[0].text)
        assert "".join(said) == spoken("a", None, 1, 3)
        engine.fails_at = 0  # before the first token a stream is no stream yet
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt="a", stream=True)
        assert (served.catalogue.held, engine.running) == (0, 0)


def test_the_client_retries_by_itself_what_a_dead_engine_refused():
    engine = ScriptedEngine()
    engine.fails_at = 2

    def heal(request) -> None:
        if len(engine.asked) == 1:
            engine.fails_at = None

    http = openai.DefaultHttpx2Client if hasattr(openai, "DefaultHttpx2Client") else openai.DefaultHttpxClient
    with (
        listening(engine) as served,
        openai.OpenAI(
            base_url=f"{served.url}/v1", api_key="x", http_client=http(event_hooks={"request": [heal]})
        ) as client,
    ):
        answer = client.completions.create(model="tiny", prompt="a", max_tokens=5, seed=1)
    assert answer.choices[0].text == spoken("a", None, 1, 5) and len(engine.asked) == 2


# clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_generation(stream):
    engine = ScriptedEngine(step_s=0.05)
    with listening(engine) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0, timeout=0.5)
        if stream:
            chunks = client.completions.create(model="docs", prompt="a", max_tokens=400, n=2, stream=True)
            next(iter(chunks))
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(model="docs", prompt="a", max_tokens=400, n=2)
        client.close()
        assert eventually(lambda: engine.running == 0 and engine.cancelled == 2)
        assert eventually(lambda: served.catalogue.held == 0)
        assert engine.num_tokens < 100


# curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="this machine has no curl")
def test_curl_asks_whole_and_streamed(endpoint):
    def curl(body, *options):
        command = ["curl", "-sS", *options, f"{endpoint.url}/v1/completions", "-d", json.dumps(body)]
        headers = ["-H", "Content-Type: application/json"]
        return subprocess.run(
            [*command, *headers], capture_output=True, text=True, timeout=60, check=True
        ).stdout

    body = {"model": "docs@1", "prompt": "é", "max_tokens": 4, "seed": 1}
    expected = spoken("é", "docs@1", 1, 4)
    assert json.loads(curl(body))["choices"][0]["text"] == expected
    head, _, stream = curl({**body, "stream": True}, "-N", "-i").replace("\r\n", "\n").partition("\n\n")
    assert "content-type: text/event-stream" in head and "x-raypeft-adapter: docs@1" in head
    lines = stream.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]) == expected
    error = json.loads(curl({**body, "model": "dogs"}))["error"]
    assert (error["code"], error["type"]) == ("model_not_found", "invalid_request_error")
