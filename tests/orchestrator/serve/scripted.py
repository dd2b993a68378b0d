"""An engine without a model, whose answers a test can compute, and an endpoint over it on a real port."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import re
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestrator.serve.api_error import ApiError
from orchestrator.serve.engines.engine import EngineDead, Figures, Generation, Piece, TokenLogprob
from orchestrator.serve.engines.heads import (
    TERMS,
    Classified,
    Embedded,
    Entity,
    Found,
    HeadTask,
    Input,
    Span,
    Tagged,
    Terms,
    TooLong,
)
from orchestrator.serve.engines.prompts import Prompts
from orchestrator.serve.engines.text import TextStream
from orchestrator.serve.routes.admission import Admission
from orchestrator.serve.routes.app import build_app
from orchestrator.serve.routes.catalogue import Target
from orchestrator.serve.routes.replies import model_card
from tests.orchestrator.serve.tiny import TEMPLATE

CONTEXT = 512
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; a chat template that refuses tools."""
    letters = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    made.chat_template = TEMPLATE
    return made


def letter(prompt: Sequence[int], adapter: str | None, seed: int | None, at: int) -> str:
    """The letter that the scripted engine says at a position."""
    said = f"{list(prompt)} {adapter} {seed} {at}"
    return LETTERS[hashlib.sha256(said.encode()).digest()[0] % len(LETTERS)]


class ScriptedEngine:
    """Says the letters of `letter`, one every `step_s`; ends with the end token after `end_after` of them."""

    def __init__(self, *, step_s: float = 0.0, end_after: int | None = None) -> None:
        self.tokenizer = tokenizer()
        self.prompts = Prompts(self.tokenizer)
        self.step_s, self.end_after = step_s, end_after
        self.fails_at: int | None = None
        self.asked: list[Generation] = []
        self.running, self.most_running, self.num_tokens, self.cancelled = 0, 0, 0, 0
        self._dead = False

    max_context = CONTEXT

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def virtual_tokens(self, adapter: str | None) -> int:
        return 0

    def num_tasks(self, adapter: str | None) -> int:
        return 3 if (adapter or "").startswith("tasks") else 0

    def loaded(self) -> frozenset[str]:
        return frozenset({"docs", "slow"})

    def figures(self) -> Figures:
        return Figures(
            running=self.running, max_running=8, prompt_tokens=7, cached_tokens=3, slots=4, loaded=2
        )

    def check(self) -> None:
        if self._dead:
            raise EngineDead("the engine has stopped")

    def die(self) -> None:
        self._dead = True

    def close(self) -> None:
        self._dead = True

    async def generate(self, request: Generation) -> AsyncGenerator[Piece, None]:
        self.check()
        self.asked.append(request)
        text, eos = TextStream(self.prompts.decode, request.stop), self.tokenizer.eos_token_id
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        ended = False
        try:
            for at in range(request.max_tokens):
                await asyncio.sleep(self.step_s)
                self.check()
                if at == self.fails_at:
                    raise EngineDead("out of memory")
                self.num_tokens += 1
                token = eos
                if at != self.end_after:
                    word = letter(request.prompt_ids, request.adapter, request.seed, at)
                    token = self.prompts.text_ids(word)[0]
                new = text.finish() if token == eos else text.push(token)
                ended = token == eos or text.stopped
                yield Piece(new, 1, "stop" if ended else None, self._scored(token, request.logprobs))
                if ended:
                    return
            ended = True
            yield Piece(text.finish(), 0, "length")
        finally:
            self.running -= 1
            self.cancelled += not ended

    def _scored(self, token: int, top: int | None) -> tuple[TokenLogprob, ...]:
        if top is None:
            return ()
        ranked = tuple(((token + beside) % 200, -0.5 - beside) for beside in range(top))
        return (TokenLogprob(token, -0.5, ranked),)


class ScriptedHeads:
    """Answers from the texts themselves: words that begin with a capital are entities, labels go by length."""

    vocab_size = 300
    max_tokens = 60

    def __init__(self, task: HeadTask, step_s: float = 0.0) -> None:
        self.task, self.step_s = task, step_s
        self.asked: list[tuple[str | None, str]] = []
        self.running, self.cancelled = 0, 0
        self._dead = False

    async def embed(
        self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS
    ) -> list[Embedded]:
        counts = await self._take(inputs, adapter, terms.queue)
        return [Embedded((0.6, -0.8, count / 7), count) for count in counts]

    async def classify(
        self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS
    ) -> list[Classified]:
        counts = await self._take(inputs, adapter, terms.queue)
        label = "base" if adapter is None else adapter
        return [Classified(((label, 0.7), ("b", 0.2), ("c", 0.1)), count) for count in counts]

    async def tag(self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS) -> list[Tagged]:
        counts = await self._take(inputs, adapter, terms.queue)
        return [
            Tagged(tuple(Entity("NAME", 0.9, *m.span()) for m in re.finditer(r"[A-Z]\w*", each.text)), count)
            for each, count in zip(inputs, counts, strict=True)
        ]

    async def find(
        self, questions: Sequence[tuple[str, str]], adapter: str | None, top: int, terms: Terms = TERMS
    ) -> list[Found]:
        counts = await self._take([Input(*each) for each in questions], adapter, terms.queue)
        return [Found(tuple(Span(at, at + 3, 0.5) for at in range(min(top, 4))), count) for count in counts]

    async def _take(self, inputs: Sequence[Input], adapter: str | None, queue: str) -> list[int]:
        self.check()
        self.asked.append((adapter, queue))
        self.running += 1
        ended = False
        try:
            counts = [len(each.ids or each.text + (each.pair or "")) for each in inputs]
            for index, count in enumerate(counts):
                await asyncio.sleep(self.step_s)
                if count > self.max_tokens:
                    raise TooLong(index, count, self.max_tokens)
            ended = True
            return counts
        finally:
            self.running -= 1
            self.cancelled += not ended

    def virtual_tokens(self, adapter: str | None) -> int:
        return 0

    def num_tasks(self, adapter: str | None) -> int:
        return 3 if (adapter or "").startswith("tasks") else 0

    def loaded(self) -> frozenset[str]:
        return frozenset()

    def figures(self) -> Figures:
        return Figures(running=self.running)

    def check(self) -> None:
        if self._dead:
            raise EngineDead("the engine has stopped")

    def close(self) -> None:
        self._dead = True


@dataclass
class FixedCatalogue:
    """A base and two adapters, always there."""

    base_name: str = "tiny"
    base: Any = field(default_factory=lambda: SimpleNamespace(content_hash="b" * 64, name="tiny"))
    held: int = 0
    names: tuple[str, ...] = ("docs@1", "slow@1")

    async def start(self) -> None:
        """Nothing to load."""

    async def stop(self) -> None:
        """Nothing to end."""

    def served(self) -> list[str]:
        return [self.base_name, *self.names]

    async def cards(self) -> list[dict[str, Any]]:
        return [model_card(name, created=1) for name in self.served()]

    @asynccontextmanager
    async def acquire(self, model: str, sticky: Any = None, may_know: Any = None) -> AsyncIterator[Target]:
        name = model if "@" in model or model == self.base_name else f"{model}@1"
        if name not in self.served():
            raise ApiError(
                f"The model '{model}' does not exist.", status=404, param="model", code="model_not_found"
            )
        self.held += 1
        try:
            yield Target(name, None if name == self.base_name else name)
        finally:
            self.held -= 1


@dataclass
class Served:
    """An endpoint that listens."""

    url: str
    engine: Any
    catalogue: FixedCatalogue


@contextmanager
def listening(
    engine: ScriptedEngine | ScriptedHeads | None = None, admission: Admission | None = None, **options: Any
) -> Iterator[Served]:
    """The endpoint `tiny` on a free port of loopback, for as long as the context lasts."""
    engine = engine or ScriptedEngine()
    catalogue = FixedCatalogue()
    app = app_of(engine, catalogue, admission=admission, **options)
    with uvicorn_server(app) as root:
        yield Served(root, engine, catalogue)


def app_of(engine: ScriptedEngine | ScriptedHeads, catalogue: FixedCatalogue, **options: Any) -> Any:
    """The application of the endpoint `tiny`."""
    if isinstance(engine, ScriptedHeads):
        return build_app("tiny", None, Prompts(tokenizer()), catalogue, heads=engine, **options)
    return build_app("tiny", engine, engine.prompts, catalogue, **options)


@contextmanager
def uvicorn_server(app: Any) -> Iterator[str]:
    """http://127.0.0.1:PORT of an application."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline and thread.is_alive():
        time.sleep(0.01)
    assert server.started, "the server did not start"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def spoken(prompt: str, adapter: str | None, seed: int | None, count: int) -> str:
    """What the scripted engine answers to a text."""
    ids = Prompts(tokenizer()).text_ids(prompt)
    return "".join(letter(ids, adapter, seed, at) for at in range(count))


def eventually(holds: Any, timeout_s: float = 10.0) -> bool:
    """Whether `holds()` becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(InterruptedError):
            time.sleep(0.01)
    return True


def is_logprob(value: Any) -> bool:
    """A number that can be the logarithm of a probability."""
    return isinstance(value, float) and not math.isnan(value) and value <= 0
