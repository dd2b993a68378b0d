"""Tokens and refusals: what is sent, and what a user reads when a cluster does not play along."""

import socket
import time

import pytest

from orchestrator import local_ray
from orchestrator.errors import ClusterError
from orchestrator.submit.dashboard import Dashboard, Token, find_token

from .stub import dashboard

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No token but those that a test sets; a home without one."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(local_ray.ATTACHED, raising=False)
    monkeypatch.setattr(local_ray, "_set_aside", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def message(stub, path="/api/version") -> str:
    with pytest.raises(ClusterError) as caught:
        Dashboard(stub.url).get(path)
    return str(caught.value)


def test_the_token_is_sent_as_bearer_and_only_where_there_is_one(environment):
    with dashboard({"/api/version": {"version": "4"}}) as stub:
        assert Dashboard(stub.url).get("/api/version") == {"version": "4"}
        environment.setenv("RAY_AUTH_TOKEN", TOKEN)
        Dashboard(stub.url).get("/api/version")
    assert [headers.get("Authorization") for _, _, headers, _ in stub.requests] == [None, f"Bearer {TOKEN}"]


def test_tokens_are_found_as_ray_finds_them(environment, tmp_path):
    address = "http://head.invalid:8265"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("usual\n")
    assert find_token(address) is None  # the mode is off: another cluster's token is not shown around
    environment.setenv("RAY_AUTH_MODE", "token")
    assert find_token(address).value == "usual"
    (tmp_path / "named").write_text("named\n")
    environment.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert find_token(address).value == "named"
    environment.setenv("RAY_AUTH_TOKEN", "given")
    assert find_token(address).value == "given"
    environment.setenv("RAY_AUTH_MODE", "disabled")
    assert find_token(address) is None


def test_a_token_file_that_is_absent_is_named(environment):
    environment.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(ClusterError) as caught:
        Dashboard("http://head.invalid:8265")
    assert "RAY_AUTH_TOKEN_PATH: the token file '/nowhere/token' cannot be read" in str(caught.value)


def test_a_token_shows_in_no_representation():
    assert TOKEN not in repr(Token(TOKEN, "RAY_AUTH_TOKEN"))


def test_401_asks_for_a_token_and_403_says_whose_was_refused(environment):
    with dashboard({"/api/version": (401, "Unauthorized")}) as stub:
        assert f"{stub.url}: the cluster asks for a token. Set RAY_AUTH_MODE=token and" in message(stub)
        environment.setenv("RAY_AUTH_TOKEN", TOKEN)
        stub.answers["/api/version"] = (403, "Forbidden")
        said = message(stub)
    assert "the cluster refuses the token from RAY_AUTH_TOKEN." in said
    assert TOKEN not in said


def test_other_codes_come_with_their_last_line():
    with dashboard({"/api/version": (500, "Traceback\n  ...\nValueError: no room")}) as stub:
        assert "the cluster answered 500: ValueError: no room" in message(stub)


def test_something_else_at_the_address_is_told_apart():
    with dashboard({"/api/version": (200, "<html>hello</html>")}) as stub:
        assert "something answers there, but it is not a Ray dashboard." in message(stub)


def test_404_is_nothing():
    with dashboard({}) as stub:
        assert Dashboard(stub.url).get("/api/jobs/none") is None


def test_a_port_that_is_closed_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ClusterError) as caught:
        Dashboard(address).get("/api/version")
    assert f"{address}: the cluster does not answer (Connection refused). Is it up" in str(caught.value)


def test_a_listener_that_is_silent_is_given_up_within_seconds():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        started = time.monotonic()
        with pytest.raises(ClusterError, match="the cluster does not answer \\(timed out\\)"):
            Dashboard(f"http://127.0.0.1:{deaf.getsockname()[1]}").get("/api/version", timeout_s=0.5)
        assert time.monotonic() - started < 5  # 0.5 s asked for; the rest is room for a busy machine


def test_a_proxy_is_not_asked_for_loopback(environment):
    environment.setenv("http_proxy", "http://127.0.0.1:9")
    with dashboard({"/api/version": {}}) as stub:
        assert Dashboard(stub.url).get("/api/version") == {}
