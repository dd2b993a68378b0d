"""Asking over plain HTTP, against a small server that notes what it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestrator.ask import ask, ask_stream, curl_line, models
from orchestrator.errors import ServeError

QUESTION = 'What\'s "a list"?\n$HOME `id` \\ 日本'


class Endpoint(BaseHTTPRequestHandler):
    """Answers with the question turned around."""

    def do_GET(self) -> None:
        self._send({"data": [{"id": "tiny"}, {"id": "docs@1"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        if body["model"] == "nobody":
            self._send({"error": {"message": "The model 'nobody' does not exist."}}, 404)
            return
        if body["model"] == "proxy":
            self._send("not json", 502)
            return
        text = body["messages"][-1]["content"][::-1]
        if not body.get("stream"):
            self._send({"choices": [{"message": {"content": text}}]})
            return
        self.send_response(200)
        self.end_headers()
        for chunk in [{"role": "assistant"}, *({"content": letter} for letter in text)]:
            self.wfile.write(f"data: {json.dumps({'choices': [{'delta': chunk}]})}\n\n".encode())
        if body["model"] == "breaks":
            self.wfile.write(b'data: {"error": {"message": "The answer broke off."}}\n\n')
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, data, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data.encode() if isinstance(data, str) else json.dumps(data).encode())

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_port}/tiny/v1"


def test_ask_gives_the_text(server, url):
    assert ask(url, "docs@1", QUESTION, max_tokens=7) == QUESTION[::-1]
    assert server.seen == [
        {
            "model": "docs@1",
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 7,
            "temperature": 0.0,
        }
    ]


def test_a_conversation_is_sent_as_it_is(server, url):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "abc"}]
    assert ask(url + "/", "tiny", talk) == "cba"
    assert server.seen[0]["messages"] == talk


def test_a_stream_gives_its_pieces(url):
    assert list(ask_stream(url, "tiny", "abc")) == ["c", "b", "a"]


def test_a_stream_that_breaks_off_is_an_error(url):
    with pytest.raises(ServeError, match="The answer broke off"):
        list(ask_stream(url, "breaks", "abc"))


def test_models_are_listed(url):
    assert models(url) == ["tiny", "docs@1"]


def test_the_endpoints_own_message_is_raised(url):
    with pytest.raises(ServeError) as raised:
        ask(url, "nobody", "a")
    assert str(raised.value) == f"{url}: The model 'nobody' does not exist."


def test_an_answer_that_is_no_endpoints_is_said(url):
    with pytest.raises(ServeError) as raised:
        ask(url, "proxy", "a")
    assert str(raised.value) == f"{url}: HTTP 502: not json"


def test_where_nothing_answers_the_next_step_is_named():
    with pytest.raises(ServeError) as raised:
        ask("http://127.0.0.1:9/v1", "tiny", "a")
    assert str(raised.value) == "http://127.0.0.1:9/v1: nothing answers. See what is up: raypeft endpoints"


def test_the_curl_line_asks_the_same_from_a_shell(server, url):
    line = curl_line(url, "docs@1", QUESTION, max_tokens=7)
    assert "\n" not in line
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer)["choices"][0]["message"]["content"] == QUESTION[::-1]
    ask(url, "docs@1", QUESTION, max_tokens=7)
    assert server.seen[0] == server.seen[1]


def test_asking_needs_neither_ray_nor_torch():
    code = "import sys, orchestrator.ask; print(*{'ray', 'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == []


# heads


class Head(BaseHTTPRequestHandler):
    """An endpoint of one task: `/healthz` names it, its route answers one row."""

    def do_GET(self) -> None:
        assert self.path == "/tiny/healthz"
        self._send({"task": self.server.task})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        self._send({"data": [self.server.row]})

    _send, log_message = Endpoint._send, Endpoint.log_message


SCORES = [{"label": f"l{number}", "score": 0.5 / (1 + number)} for number in range(7)]
FOUND = {"label": "NAME", "score": 0.9, "start": 4, "end": 7, "text": "Ada"}
HEADS = {
    "SEQ_CLS": (
        "classify", {"input": "q"}, {"object": "classification", "scores": SCORES},
        "l0  0.500\nl1  0.250\nl2  0.167\nl3  0.125\nl4  0.100",
    ),
    "TOKEN_CLS": (
        "token-classify", {"input": "q"}, {"object": "token_classification", "entities": [FOUND]}, "NAME  0.900  Ada",
    ),
    "FEATURE_EXTRACTION": (
        "embeddings", {"input": "q"}, {"object": "embedding", "embedding": [0.5, -0.25]}, "2 numbers: 0.5000 -0.2500",
    ),
    "QUESTION_ANS": (
        "question-answering", {"question": "q", "context": "see Ada"},
        {"object": "question_answering", "answers": [FOUND]}, "Ada  (0.900, characters 4 to 7)",
    ),
}  # fmt: skip


@pytest.fixture
def head():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Head)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("task", HEADS)
def test_an_endpoint_that_does_not_generate_is_asked_on_its_route_and_read_in_words(head, task):
    route, body, head.row, said = HEADS[task]
    head.task, url = task, f"http://127.0.0.1:{head.server_address[1]}/tiny/v1"
    context = "see Ada" if task == "QUESTION_ANS" else None
    assert ask(url, "docs", "q", context=context) == said
    assert list(ask_stream(url, "docs", "q", context=context)) == [said]
    assert head.seen == [(f"/tiny/v1/{route}", {"model": "docs", **body})] * 2


def test_what_a_question_lacks_is_said(head):
    url = f"http://127.0.0.1:{head.server_address[1]}/tiny/v1"
    head.task = "QUESTION_ANS"
    with pytest.raises(ServeError, match="--context"):
        ask(url, "docs", "q")
    head.task, head.row = "SEQ_CLS", HEADS["SEQ_CLS"][2]
    ask(url, "docs", "q", context="second")
    assert head.seen[-1][1]["input"] == {"text": "q", "text_pair": "second"}
