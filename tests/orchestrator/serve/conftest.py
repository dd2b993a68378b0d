"""One endpoint over a tiny base, served in this process without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from orchestrator.identity import base_identity
from orchestrator.registry import AdapterVersion, Registry
from orchestrator.serve.desired import Desired, Served
from orchestrator.serve.engines import base_model
from orchestrator.serve.engines.prompts import Prompts
from orchestrator.serve.engines.sequential import SequentialEngine
from orchestrator.serve.routes.app import build_app
from orchestrator.serve.routes.catalogue import Catalogue
from orchestrator.spec.job import ModelSpec
from tests.orchestrator.serve import tiny


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("bases") / "tiny")


@dataclass
class Endpoint:
    """A client of one endpoint, and all that stands behind it."""

    client: TestClient
    registry: Registry
    base: Path
    engine: SequentialEngine
    catalogue: Catalogue
    scratch: Path
    others: list[str]

    def deploy(self, version: AdapterVersion, **entry: Any) -> None:
        served = Served(version.name, version.version, **entry)
        self.registry.update_endpoint(
            "tiny", lambda now: Desired.from_dict(now).with_adapter(served).to_dict()
        )

    def undeploy(self, ref: str) -> None:
        self.registry.update_endpoint("tiny", lambda now: Desired.from_dict(now).without(ref).to_dict())

    def register(self, name: str, method: str = "lora", **options: Any) -> AdapterVersion:
        return tiny.register(self.registry, name, self.base, self.scratch, method, **options)

    def complete(self, model: str, prompt: Any = "def f(", **options: Any):
        body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, **options}
        return self.client.post("/v1/completions", json=body)

    def text(self, model: str, **options: Any) -> str:
        answer = self.complete(model, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]


@pytest.fixture
def served(tiny_base, tmp_path) -> Iterator[Endpoint]:
    """The endpoint `tiny`, with nothing deployed."""
    registry = Registry(tmp_path / "registry")
    identity = base_identity(str(tiny_base))
    registry.update_endpoint("tiny", lambda now: Desired("tiny", identity).to_dict())
    base = base_model.load(ModelSpec(base_model=str(tiny_base)), threads=1)
    prompts = Prompts(base.tokenizer)
    engine = SequentialEngine(base.model, prompts.decode, base.eos_ids, base.max_context)

    def finish(entry: Served) -> None:
        settled = replace(entry, alias_when_live=None)
        registry.update_endpoint("tiny", lambda now: Desired.from_dict(now).with_adapter(settled).to_dict())

    def read() -> Desired | None:
        stored = registry.endpoint_state("tiny")
        return Desired.from_dict(stored) if stored else None

    # what was changed a moment ago is seen by the next request; no look that no test asks for
    catalogue = Catalogue(
        identity, engine, registry, read, finish, cache=tmp_path / "cache", max_age_s=0, every_s=None
    )
    others: list[str] = []

    async def other_endpoints() -> list[str]:
        return others

    app = build_app("tiny", engine, prompts, catalogue, other_endpoints)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Endpoint(client, registry, tiny_base, engine, catalogue, tmp_path / "scratch", others)
