"""What `deploy.engine` says is what the replica's engine does."""

import asyncio

import pytest
import torch

from orchestrator.serve.desired import Desired, EngineOptions
from orchestrator.serve.engines import base_model
from orchestrator.serve.engines.batching import BatchingEngine
from orchestrator.serve.engines.engine import Generation
from orchestrator.serve.engines.engine_choice import engine_for
from orchestrator.serve.engines.prompts import Prompts
from orchestrator.serve.engines.steps import Steps
from orchestrator.spec.job import ModelSpec
from tests.orchestrator.serve import tiny
from tests.orchestrator.serve.counting_engine import BASE
from tests.orchestrator.spec.jobs import spec_of


def options_of(text):
    return EngineOptions.of(spec_of(f"deploy: {{engine: {{{text}}}}}\n").deploy.engine)


def started(tiny_base, text=""):
    options = options_of(text)
    base = base_model.load(ModelSpec(base_model=str(tiny_base)), 1, options)
    return base, engine_for(base, Prompts(base.tokenizer), options)


def test_they_travel_in_the_desired_state():
    options = options_of(
        "max_context: 40, max_batch_tokens: 64, max_adapters: 3, deterministic: true, quantization: nf4"
    )
    assert options == EngineOptions(40, 64, 3, True, "nf4")
    stored = Desired("tiny", BASE, engine=options).to_dict()
    assert Desired.from_dict(stored).engine == options
    assert options_of("") == EngineOptions() == Desired.from_dict({**stored, "engine": {}}).engine


def test_the_context_is_the_smaller_one(tiny_base):
    for text, expected in (("", tiny.CONTEXT), ("max_context: 40", 40), ("max_context: 4000", tiny.CONTEXT)):
        _, engine = started(tiny_base, text)
        assert isinstance(engine, BatchingEngine) and engine.max_context <= expected
        assert engine.max_context >= expected - 1
        engine.close()


def test_a_forward_has_so_many_tokens_at_most(tiny_base, monkeypatch):
    seen = []
    run = Steps.run

    def noted(self, step):
        seen.append(sum(part.length for part in step.parts))
        run(self, step)

    monkeypatch.setattr(Steps, "run", noted)

    async def longest(text):
        seen.clear()
        _, engine = started(tiny_base, text)
        asked = [Generation(tuple(range(number, number + 40)), None, 2) for number in range(4)]
        await asyncio.gather(*(_all(engine, each) for each in asked))
        engine.close()
        return max(seen)

    assert asyncio.run(longest("max_batch_tokens: 64")) <= 64 < asyncio.run(longest(""))


async def _all(engine, asked):
    return [piece async for piece in engine.generate(asked)]


def test_deterministic_is_fp32_and_equal_to_the_bit_alone_and_in_a_batch(tiny_base):
    base, engine = started(tiny_base, "deterministic: true")
    assert base.model.dtype == torch.float32

    async def scored(text):
        ids = tuple(base.tokenizer(text)["input_ids"])
        asked = Generation(ids, None, 6, logprobs=0)
        return [each.logprob async for piece in engine.generate(asked) for each in piece.logprobs]

    async def run():
        alone = await scored("def f(")
        among, *_ = await asyncio.gather(*map(scored, ["def f(", "class A", "import os, sys", "x"]))
        return alone, among

    alone, among = asyncio.run(run())
    engine.close()
    assert len(alone) > 0 and alone == among


@pytest.mark.parametrize(
    ("text", "kind"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit"), ("none", "Linear")]
)
def test_the_bases_layers_are_kept_as_asked(tiny_base, text, kind):
    base, engine = started(tiny_base, f"quantization: {text}")
    layer = base.model.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == kind

    async def run():
        asked = Generation((40, 41, 42), None, 4)
        return sum([piece.num_tokens async for piece in engine.generate(asked)])

    assert asyncio.run(run()) > 0
    engine.close()
