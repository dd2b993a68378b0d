"""A load on an endpoint from many kinds of clients at once, while everything under it changes; and who may say of its
answers that they were right.

`References` are transformers' and HF PEFT's own answers, made before. `Load` asks, and notes what came, when.
`Timeline` notes what was done meanwhile. `judge` compares them all, and knows nothing of the server.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import peft
import requests
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

PROMPTS = ("def f(", "for x in", "class A:", "import os")
LEAST, LONGEST = 4, 64
"""Tokens of the shortest and the longest answers."""
CLEAR = 1e-4
"""How far each token's logit stands above all others': sums in another order, as beside others in a batch, move it by
a hundredth of this."""
Tokens = dict[tuple[str, str], list[int]]
"""(completions | chat, prompt) -> the answer's."""
STALE_S = 5.0
"""So long after an alias was moved, answers may still be of the version that it named before."""
DETECTED_S = 2.0
"""A replica's death is known to all that send it requests after this."""
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Asked:
    """One request."""

    way: str
    """raw | raw-stream | openai | openai-stream | chat: the last three through the `openai` client."""
    model: str
    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What came of it."""

    asked: Asked
    sent: float
    ended: float
    status: int
    adapter: str | None = None
    """The version in the response's header."""
    text: str = ""
    models: frozenset[str] = frozenset()
    """What the answer's own objects say."""
    error: Mapping[str, Any] | None = None
    """OpenAI's error object: of the whole response, or of an event in a stream."""
    retry_after: str | None = None
    is_whole: bool = False
    """Whether it ended as an answer ends: a body that is JSON, a stream's `[DONE]`."""
    said: str = ""
    """What else there was to read, where it was no answer."""


class References:
    """Every version's own greedy answers, as tokens.

    Args:
        base: the base's folder.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._known: dict[Path | None, Tokens] = {}
        self._answers: dict[str, Tokens] = {}
        assert self.prepare(None)
        self.learn("tiny", None)

    def prepare(self, folder: Path | None) -> bool:
        """Computes an adapter's answers, or the bare base's; False where they begin like another's, or hang on the last
        bits of two logits, so that nothing would be told by them."""
        model: Any = LlamaForCausalLM.from_pretrained(self._base)
        if folder is not None:
            model = peft.PeftModel.from_pretrained(model, folder)
        model.eval()
        found: Tokens = {}
        for route, prompt in itertools.product(("completions", "chat"), PROMPTS):
            ids = torch.tensor([self._ids(route, prompt)])
            with torch.no_grad():
                made = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=LONGEST,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            first, second = torch.cat(made.logits).topk(2).values.unbind(1)
            if (first - second).min() < CLEAR:
                return False
            found[route, prompt] = made.sequences[0, ids.shape[1] :].tolist()
        if any(other[key][:LEAST] == found[key][:LEAST] for other in self._known.values() for key in found):
            return False
        self._known[folder] = found
        return True

    def learn(self, name: str, folder: Path | None) -> None:
        """From now on `name` answers as what was prepared from `folder`."""
        self._answers[name] = self._known[folder]

    def text(self, name: str, asked: Asked) -> str:
        """What version `name` answers."""
        route = "chat" if asked.way == "chat" else "completions"
        ids = self._answers[name][route, asked.prompt][: asked.max_tokens]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def owners(self, asked: Asked, text: str) -> list[str]:
        """The versions that answer so."""
        return [name for name in self._answers if self.text(name, asked) == text]

    def _ids(self, route: str, prompt: str) -> list[int]:
        if route == "completions":
            return list(self._tokenizer(prompt)["input_ids"])
        said = self._tokenizer.apply_chat_template(_chat(prompt), add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(said, add_special_tokens=False)["input_ids"])


def _chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


@dataclass
class Timeline:
    """What was done, and when; by the monotonic clock."""

    kills: list[float] = field(default_factory=list)
    done: list[tuple[float, str]] = field(default_factory=list)
    moves: dict[str, list[tuple[float, float, str]]] = field(default_factory=dict)
    """Name -> (when its alias began to move, when it had moved, the version that it names since)."""

    def note(self, what: str) -> None:
        """Something was done."""
        self.done.append((time.monotonic(), what))

    def move(self, name: str, ref: str, act: Callable[[], Any]) -> Any:
        """Has `act` move an alias."""
        began = time.monotonic()
        try:
            return act()
        finally:
            self.moves.setdefault(name, []).append((began, time.monotonic(), ref))
            self.note(f"{name} is {ref}")

    def named(self, name: str, since: float, until: float) -> set[str]:
        """The versions that `name` may have meant to requests of that time."""
        moves = self.moves.get(name, [])
        meant = set()
        for number, (began, _, ref) in enumerate(moves):
            replaced = moves[number + 1][1] + STALE_S if number + 1 < len(moves) else float("inf")
            if began <= until and since <= replaced:
                meant.add(ref)
        return meant

    def killed_meanwhile(self, answer: Answer) -> bool:
        """Whether a replica was killed while the answer was under way, or just before, and nobody knew of it yet."""
        return any(answer.sent - DETECTED_S <= at <= answer.ended for at in self.kills)


def judge(answers: Iterable[Answer], references: References, timeline: Timeline) -> list[str]:
    """Whatever was not as it shall be, a line each."""
    wrong = []
    for answer in answers:
        where = f"{answer.asked.way} {answer.asked.model} at {answer.sent:.2f}-{answer.ended:.2f}"
        if answer.error is not None or not answer.is_whole or answer.status != 200:
            wrong += [f"{where}: {why}" for why in _why_broken(answer, timeline)]
        else:
            wrong += [f"{where}: {why}" for why in _why_wrong(answer, references, timeline)]
    return wrong


def _why_broken(answer: Answer, timeline: Timeline) -> list[str]:
    said = f"{answer.status} {dict(answer.error) if answer.error else answer.said!r}"
    if answer.asked.way in ("openai", "chat"):
        return [f"failed, though the client tries again: {said}"]
    if not timeline.killed_meanwhile(answer):
        return [f"failed, and no replica was killed: {said}"]
    if answer.error is None or not {"message", "type", "code"} <= set(answer.error):
        return [f"broke off without an error of OpenAI's form: {said}"]
    if answer.status == 200:
        return [] if answer.asked.way.endswith("stream") else [f"an error with status 200: {said}"]
    if answer.status != 503 or not (answer.retry_after or "").isdigit():
        return [f"no 503 with Retry-After ({answer.retry_after}): {said}"]
    return []


def _why_wrong(answer: Answer, references: References, timeline: Timeline) -> list[str]:
    asked, wrong = answer.asked, []
    meant = timeline.named(asked.model, answer.sent, answer.ended) or {asked.model}
    if answer.adapter not in meant and not (asked.model == "tiny" and answer.adapter is None):
        wrong.append(f"answered by {answer.adapter}, meant was one of {sorted(meant)}")
    name = answer.adapter or "tiny"
    if answer.text != references.text(name, asked):
        owners = references.owners(asked, answer.text)
        wrong.append(f"no answer of {name}: {answer.text!r}, which is {owners or 'nobody'}'s")
    if answer.models - {name}:
        wrong.append(f"says in itself that it is of {sorted(answer.models)}, and in its header of {name}")
    return wrong


class Load:
    """Clients that ask without a pause, each in a thread.

    Args:
        url: http://HOST:PORT/ENDPOINT/v1.
        models: what may be asked for; it may change at any time.
    """

    WAYS = ("raw", "raw-stream", "openai", "openai-stream", "chat", "raw-stream", "raw", "openai")

    def __init__(
        self, url: str, models: Sequence[str], *, num_clients: int = 8, pause_s: float = 0.0
    ) -> None:
        self._url, self.models, self._pause_s = url, list(models), pause_s
        self.answers: list[Answer] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._client, args=(self.WAYS[number % len(self.WAYS)], number))
            for number in range(num_clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self, way: str, seed: int) -> None:
        draw = random.Random(seed)
        with openai.OpenAI(base_url=self._url, api_key="none", timeout=TIMEOUT_S) as client:
            while not self._stop.is_set():
                longest = LONGEST if "stream" in way else 16
                asked = Asked(
                    way, draw.choice(self.models), draw.choice(PROMPTS), draw.randint(LEAST, longest)
                )
                self.answers.append(ask(asked, self._url, client))
                time.sleep(self._pause_s)


def ask(asked: Asked, url: str, client: openai.OpenAI) -> Answer:
    """One request, whatever comes of it."""
    began = time.monotonic()
    try:
        if asked.way.startswith("raw"):
            found = _ask_raw(asked, url)
        else:
            found = _ask_openai(asked, client)
    except Exception as error:  # whatever it is, it is what the client got
        found = {"status": 0, "said": f"{type(error).__name__}: {error}"}
    return Answer(asked, began, time.monotonic(), **found)


def _fields(asked: Asked) -> dict[str, Any]:
    fields = {"model": asked.model, "max_tokens": asked.max_tokens, "temperature": 0}
    return fields | ({"messages": _chat(asked.prompt)} if asked.way == "chat" else {"prompt": asked.prompt})


def _ask_raw(asked: Asked, url: str) -> dict[str, Any]:
    body = {**_fields(asked), "stream": asked.way == "raw-stream"}
    with requests.post(f"{url}/completions", json=body, stream=True, timeout=TIMEOUT_S) as response:
        found: dict[str, Any] = {
            "status": response.status_code,
            "adapter": _version(response.headers.get("x-raypeft-adapter")),
            "retry_after": response.headers.get("retry-after"),
        }
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            text = response.text
            try:
                whole = json.loads(text)
            except ValueError:
                return found | {"said": text[:200]}
            if "error" in whole:
                return found | {"error": whole["error"]}
            models = frozenset([whole["model"]])
            return found | {"text": whole["choices"][0]["text"], "models": models, "is_whole": True}
        return found | _events(response.iter_lines())


def _events(lines: Iterable[bytes]) -> dict[str, Any]:
    """What a stream of events says."""
    text, models = "", set()
    found: dict[str, Any] = {"said": "the stream broke off"}
    for line in lines:
        if not line:
            continue
        data = line.removeprefix(b"data: ")
        if data == b"[DONE]":
            found |= {"is_whole": "error" not in found, "said": ""}
            break
        try:
            event = json.loads(data)
        except ValueError:
            continue  # half an event, before the one that says why
        if "error" in event:
            found["error"] = event["error"]
            continue
        models.add(event["model"])
        text += "".join(choice["text"] for choice in event["choices"])
    return found | {"text": text, "models": frozenset(models)}


def _ask_openai(asked: Asked, client: openai.OpenAI) -> dict[str, Any]:
    routes: Any = client.chat if asked.way == "chat" else client
    streams = asked.way == "openai-stream"
    adapter, text, models = None, "", set()
    try:
        raw = routes.completions.with_raw_response.create(**_fields(asked), stream=streams)
        adapter = _version(raw.headers.get("x-raypeft-adapter"))
        said = raw.parse()
        for part in said if streams else [said]:
            models.add(part.model)
            for choice in part.choices:
                text += (choice.message.content if asked.way == "chat" else choice.text) or ""
    except openai.APIStatusError as error:
        return {
            "status": error.status_code, "adapter": adapter, "error": error.body,
            "retry_after": error.response.headers.get("retry-after"),
        }  # fmt: skip
    except openai.APIError as error:  # an event in a stream
        return {"status": 200 if adapter else 0, "adapter": adapter, "error": error.body, "said": str(error)}
    return {"status": 200, "adapter": adapter, "text": text, "models": frozenset(models), "is_whole": True}


def _version(header: str | None) -> str | None:
    """The version of an answer's header; None for the bare base."""
    return header if header is None or "@" in header else None
