"""Asking an endpoint over plain HTTP; imports neither ray nor torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import requests

from .errors import ServeError
from .typed_ask import readable, route_and_body

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 600.0

Messages = Sequence[dict[str, str]]


def ask(
    url: str,
    model: str,
    question: str | Messages,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    key: str | None = None,
    context: str | None = None,
    task_id: int | None = None,
) -> str:
    """One answer's text; of a task's head, the answer in words.

    Args:
        url: the endpoint's API, http://HOST:PORT/BASE/v1.
        question: what the user says, or a whole conversation.
        key: where the endpoint asks for one.
        context: the text that answers the question, or the second of two texts, where the endpoint reads such.
        task_id: which is meant of the tasks that an adapter learned.

    Raises:
        ServeError: nothing answers there, or the endpoint refuses; the message is the endpoint's own.
    """
    if (said := _in_words(url, model, question, key, context, task_id)) is not None:
        return said
    body = {**_body(model, question, max_tokens, task_id), "temperature": temperature}
    with _post(url, body, key, stream=False) as response:
        try:
            return str(response.json()["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError) as error:
            raise ServeError(
                "this does not answer in OpenAI's form.", where=url, hint="Is it an endpoint's URL?"
            ) from error


def ask_stream(
    url: str,
    model: str,
    question: str | Messages,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    key: str | None = None,
    context: str | None = None,
    task_id: int | None = None,
) -> Iterator[str]:
    """The answer's text as it comes; see `ask`."""
    if (said := _in_words(url, model, question, key, context, task_id)) is not None:
        yield said
        return
    body = {**_body(model, question, max_tokens, task_id), "temperature": temperature, "stream": True}
    with _post(url, body, key, stream=True) as response:
        for line in response.iter_lines():
            data = line.removeprefix(b"data: ").strip()
            if not data or not line.startswith(b"data: "):
                continue
            if data == b"[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                raise ServeError(chunk["error"]["message"], where=url)
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    yield text


def ask_head(
    url: str,
    model: str,
    question: str,
    *,
    key: str | None = None,
    context: str | None = None,
    task_id: int | None = None,
) -> dict[str, Any] | None:
    """The row of a typed route's answer: labels, entities, spans or a vector; None where the endpoint generates.

    Raises:
        ServeError: as `ask`; the endpoint reads two texts and `context` is None.
    """
    asked = route_and_body(_task(url), question, context)
    if asked is None:
        return None
    route, body = asked
    with _post(
        url, {"model": model, **body, **_task_id(task_id)}, key, stream=False, route=route
    ) as response:
        try:
            return dict(response.json()["data"][0])
        except (ValueError, LookupError, TypeError) as error:
            raise ServeError(
                "this does not answer as our endpoints do.", where=url, hint="Is it an endpoint's URL?"
            ) from error


def _in_words(
    url: str,
    model: str,
    question: str | Messages,
    key: str | None,
    context: str | None,
    task_id: int | None,
) -> str | None:
    """What a task's head answers; None of an endpoint that generates, and of a conversation."""
    if not isinstance(question, str):
        return None
    row = ask_head(url, model, question, key=key, context=context, task_id=task_id)
    return None if row is None else readable(row)


def _task(url: str) -> str:
    """What an endpoint's base is loaded for; "" where it does not say."""
    try:
        response = requests.get(
            f"{url.rstrip('/').removesuffix('/v1')}/healthz", timeout=(_CONNECT_TIMEOUT_S, 60)
        )
        if response.status_code >= 500:
            _check(response, url)
        return str(response.json().get("task", "")) if response.status_code == 200 else ""
    except requests.RequestException as error:
        raise _silent(url) from error
    except (ValueError, AttributeError):
        return ""


def models(url: str, key: str | None = None) -> list[str]:
    """The names that an endpoint answers to.

    Raises:
        ServeError: nothing answers there.
    """
    try:
        response = requests.get(
            f"{url.rstrip('/')}/models", headers=_headers(key), timeout=(_CONNECT_TIMEOUT_S, 60)
        )
    except requests.RequestException as error:
        raise _silent(url) from error
    _check(response, url)
    return [card["id"] for card in response.json()["data"]]


def curl_line(
    url: str,
    model: str,
    question: str,
    *,
    max_tokens: int = 128,
    with_key: bool = False,
    task_id: int | None = None,
) -> str:
    """The shell line that asks the same; a key is read from the shell's RAYPEFT_API_KEY."""
    body = {**_body(model, question, max_tokens, task_id), "temperature": 0}
    address = shlex.quote(f"{url.rstrip('/')}/chat/completions")
    key = '-H "Authorization: Bearer $RAYPEFT_API_KEY" ' if with_key else ""
    return (
        f"curl -s {address} -H 'Content-Type: application/json' {key}"
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def _body(
    model: str, question: str | Messages, max_tokens: int, task_id: int | None = None
) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    return {"model": model, "messages": messages, "max_tokens": max_tokens, **_task_id(task_id)}


def _task_id(task_id: int | None) -> dict[str, Any]:
    return {} if task_id is None else {"task_id": task_id}


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _post(
    url: str, body: dict[str, Any], key: str | None, *, stream: bool, route: str = "chat/completions"
) -> requests.Response:
    try:
        response = requests.post(
            f"{url.rstrip('/')}/{route}",
            json=body,
            headers=_headers(key),
            stream=stream,
            timeout=(_CONNECT_TIMEOUT_S, _ANSWER_TIMEOUT_S),
        )
    except requests.RequestException as error:
        raise _silent(url) from error
    _check(response, url)
    return response


def _check(response: requests.Response, url: str) -> None:
    if response.status_code < 400:
        return
    try:
        said = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError) as error:
        said = f"HTTP {response.status_code}: {response.text[:300]}"
        if response.text.lstrip().startswith("<"):
            raise ServeError(
                f"a web page answers: HTTP {response.status_code}.",
                where=url,
                hint="Is it an endpoint's URL? List them: raypeft endpoints",
            ) from error
    hint = "Set RAYPEFT_API_KEY to a key of this endpoint." if response.status_code == 401 else None
    raise ServeError(said, where=url, hint=hint)


def _silent(url: str) -> ServeError:
    if not url.startswith(("http://", "https://")):
        return ServeError("this is not a URL.", where=url, hint="Write http://HOST:PORT/ENDPOINT/v1.")
    return ServeError("nothing answers.", where=url, hint="See what is up: raypeft endpoints")
