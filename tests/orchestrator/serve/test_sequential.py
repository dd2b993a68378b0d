"""The engine's turns: in order, cancelled when nobody listens, and the same prompts as training."""

import asyncio

import pytest
from transformers import AutoTokenizer

from orchestrator.serve.engines import base_model
from orchestrator.serve.engines.engine import EngineDead, Generation, ScoresNotFinite
from orchestrator.serve.engines.prompts import Prompts
from orchestrator.serve.engines.sequential import SequentialEngine
from orchestrator.spec.job import ModelSpec
from orchestrator.train.rows.records import Record
from orchestrator.train.rows.render import render
from tests.orchestrator.serve import adapter_zoo as zoo

PROMPT = tuple(range(40, 60))


@pytest.fixture
def engine(tiny_base):
    base = base_model.load(ModelSpec(base_model=str(tiny_base)), threads=1)
    engine = SequentialEngine(base.model, Prompts(base.tokenizer).decode, frozenset(), base.max_context)
    yield engine
    engine.close()


async def collect(engine, **options):
    request = Generation(PROMPT, None, **{"max_tokens": 8, **options})
    return [piece async for piece in engine.generate(request)]


def test_generations_end_in_the_order_of_asking(engine):
    ended = []

    async def one(number, max_tokens):
        await collect(engine, max_tokens=max_tokens)
        ended.append(number)

    async def all_of_them():
        await asyncio.gather(*(one(number, 60 - 15 * number) for number in range(4)))

    asyncio.run(all_of_them())
    assert ended == [0, 1, 2, 3]


def test_each_token_is_a_piece_and_the_last_says_why(engine):
    pieces = asyncio.run(collect(engine))
    assert sum(piece.num_tokens for piece in pieces) == 8
    assert [piece.finish_reason for piece in pieces] == [None] * 8 + ["length"]


def test_closing_a_generation_stops_it_within_a_token(engine):
    """Counted in calls of the model, so that no clock decides."""
    calls = []
    engine._base.register_forward_hook(lambda *_: calls.append(1))

    async def leave_after_three():
        pieces = engine.generate(Generation(PROMPT, None, max_tokens=70))
        for _ in range(3):
            await anext(pieces)
        await pieces.aclose()
        await collect(engine, max_tokens=1)  # its turn comes when the other is over

    asyncio.run(leave_after_three())
    assert len(calls) < 40


def test_a_generation_that_was_left_while_it_waited_never_runs(engine):
    calls = []
    engine._base.register_forward_hook(lambda *_: calls.append(1))

    async def leave_the_queue():
        first = asyncio.ensure_future(collect(engine, max_tokens=30))
        second = asyncio.ensure_future(collect(engine, max_tokens=30))
        await asyncio.sleep(0)
        second.cancel()
        await first

    asyncio.run(leave_the_queue())
    assert len(calls) == 30


def test_a_failing_generation_does_not_end_the_engine(engine):
    async def fail_then_work():
        with pytest.raises(IndexError):
            async for _ in engine.generate(Generation((10**6,), None, max_tokens=2)):
                pass
        return await collect(engine, max_tokens=2)

    assert len(asyncio.run(fail_then_work())) == 3


def test_scores_that_are_no_numbers_end_their_generation(engine):
    def overflow(module, args, given):
        given.logits[..., 3] = float("nan")
        return given

    async def fail_then_work():
        handle = engine._base.register_forward_hook(overflow)
        with pytest.raises(ScoresNotFinite):
            await collect(engine, max_tokens=2)
        handle.remove()
        return await collect(engine, max_tokens=2)

    assert len(asyncio.run(fail_then_work())) == 3


def test_a_closed_engine_refuses_and_fails_what_waits(engine):
    async def close_under_way():
        waiting = [asyncio.ensure_future(collect(engine, max_tokens=40)) for _ in range(3)]
        await asyncio.sleep(0.05)
        engine.close()
        return await asyncio.gather(*waiting, return_exceptions=True)

    outcomes = asyncio.run(close_under_way())
    assert isinstance(outcomes[-1], EngineDead)
    with pytest.raises(EngineDead):
        engine.check()
    with pytest.raises(EngineDead):
        asyncio.run(collect(engine))


@pytest.mark.parametrize("has_template", [True, False])
def test_a_served_prompt_is_the_one_that_was_trained(repository, has_template):
    tokenizer = AutoTokenizer.from_pretrained(repository / "jobs/assets/tiny-llama")
    if not has_template:
        tokenizer.chat_template = None
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does os.path.join do?\nIn  short — please"},
    ]
    record = Record("row 1", "0", messages=(*asked, {"role": "assistant", "content": "It joins."}))
    (example,) = render([record], tokenizer, 512)
    assert Prompts(tokenizer).chat_ids(asked) == example.input_ids[: example.prompt_len]


def test_a_served_completion_prompt_is_the_one_that_was_trained(repository):
    tokenizer = AutoTokenizer.from_pretrained(repository / "jobs/assets/tiny-llama")
    (example,) = render([Record("row 1", "0", prompt="1 + 1 = ", answer="2")], tokenizer, 512)
    assert Prompts(tokenizer).text_ids("1 + 1 = ") == example.input_ids[: example.prompt_len]


def test_starts_that_change_the_base_and_mixtures_leave_others_as_they_are(tmp_path):
    labels = ("loftq", "loftq with dora", "xlora", "lora", "poly")
    kept = zoo.kept(tmp_path, "llama", 8, lambda label: label in labels)
    prompt = zoo.prompt_of(3)
    engine = SequentialEngine(zoo.base(), lambda ids: "".join(chr(256 + i) for i in ids), frozenset(), 60)

    async def said(prompt, key=None, task=None):
        pieces = [p async for p in engine.generate(Generation(prompt, key, 8, task=task))]
        return tuple(ord(letter) - 256 for letter in "".join(piece.text for piece in pieces))

    async def run():
        for each in kept:
            await engine.load(each.label, each.folder)
        given = {each.label: await said(each.prompt, each.label, each.task) for each in kept}
        return given, await said(prompt)

    try:
        given, bare = asyncio.run(run())
    finally:
        engine.close()
    assert given == {each.label: each.answer for each in kept} and len(given) == len(labels)
    assert bare == zoo.answer(zoo.base(), prompt, 8)
