"""The OpenAI-compatible API of one endpoint, without Ray."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.serve.api_error import no_such_model
from tests.orchestrator.serve import tiny

CHAT = [{"role": "user", "content": "What is a list?"}]


def generated(base, prompt_ids, adapter=None, max_new_tokens=12, **more):
    """Transformers' own greedy text after the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.tensor([prompt_ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        **more,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def prompt_ids(base, text="def f("):
    return AutoTokenizer.from_pretrained(base)(text)["input_ids"]


def events(answer):
    """The data of a stream's events, the closing [DONE] checked and left out."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# greedy equals transformers


def test_the_base_answers_as_transformers_generates(served):
    assert served.text("tiny") == generated(served.base, prompt_ids(served.base))


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt"])
def test_an_adapter_answers_as_hf_peft_generates(served, method):
    version = served.register("a", method)
    served.deploy(version)
    expected = generated(served.base, prompt_ids(served.base), version.url)
    assert served.text("a@1") == expected
    assert expected != served.text("tiny")  # the adapter matters, or the test shows nothing


def test_adapters_of_several_methods_answer_in_turn_from_one_base(served):
    versions = [served.register(name, method) for name, method in zip("abc", tiny.CONFIGS, strict=True)]
    for version in versions:
        served.deploy(version)
    ids = prompt_ids(served.base)
    expected = {version.ref: generated(served.base, ids, version.url) for version in versions}
    expected["tiny"] = generated(served.base, ids)
    assert len(set(expected.values())) == 4
    for _ in range(2):
        for model, text in expected.items():
            assert served.text(model) == text


def test_chat_renders_the_bases_template(served):
    answer = served.client.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": CHAT, "max_tokens": 9, "temperature": 0}
    )
    text = "<|user|>What is a list?<|end|><|assistant|>"
    ids = AutoTokenizer.from_pretrained(served.base)(text)["input_ids"]
    reply = answer.json()
    assert reply["choices"][0]["message"]["content"] == generated(served.base, ids, max_new_tokens=9)
    assert reply["usage"]["prompt_tokens"] == len(ids)
    assert (reply["object"], reply["choices"][0]["message"]["role"]) == ("chat.completion", "assistant")


# the shape of answers


def test_a_completion_has_openais_form(served):
    reply = served.complete("tiny").json()
    assert reply["object"] == "text_completion" and reply["id"].startswith("cmpl-")
    assert reply["model"] == "tiny" and reply["choices"][0]["index"] == 0
    assert reply["choices"][0]["finish_reason"] in ("length", "stop")
    usage = reply["usage"]
    assert usage["prompt_tokens"] == len(prompt_ids(served.base))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_max_tokens_ends_with_length(served):
    reply = served.complete("tiny", max_tokens=3).json()
    assert reply["usage"]["completion_tokens"] == 3 and reply["choices"][0]["finish_reason"] == "length"


def test_the_end_token_ends_with_stop(served):
    """Of the random base's first tokens one is made the end token: then greedy decoding must stop there."""
    first = served.engine._base.generate(
        torch.tensor([prompt_ids(served.base)]), do_sample=False, max_new_tokens=4
    )[0, -1].item()
    served.engine._eos_ids = frozenset([first])
    reply = served.complete("tiny", max_tokens=12).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] <= 4


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text(served, stream):
    whole = served.text("tiny", max_tokens=30)
    stop = whole[8:10]
    answer = served.complete("tiny", max_tokens=30, stop=[stop, "never"], stream=stream)
    parts = events(answer) if stream else [answer.json()]
    text = "".join(part["choices"][0]["text"] for part in parts)
    assert text == whole[: whole.find(stop)]
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_streams_join_to_the_whole_text(served):
    whole = served.complete("tiny", max_tokens=40).json()
    chunks = events(
        served.complete("tiny", max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_a_chat_stream_begins_with_the_role_and_joins_to_the_whole(served):
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 20, "temperature": 0}
    whole = served.client.post("/v1/chat/completions", json=body).json()
    answer = served.client.post("/v1/chat/completions", json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


# sampling


def test_a_seed_repeats_a_sample_and_another_does_not(served):
    one, same, other = (served.text("tiny", temperature=1.5, seed=seed, max_tokens=30) for seed in (5, 5, 6))
    assert one == same != other


def test_choices_differ_and_a_seed_repeats_them_all(served):
    options = {"temperature": 1.5, "n": 3, "seed": 3, "max_tokens": 20}
    first, again = (served.complete("tiny", **options).json() for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert len(set(texts)) == 3 and [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert first["usage"]["completion_tokens"] <= 60


def test_a_tiny_top_p_is_greedy(served):
    assert served.text("tiny", temperature=1.0, top_p=1e-6) == served.text("tiny")


def test_prompts_may_be_lists_and_token_ids(served):
    ids = prompt_ids(served.base)
    one = served.text("tiny")
    assert served.text("tiny", prompt=ids) == one
    both = served.complete("tiny", prompt=["def f(", "class A"]).json()["choices"]
    assert [both[0]["text"], both[1]["index"]] == [one, 1]
    assert served.complete("tiny", prompt=[ids, ids]).json()["choices"][1]["text"] == one


def test_log_probabilities_are_those_of_the_adapted_model(served):
    version = served.register("docs")
    served.deploy(version)
    choice = served.complete("docs@1", logprobs=3, temperature=1.3, seed=4).json()["choices"][0]
    said, tokenizer = choice["logprobs"], AutoTokenizer.from_pretrained(served.base)
    prompt = prompt_ids(served.base)
    taken = [tokenizer(token)["input_ids"][0] for token in said["tokens"] if not token.startswith("bytes:")]
    assert len(taken) >= 4  # what is no text by itself ends the comparison
    count = next((at for at, token in enumerate(said["tokens"]) if token.startswith("bytes:")), len(taken))
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(served.base), version.url
    ).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + taken[:count]])).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    for at in range(count):
        assert said["token_logprobs"][at] == pytest.approx(expected[at, taken[at]].item(), abs=1e-4)
        best = expected[at].topk(3).values.tolist()
        assert sorted(said["top_logprobs"][at].values(), reverse=True) == pytest.approx(best, abs=1e-4)


# which model answers


def test_versions_aliases_and_bare_names(served):
    first, second = served.register("docs", seed=1), served.register("docs", seed=2)
    served.deploy(first)
    served.deploy(second)
    served.registry.set_alias("docs", 1, "production")
    served.registry.set_alias("docs", 2, "candidate")
    texts = {ref: served.text(ref) for ref in ("docs@1", "docs@2")}
    assert texts["docs@1"] != texts["docs@2"]
    for model, version in [("docs", 1), ("docs@production", 1), ("docs@candidate", 2)]:
        answer = served.complete(model)
        assert answer.headers["x-raypeft-adapter"] == f"docs@{version}" == answer.json()["model"]
        assert answer.json()["choices"][0]["text"] == texts[f"docs@{version}"]
    served.registry.set_alias("docs", 2, "production")
    assert served.complete("docs").headers["x-raypeft-adapter"] == "docs@2"  # at once, nothing reloaded
    assert served.complete("tiny").headers["x-raypeft-adapter"] == "tiny"


def test_models_lists_base_versions_and_aliases(served):
    served.deploy(served.register("docs"))
    served.registry.set_alias("docs", 1, "production")
    rows = served.client.get("/v1/models").json()
    assert rows["object"] == "list"
    by_id = {row["id"]: row for row in rows["data"]}
    assert list(by_id) == ["tiny", "docs@1", "docs@production", "docs"]
    assert by_id["docs@1"]["parent"] == "tiny" and by_id["docs"]["root"] == "docs@1"
    assert served.client.get("/v1/models/docs@1").json() == by_id["docs@1"]
    assert served.client.get("/v1/models/dogs").status_code == 404


def test_an_adapter_deployed_later_answers_without_a_restart(served):
    assert served.complete("docs@1").status_code == 404
    served.deploy(served.register("docs"))
    assert served.complete("docs@1").status_code == 200


def test_an_adapter_taken_away_is_unloaded(served):
    version = served.register("docs")
    served.deploy(version)
    served.text("docs@1")
    assert version.content_hash in served.engine.loaded()
    served.undeploy("docs@1")
    served.client.portal.call(served.catalogue.look)
    assert served.complete("docs@1").status_code == 404
    assert served.engine.loaded() == frozenset()
    assert served.text("tiny") == generated(served.base, prompt_ids(served.base))


def test_a_version_that_waited_takes_its_alias_when_it_answers(served):
    served.deploy(served.register("docs"), alias_when_live="production")
    assert served.registry.alias("docs", "production") is None
    served.text("docs@1")
    assert served.registry.alias("docs", "production") == 1
    assert served.registry.endpoint_state("tiny")["adapters"][0]["alias_when_live"] is None


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("dogs@1", "The model 'dogs@1' does not exist (closest: 'docs@1'). Here are: tiny, docs@1"),
        ("docs@7", "The model 'docs@7' does not exist (closest: 'docs@1')."),
        ("docs", "The model 'docs' has no version with the alias 'production'. Here are: tiny, docs@1"),
        ("docs@candidate", "The model 'docs@candidate' names version 2, which is not deployed here."),
        ("docs@2", "The model 'docs@2' does not exist (closest: 'docs@1')."),
        ("", "The model '' does not exist"),
        ("../../etc/passwd", "does not exist"),
        ("docs@1@2", "does not exist"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_a_404_in_openais_form(served, model, said, stream):
    served.deploy(served.register("docs", seed=1))
    served.register("docs", seed=2)
    served.registry.set_alias("docs", 2, "candidate")
    answer = served.complete(model, stream=stream)
    error = answer.json()["error"]
    assert answer.status_code == 404
    assert said in error["message"]
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        "model",
        "model_not_found",
    )


def test_an_adapter_of_another_base_is_refused(served, tmp_path):
    other = tiny.save_base(tmp_path / "other", seed=9)
    version = tiny.register(served.registry, "alien", other, tmp_path / "scratch")
    served.deploy(version)
    answer = served.complete("alien@1")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "base_mismatch"
    assert "was trained on other, another base than tiny" in answer.json()["error"]["message"]


def test_a_damaged_adapter_is_refused_and_harms_nobody(served):
    good, bad = served.register("good", seed=1), served.register("bad", seed=2)
    weights = f"{bad.url}/adapter_model.safetensors"
    with open(weights, "r+b") as file:
        file.truncate(100)
    served.deploy(good)
    served.deploy(bad)
    expected = generated(served.base, prompt_ids(served.base), good.url)
    assert served.text("good@1") == expected
    answer = served.complete("bad@1")
    assert answer.status_code >= 400 and "error" in answer.json()
    assert served.text("good@1") == expected
    assert served.text("tiny") == generated(served.base, prompt_ids(served.base))


# tasks


@pytest.mark.parametrize("method", ["poly", "multitask"])
def test_a_request_names_its_task(served, method):
    version = served.register("t", method)
    served.deploy(version)
    ids = prompt_ids(served.base)
    wanted = [generated(served.base, ids, version.url, task_ids=torch.tensor([task])) for task in range(3)]
    assert [served.text("t@1", task_id=task) for task in range(3)] == wanted
    assert len(set(wanted)) > 1
    chat = served.client.post(
        "/v1/chat/completions", json={"model": "t@1", "messages": CHAT, "max_tokens": 4, "task_id": 1}
    )
    assert chat.status_code == 200


def test_a_task_that_cannot_be_meant_is_a_400(served):
    for name, method in (("t", "poly"), ("one", "one task"), ("plain", "lora")):
        served.deploy(served.register(name, method))
    said = {
        ("t@1", None): (
            "The model 't@1' learned 3 tasks: say by 'task_id', from 0 to 2, which is meant.",
            "missing_required_parameter",
        ),
        ("t@1", 3): ("The model 't@1' learned 3 tasks, numbered from 0; 'task_id' is 3.", "invalid_value"),
        ("t@1", -1): (None, "invalid_value"),
        ("t@1", "1"): (None, "invalid_value"),
        ("plain@1", 0): (
            "The model 'plain@1' has no tasks to choose from. Leave 'task_id' out.",
            "invalid_value",
        ),
        ("tiny", 0): ("The model 'tiny' has no tasks to choose from. Leave 'task_id' out.", "invalid_value"),
    }
    for (model, task), (message, code) in said.items():
        answer = served.complete(model, **({} if task is None else {"task_id": task}))
        assert answer.status_code == 400, (model, task)
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("task_id", code), error
        assert message is None or error["message"] == message
    assert served.text("one@1") == served.text("one@1", task_id=0)


# bad requests


BAD = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": "12"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**30}, None),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a"] * 99}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt.1"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"logprobs": 99}, "logprobs"),
    ({"logprobs": "yes"}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"best_of": 4}, "best_of"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"tempratur": 1}, "tempratur"),
    ({"stream_options": {"x": 1}}, "stream_options.x"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=[json.dumps(change)[:40] for change, _ in BAD])
def test_a_bad_parameter_is_a_400_that_names_it(served, change, param):
    answer = (
        served.complete("tiny", **change)
        if "model" not in change
        else served.client.post("/v1/completions", json={"prompt": "a", **change})
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param:
        assert error["param"] == param
    assert served.text("tiny")  # the endpoint goes on


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stop": ["a"] * 99}, "Invalid 'stop': List should have at most 16 items"),
        ({"stop": "a" * 999}, "Invalid 'stop': String should have at most 256 characters"),
        ({"prompt": []}, "Invalid 'prompt': List should have at least 1 item"),
        ({"prompt": [[1], []]}, "Invalid 'prompt.1': List should have at least 1 item"),
        ({"prompt": 5}, "Invalid 'prompt': Input should be a valid string"),
    ],
    ids=str,
)
def test_what_may_be_of_several_types_is_refused_for_what_is_wrong_with_it(served, change, said):
    assert said in served.complete("tiny", **change).json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "The body is not JSON"),
        (b"{", "The body is not JSON"),
        (b"\xff\xfe", "The body is not JSON"),
        (b"[]", "The body must be a JSON object"),
        (b"null", "The body must be a JSON object"),
        (b'{"prompt": "a"}', "You must provide 'model'."),
        (b'{"model": "tiny"}', "You must provide 'prompt'."),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "temperature"),
        (
            b'{"model": "tiny", "prompt": "a", "tempratur": 1}',
            "Unknown key 'tempratur'; closest: 'temperature'.",
        ),
        (b'{"model": "tiny", "prompt": "a", "echo": true}', "'echo' is not supported here; leave it out."),
    ],
)
def test_a_bad_body_is_a_400(served, body, said):
    answer = served.client.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [{"role": "user"}],
        [{"role": "king", "content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "tool", "content": "the template refuses this"}],
    ],
)
def test_bad_messages_are_a_400(served, messages):
    answer = served.client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages")


def test_a_part_that_is_no_text_is_named(served):
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    messages = [{"role": "user", "content": parts}]
    answer = served.client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert answer.json()["error"]["message"] == "Invalid 'messages.0.content.1.type': Input should be 'text'."


def test_text_parts_are_joined(served):
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a list?"}],
        }
    ]
    both = [
        served.client.post(
            "/v1/chat/completions",
            json={"model": "tiny", "messages": messages, "max_tokens": 5, "temperature": 0},
        ).json()["choices"]
        for messages in (CHAT, parts)
    ]
    assert both[0] == both[1]


def test_neutral_and_harmless_keys_are_taken(served):
    answer = served.complete(
        "tiny", user="me", presence_penalty=0, frequency_penalty=0.0, logprobs=None, echo=False, logit_bias={}
    )
    assert answer.status_code == 200


def test_a_prompt_that_leaves_no_room_is_a_400(served):
    answer = served.complete("tiny", prompt="x" * 90, max_tokens=10)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
    assert error["message"] == (
        "This model's maximum context length is 96 tokens. Your prompt has 90 and you asked for 10 more. "
        "Shorten the prompt or lower max_tokens."
    )
    assert served.complete("tiny", prompt="x" * 90, max_tokens=6).status_code == 200


def test_virtual_tokens_take_their_part_of_the_context(served):
    served.deploy(served.register("soft", "prompt"))
    assert served.complete("soft@1", prompt="x" * 90, max_tokens=6).status_code == 400
    assert served.complete("soft@1", prompt="x" * 85, max_tokens=6).status_code == 200


def test_a_chat_without_max_tokens_fills_the_context_at_most(served):
    reply = served.client.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": CHAT, "temperature": 0}
    )
    usage = reply.json()["usage"]
    assert usage["total_tokens"] <= tiny.CONTEXT
    if reply.json()["choices"][0]["finish_reason"] == "length":
        assert usage["total_tokens"] == tiny.CONTEXT


def test_unknown_paths_and_methods_are_errors_in_openais_form(served):
    missing, wrong = served.client.get("/v1/modles"), served.client.get("/v1/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert "Closest: /v1/models." in missing.json()["error"]["message"]
    assert "does not take GET" in wrong.json()["error"]["message"] and wrong.headers["allow"] == "POST"
    # a redirect would lose the endpoint's name
    slash = served.client.post("/tiny/v1/completions/", json={}, follow_redirects=False)
    assert slash.status_code == 404 and "Closest: /v1/completions." in slash.json()["error"]["message"]


def test_an_error_names_no_more_models_than_one_reads():
    few, many = (
        no_such_model("x", "does not exist", [f"a@{number}" for number in range(size)]) for size in (20, 512)
    )
    assert few.message.endswith("a@18, a@19.")
    assert many.message.endswith("a@18, a@19 and 492 more (GET /v1/models).")


# paths


def test_it_answers_below_its_name_and_alone_also_below_v1(served):
    for prefix in ("", "/tiny"):
        assert served.client.get(f"{prefix}/v1/models").status_code == 200
        assert served.client.get(f"{prefix}/healthz").json() == {
            "status": "ok",
            "task": "CAUSAL_LM",
            "base": "tiny",
            "registry": None,
        }
    assert served.client.get("/other/v1/models").status_code == 404


def test_with_a_second_endpoint_v1_alone_names_none(served):
    served.others.append("zebra")
    answer = served.client.get("/v1/models")
    assert answer.status_code == 404
    assert "Use one of /tiny/v1, /zebra/v1." in answer.json()["error"]["message"]
    assert served.client.get("/tiny/v1/models").status_code == 200


# the engine's end


def test_a_dead_engine_is_seen_by_health_and_requests(served):
    def die() -> None:
        raise SystemExit("out of memory")

    served.engine._submit(
        type("Task", (), {"run": staticmethod(die), "fail": staticmethod(lambda e: None)})()
    )
    served.engine._thread.join(5)
    assert served.client.get("/healthz").status_code == 503
    for stream in (False, True):
        answer = served.complete("tiny", stream=stream)
        assert answer.status_code == 503
        assert (
            answer.json()["error"]["message"] == "The engine has stopped; a new one is on its way. Try again."
        )
