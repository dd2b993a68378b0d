"""What a driver asks an endpoint over HTTP while it deploys and withdraws adapters."""

from __future__ import annotations

import time
from typing import Any

import requests

from ..keys import KeyBook
from ..registry import Registry
from .engines.heads import route_of

_POLL_S = 0.1


def followed_registry(url: str, timeout_s: float = 5) -> str | None:
    """The registry that an endpoint follows; None where none of ours answers."""
    try:
        answer = requests.get(f"{url}/healthz", timeout=timeout_s)
        return answer.json()["registry"] if answer.status_code == 200 else None
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return None


def authorization(registry: Registry) -> dict[str, str]:
    """The header of our own calls: a short-lived key, where keys are asked for."""
    keys = KeyBook(registry.url)
    return {} if keys.read().is_empty else {"Authorization": f"Bearer {keys.lend()}"}


# The least that can be asked of a task's route.
_LEAST: dict[str, dict[str, Any]] = {
    "SEQ_CLS": {"input": "a"},
    "TOKEN_CLS": {"input": "a"},
    "FEATURE_EXTRACTION": {"input": "a"},
    "QUESTION_ANS": {"question": "a", "context": "a"},
}


def probe(url: str, ref: str, task: str, headers: dict[str, str]) -> tuple[int | None, str, bool]:
    """HTTP status and message when the least is asked of `ref`, and whether that is a no. The status is None where
    nothing answers, or Serve's proxy alone: it does not know yet where a replica is that came this instant. An adapter
    that learned several tasks is asked as one for the first."""
    asked = _LEAST.get(task, {"prompt": "a", "max_tokens": 1, "temperature": 0})
    body: dict[str, Any] = {"model": ref, **asked}

    def ask(**more: Any) -> requests.Response:
        whole = {**body, **more}
        return requests.post(f"{url}{route_of(task)}", json=whole, headers=headers, timeout=(5, 600))

    try:
        answer = ask()
        if _wants_task(answer):
            answer = ask(task_id=0)
    except requests.RequestException as error:
        return None, str(error), False
    if not answer.headers.get("content-type", "").startswith("application/json"):
        return None, _message(answer), False
    return answer.status_code, _message(answer), not (answer.ok or _may_pass(answer))


def _wants_task(answer: requests.Response) -> bool:
    """Whether an adapter would answer if it were told which of its tasks is meant."""
    try:
        return answer.status_code == 400 and answer.json()["error"]["param"] == "task_id"
    except (ValueError, KeyError, TypeError):
        return False


def _may_pass(answer: requests.Response) -> bool:
    """Whether the same may be answered in a moment. A 503 without a code is an error of the storage, such as a file of
    the adapter that is damaged."""
    try:
        return answer.status_code == 429 or (
            answer.status_code == 503 and bool(answer.json()["error"]["code"])
        )
    except (ValueError, KeyError, TypeError):
        return False


def await_gone(url: str, refs: set[str], headers: dict[str, str], timeout_s: float = 15.0) -> None:
    """Waits until a running endpoint no longer lists versions; one that does not answer lists none."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            answer = requests.get(f"{url}/v1/models", headers=headers, timeout=5)
        except requests.RequestException:
            return
        if answer.status_code != 200 or not refs & {card["id"] for card in answer.json()["data"]}:
            return
        time.sleep(_POLL_S)


def await_alias(url: str, alias: str, ref: str, num_replicas: int, timeout_s: float = 15.0) -> None:
    """Waits until the replicas of a running endpoint know what an alias names: each looks every second."""
    deadline, knowing = time.monotonic() + timeout_s, 0
    while knowing < 3 * num_replicas - 2 and time.monotonic() < deadline:
        try:
            answer = requests.get(f"{url}/v1/models/{alias}", timeout=5)
            knows = answer.status_code == 200 and answer.json().get("root") == ref
        except (requests.RequestException, ValueError):
            return
        if answer.status_code in (401, 403):
            return  # it wants a key that this process does not have
        knowing = knowing + 1 if knows else 0
        time.sleep(0 if knows else _POLL_S)


def _message(answer: requests.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]
