"""An engine that loads and answers without a model, counts what it is asked, and can be made to wait or fail; and
versions that are registered in microseconds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from orchestrator.identity import BaseIdentity
from orchestrator.lineage import Lineage
from orchestrator.registry import AdapterVersion
from orchestrator.serve.engines.engine import AdapterRefused, Generation, Piece, TokenLogprob

BASE = BaseIdentity(name="tiny", source="/tiny", revision=None, content_hash="b" * 64)


class CountingEngine:
    """Says `tokens[key]`, each with log-probability `logprobs[key]`; a token a turn of the event loop."""

    max_context, vocab_size = 64, 100

    def __init__(self, *, load_s: float = 0.0) -> None:
        self.load_s = load_s
        self.there: set[str] = set()
        self.events: list[tuple[str, str]] = []
        self.loading, self.most_loading = 0, 0
        self.refuses: dict[str, str] = {}
        self.fails: dict[str, Exception] = {}
        self.tokens: dict[str | None, list[int]] = {}
        self.logprobs: dict[str | None, float] = {}
        self.asked: list[Generation] = []
        self.sums: dict[str, tuple[tuple[str, float], ...]] = {}

    @property
    def loads(self) -> Counter[str]:
        return Counter(key for event, key in self.events if event == "load")

    def virtual_tokens(self, adapter: str | None) -> int:
        return 0

    def num_tasks(self, adapter: str | None) -> int:
        return 0

    async def load(self, adapter: str, directory: Path) -> None:
        assert (directory / "adapter_config.json").exists()
        self.events.append(("load", adapter))
        self.loading += 1
        self.most_loading = max(self.most_loading, self.loading)
        await asyncio.sleep(self.load_s)
        self.loading -= 1
        if adapter in self.refuses:
            raise AdapterRefused(self.refuses[adapter])
        self.there.add(adapter)

    async def combine(self, adapter: str, parts: Sequence[tuple[str, float]]) -> None:
        assert all(part in self.there for part, _ in parts)
        self.events.append(("combine", adapter))
        self.sums[adapter] = tuple(parts)
        self.there.add(adapter)

    async def unload(self, adapter: str) -> None:
        self.events.append(("unload", adapter))
        await asyncio.sleep(0)
        self.there.discard(adapter)

    def loaded(self) -> frozenset[str]:
        return frozenset(self.there)

    async def generate(self, request: Generation) -> AsyncGenerator[Piece, None]:
        assert request.adapter is None or request.adapter in self.there, "it was unloaded under a request"
        self.asked.append(request)
        said = self.tokens.get(request.adapter, [1, 2, 3])
        for at, token in enumerate(said):
            await asyncio.sleep(0)
            if request.adapter in self.fails:
                raise self.fails[request.adapter]
            logprobs = ()
            if request.logprobs is not None:
                logprobs = (TokenLogprob(token, self.logprobs.get(request.adapter, -1.0)),)
            yield Piece(f"{token} ", 1, "stop" if at == len(said) - 1 else None, logprobs)

    def check(self) -> None:
        return

    def close(self) -> None:
        return


class Shelf:
    """Versions and their aliases, in memory; pulls take `pull_s` of the event loop's time, and are counted."""

    def __init__(self) -> None:
        self.versions: dict[str, AdapterVersion] = {}
        self.named: dict[str, dict[str, int]] = {}
        self.pulls: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.broken: dict[str, Exception] = {}

    def add(self, name: str) -> AdapterVersion:
        number = sum(version.name == name for version in self.versions.values()) + 1
        made = AdapterVersion(name, number, "", Lineage(base=BASE), f"{name}-{number}", created=1.0)
        self.versions[made.ref] = made
        return made

    def get(self, ref: str) -> AdapterVersion:
        self.reads["get"] += 1
        return self.versions[ref]

    def aliases(self, name: str) -> dict[str, int] | None:
        self.reads["aliases"] += 1
        return dict(self.named[name]) if name in self.named else None

    def aliases_mark(self, name: str) -> tuple[int, int] | None:
        return None

    def set_alias(self, name: str, version: int, alias: str) -> None:
        self.named.setdefault(name, {})[alias] = version

    def pull(self, ref: str, directory: Path) -> None:
        self.pulls[ref] += 1
        if ref in self.broken:
            raise self.broken[ref]
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
