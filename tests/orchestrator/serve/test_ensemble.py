"""`model: "a:0.7+b:0.3"` answers as the base whose weights have both adapters' changes, weighted: over HTTP, in the
engine that batches, beside requests for the parts alone."""

import concurrent.futures

import peft
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.identity import base_identity
from orchestrator.registry import Registry
from orchestrator.serve.desired import Desired, EngineOptions, Served
from orchestrator.serve.engines import base_model
from orchestrator.serve.engines.engine_choice import engine_for
from orchestrator.serve.engines.prompts import Prompts
from orchestrator.serve.routes.app import build_app
from orchestrator.serve.routes.catalogue import Catalogue
from orchestrator.spec.job import ModelSpec
from tests.orchestrator.serve import tiny

PROMPTS = ["def f(", "class A", "import os"]


def merged(base, parts):
    """The base with W + sum(weight x change), by HF PEFT's changes; a dense oracle."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    weights = dict(model.named_parameters())
    for folder, weight in parts:
        adapter = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        for name, module in adapter.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                with torch.no_grad():
                    weights[f"{name}.weight"].add_(weight * module.get_delta_weight("default"))
    return model


def greedy(model, base, prompt):
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def site(tiny_base, tmp_path):
    registry, identity = Registry(tmp_path / "registry"), base_identity(str(tiny_base))
    versions = [
        tiny.register(registry, name, tiny_base, tmp_path / "s", seed=seed)
        for seed, name in enumerate("ab", 1)
    ]
    soft = tiny.register(registry, "soft", tiny_base, tmp_path / "s", "prompt", seed=3)
    served = tuple(Served(version.name, version.version) for version in (*versions, soft))
    for version in (*versions, soft):
        registry.set_alias(version.name, 1, "production")
    base = base_model.load(ModelSpec(base_model=str(tiny_base)), 1)
    prompts = Prompts(base.tokenizer)
    engine = engine_for(base, prompts, EngineOptions())
    desired = Desired("tiny", identity, adapters=served)
    catalogue = Catalogue(
        identity, engine, registry, lambda: desired, lambda entry: None, cache=tmp_path / "cache"
    )
    with TestClient(build_app("tiny", engine, prompts, catalogue), raise_server_exceptions=False) as client:
        yield client, versions


def ask(client, model, prompt):
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
    return client.post("/v1/completions", json=body)


def test_it_equals_the_merged_reference_in_a_mixed_batch(site, tiny_base):
    client, (one, two) = site
    wanted = {
        "a:0.7+b:0.3": merged(tiny_base, [(one.url, 0.7), (two.url, 0.3)]),
        "a+b:-0.5": merged(tiny_base, [(one.url, 1.0), (two.url, -0.5)]),
        "a:0.25": merged(tiny_base, [(one.url, 0.25)]),
        "a": merged(tiny_base, [(one.url, 1.0)]),
        "tiny": merged(tiny_base, []),
    }
    asked = [(model, prompt) for prompt in PROMPTS for model in wanted]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda each: ask(client, *each), asked))
    texts = set()
    for (model, prompt), answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["text"]
        assert text == greedy(wanted[model], tiny_base, prompt), (model, prompt)
        texts.add((prompt, text))
    assert len(texts) > 2 * len(PROMPTS)  # the ensembles say something else than their parts
    assert answers[0].headers["x-raypeft-adapter"] == "a@1:0.7+b@1:0.3"


def test_what_has_no_sum_is_refused_and_harms_nobody(site):
    client, _ = site
    answer = ask(client, "a:0.5+soft:0.5", "def f(")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "adapter_refused"
    assert ask(client, "a:0.5+dogs:0.5", "def f(").status_code == 404
    assert ask(client, "a:x+b", "def f(").status_code == 400
    for model in ("tiny", "a+tiny:0.5"):
        answer = ask(client, f"{model}+b", "def f(")
        assert answer.status_code == 400 and "'tiny' is the base itself" in answer.json()["error"]["message"]
    assert ask(client, "a", "def f(").status_code == 200
