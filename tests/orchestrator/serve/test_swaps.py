"""An hour's worth of versions that take over under one name, one in ten seconds: nothing of those that left stays."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from orchestrator.identity import base_identity
from orchestrator.lineage import Lineage
from orchestrator.registry import Registry
from orchestrator.serve.desired import Desired, EngineOptions, Served
from orchestrator.serve.engines import base_model, engine_choice
from orchestrator.serve.engines.prompts import Prompts
from orchestrator.serve.rollouts.observed import Observed
from orchestrator.serve.routes.app import build_app
from orchestrator.serve.routes.catalogue import Catalogue
from orchestrator.spec.job import ModelSpec
from tests.orchestrator.serve import tiny

SWAPS = 360
GROWTH = 0.05
METHODS = ("lora", "ia3", "prompt")


def memory() -> int:
    """KiB in use of this process that are not of files; what earlier tests freed is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0])


@pytest.mark.slow  # real loads, three hundred of them
@pytest.mark.timeout(600)
def test_versions_that_left_leave_nothing_behind(tiny_base, tmp_path):
    registry, identity = Registry(tmp_path / "registry"), base_identity(str(tiny_base))
    folders = [
        tiny.save_adapter(tiny_base, tmp_path / f"{method}-{seed}", method, seed=seed)
        for seed, method in enumerate(METHODS * 2, start=1)
    ]
    registry.update_endpoint("tiny", lambda now: Desired("tiny", identity).to_dict())
    base = base_model.load(ModelSpec(base_model=str(tiny_base)), threads=1)
    prompts = Prompts(base.tokenizer)
    engine = Observed(engine_choice.engine_for(base, prompts, EngineOptions(), "CAUSAL_LM"))

    def read() -> Desired | None:
        stored = registry.endpoint_state("tiny")
        return Desired.from_dict(stored) if stored else None

    def change(how) -> None:
        registry.update_endpoint("tiny", lambda now: how(Desired.from_dict(now or {})).to_dict())

    catalogue = Catalogue(
        identity, engine, registry, read, lambda entry: None, tmp_path / "cache", max_age_s=0, every_s=None
    )
    app = build_app("tiny", engine, prompts, catalogue)
    after_a_tenth, files, threads, texts = 0, 0, 0, set()
    with TestClient(app, raise_server_exceptions=False) as client:
        for number in range(1, SWAPS + 1):
            version = registry.register("docs", folders[number % 6], Lineage(base=identity))
            change(lambda now, made=version: now.with_adapter(Served("docs", made.version)))
            registry.set_alias("docs", version.version, "production")
            for stream in (False, True):
                body = {"model": "docs", "prompt": "def f(", "max_tokens": 3, "temperature": 0}
                answer = client.post("/v1/completions", json={**body, "stream": stream})
                assert answer.status_code == 200 and answer.headers["x-raypeft-adapter"] == version.ref
                texts.add(answer.text if stream else answer.json()["choices"][0]["text"])
            if version.version > 1:
                change(lambda now, old=version.version - 1: now.without(f"docs@{old}"))
            assert client.portal is not None
            client.portal.call(catalogue.look)
            assert engine.loaded() == {version.content_hash}
            if number == SWAPS // 10:
                after_a_tenth, threads = memory(), threading.active_count()
                files = len(list(Path("/proc/self/fd").iterdir()))
        growth, in_use = after_a_tenth * GROWTH, memory()
        assert in_use < after_a_tenth + growth
        assert threading.active_count() <= threads + 6  # those of the event loop come as they are needed
        assert len(list(Path("/proc/self/fd").iterdir())) <= files + 4
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [version.content_hash]
        assert len(texts) > 4  # they were different ones
        leaked = b"\1" * int(growth * 1024 * 1.2)
        assert leaked and memory() > in_use + growth  # the control: so much would be seen
