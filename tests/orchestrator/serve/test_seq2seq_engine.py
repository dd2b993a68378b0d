"""An encoder with a decoder: each text of a mixed batch is the one that its adapter writes alone."""

import asyncio

import peft
import pytest
import torch
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

import peft_dist
from orchestrator.serve.engines.base_model import load
from orchestrator.serve.engines.decoding_batch import DecodingBatch
from orchestrator.serve.engines.engine import AdapterRefused, Generation, ScoresNotFinite
from orchestrator.serve.engines.prompts import SourcePrompts
from orchestrator.serve.engines.seq2seq import Seq2SeqEngine
from orchestrator.spec.job import ModelSpec
from tests.orchestrator.serve import tiny_heads

TASK = "SEQ_2_SEQ_LM"
METHODS = {"one": "lora", "two": "ia3", "three": "dora", "four": "prompt", "five": "prefix"}
TEXTS = ["a", "def f(x): return x", "os.path.join", "what is it?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_heads.save_base(tmp_path_factory.mktemp("bases") / "t5", "t5")


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for number, (name, method) in enumerate(METHODS.items()):
        model = tiny_heads.alone(base, TASK, method, seed=number + 1)
        found[name] = (model, tiny_heads.save(model, folder / name, TASK))
    return found


@pytest.fixture
def engine(base):
    loaded = load(ModelSpec(base_model=str(base)), threads=1, task=TASK)
    prompts = SourcePrompts(loaded.tokenizer)
    engine = Seq2SeqEngine(loaded.model, prompts.decode, loaded.eos_ids, loaded.max_context)
    engine.prompts = prompts
    yield engine
    engine.close()


async def write(engine, name, text, **options):
    asked = {"max_tokens": 10, "logprobs": 0, **options}
    request = Generation(tuple(engine.prompts.text_ids(text)), name, **asked)
    pieces = [piece async for piece in engine.generate(request)]
    ids = [each.token for piece in pieces for each in piece.logprobs]
    return ids, "".join(piece.text for piece in pieces), pieces[-1].finish_reason


def test_each_text_is_what_its_adapter_writes_alone(engine, base, made):
    tokenizer = AutoTokenizer.from_pretrained(base)
    everyone = {**made, None: (tiny_heads.alone(base, TASK, None), None)}
    calls = []

    async def run():
        await asyncio.gather(*(engine.load(name, folder) for name, (_, folder) in made.items()))
        engine._base.register_forward_pre_hook(lambda *_: calls.append(1))
        asked = [write(engine, name, text) for name in everyone for text in TEXTS]
        return await asyncio.gather(*asked)

    found = iter(asyncio.run(run()))
    distinct = set()
    for name, (model, _) in everyone.items():
        for text in TEXTS:
            ids, written, reason = next(found)
            with torch.no_grad():
                wanted = model.generate(
                    **tokenizer(text, return_tensors="pt"), max_new_tokens=10, do_sample=False
                )[0, 1:].tolist()
            assert ids == wanted, (name, text)
            assert written == tokenizer.decode(wanted, skip_special_tokens=True)
            assert reason == ("stop" if wanted[-1] == tokenizer.eos_token_id else "length")
            distinct.add(tuple(ids))
    assert len(distinct) > 6
    assert len(calls) < 10 * len(everyone) * len(TEXTS) / 2  # they were batched


def test_rows_end_where_their_own_request_says(engine):
    async def run():
        plain = await write(engine, None, "os.path", max_tokens=12)
        stop = plain[1][2:4]
        asked = [{"max_tokens": 3}, {"max_tokens": 12}, {"max_tokens": 12, "stop": (stop,)}]
        return plain, stop, await asyncio.gather(*(write(engine, None, "os.path", **each) for each in asked))

    plain, stop, (short, long, stopped) = asyncio.run(run())
    assert (short[0], short[2]) == (plain[0][:3], "length")
    assert long == plain
    assert stopped[1] == plain[1][: plain[1].index(stop)] and stopped[2] == "stop"


def test_a_seed_draws_the_same_alone_and_in_a_batch(engine):
    drawn = {"temperature": 1.3, "top_p": 0.9, "seed": 5}

    async def run():
        alone = await write(engine, None, "os.path", **drawn)
        together = await asyncio.gather(
            write(engine, None, "a"),
            write(engine, None, "os.path", **drawn),
            write(engine, None, "os.path", **{**drawn, "seed": 6}),
        )
        return alone, together

    alone, (_, same, other) = asyncio.run(run())
    assert same == alone and other != alone


def test_a_text_that_was_left_ends_its_batch_early(engine):
    calls = []
    engine._base.register_forward_pre_hook(lambda *_: calls.append(1))

    async def leave():
        request = Generation(tuple(engine.prompts.text_ids("os.path")), None, max_tokens=40)
        pieces = engine.generate(request)
        await anext(pieces)
        await pieces.aclose()
        await write(engine, None, "a", max_tokens=1)

    asyncio.run(leave())
    assert len(calls) < 30


def test_adapters_of_other_tasks_are_refused_and_sums_answer_as_their_merge(engine, base, made, tmp_path):
    other = tiny_heads.save(tiny_heads.alone(base, "FEATURE_EXTRACTION", "lora"), tmp_path / "f", "x")

    async def run():
        with pytest.raises(AdapterRefused, match="of task FEATURE_EXTRACTION"):
            await engine.load("f", other)
        await engine.load("one", made["one"][1])
        await engine.combine("half", [("one", 1.0)])
        same = await write(engine, "half", "os.path"), await write(engine, "one", "os.path")
        await engine.unload("one")
        assert engine.loaded() == {"half"}
        return same

    half, one = asyncio.run(run())
    assert half[0] == one[0]


@pytest.mark.parametrize(
    "config",
    [
        peft.PolyConfig(task_type=TASK, r=4, n_tasks=3, n_skills=3, target_modules=["q", "v", "wo"]),
        peft.MultitaskPromptTuningConfig(task_type=TASK, num_virtual_tokens=4, num_tasks=3, num_ranks=2),
    ],
    ids=["poly", "multitask"],
)
def test_each_text_is_of_its_own_task(engine, base, made, tmp_path, config):
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(7)
    model = peft.get_peft_model(tiny_heads.alone(base, TASK, None), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.6
    model.save_pretrained(tmp_path / "tasks")
    if isinstance(config, peft.MultitaskPromptTuningConfig):
        # HF PEFT leaves the decoder's tokens out while it generates: docs/differences.md
        model = peft_dist.PeftModel.from_pretrained(
            tiny_heads.alone(base, TASK, None), tmp_path / "tasks"
        ).eval()

    async def run():
        await engine.load("tasks", tmp_path / "tasks")
        await engine.load("one", made["one"][1])
        assert (engine.num_tasks("tasks"), engine.num_tasks("one"), engine.num_tasks(None)) == (3, 0, 0)
        asked = [write(engine, "tasks", text, task=task) for task in range(3) for text in TEXTS]
        *given, _, _ = await asyncio.gather(*asked, write(engine, "one", "a"), write(engine, None, "a"))
        await engine.unload("tasks")
        return given

    found, distinct = iter(asyncio.run(run())), set()
    for task in range(3):
        for text in TEXTS:
            with torch.no_grad():
                wanted = model.generate(
                    **tokenizer(text, return_tensors="pt"),
                    task_ids=torch.tensor([task]),
                    max_new_tokens=10,
                    do_sample=False,
                )
            ids, *_ = next(found)
            assert ids == wanted[0, 1:].tolist(), (task, text)
            distinct.add(tuple(ids))
    assert len(distinct) > 4


def alone(model, tokenizer, text, num):
    with torch.no_grad():
        out = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=num, do_sample=False)
    return out[0, 1:].tolist()


def test_who_comes_while_others_are_written_joins_them_at_the_next_step(engine, base, made):
    tokenizer = AutoTokenizer.from_pretrained(base)
    engine._eos_ids = frozenset()
    for model, _ in made.values():
        model.get_base_model().generation_config.eos_token_id = None
    sizes, asked = (
        [],
        [("one", TEXTS[1]), ("two", "a"), ("three", TEXTS[3]), ("one", TEXTS[2]), ("two", "ab")],
    )
    engine._base.register_forward_pre_hook(lambda *_: sizes.append([len(b.rows) for b in engine._batches]))
    ended = []

    async def one(name, text, num):
        given = await write(engine, name, text, max_tokens=num)
        ended.append((name, text))
        return given[0]

    async def run():
        for name in ("one", "two", "three", "five"):
            await engine.load(name, made[name][1])
        sizes.clear()
        tasks = []
        for number, (name, text) in enumerate(asked):
            tasks.append(asyncio.ensure_future(one(name, text, 40 - 9 * number)))
            while len(sizes) < 4 * (number + 1):
                await asyncio.sleep(0.001)
        # Behind virtual tokens: beside them.
        tasks.append(asyncio.ensure_future(one("five", TEXTS[0], 4)))
        return await asyncio.gather(*tasks)

    *given, prefixed = asyncio.run(run())
    for number, ((name, text), ids) in enumerate(zip(asked, given, strict=True)):
        assert ids == alone(made[name][0], tokenizer, text, 40 - 9 * number), (name, text)
    assert prefixed == alone(made["five"][0], tokenizer, TEXTS[0], 4)
    assert ended.index(("two", "ab")) < ended.index(("one", TEXTS[1]))
    assert max(max(each) for each in sizes if each) >= 4  # rows of several arrivals went together
    assert engine._batches == [] and engine.figures().running == 0


def test_a_decoder_that_counts_positions_writes_newcomers_beside_the_others(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64}
    layers = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads"), 2)
    config = BartConfig(
        **sizes, **layers, decoder_attention_heads=2, max_position_embeddings=64, init_std=0.3, pad_token_id=1
    )
    model = BartForConditionalGeneration(config).eval()
    model.generation_config.update(eos_token_id=None, forced_eos_token_id=None, repetition_penalty=1.3)
    prompts = [(5, 9, 23), (40, 2, 7, 11, 12), (33,)]
    wanted = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, 1:].tolist()
        for ids in prompts
    ]
    engine = Seq2SeqEngine(model, lambda ids: "x" * len(ids), frozenset(), 60)
    steps = []
    model.register_forward_pre_hook(lambda *_: steps.append(len(engine._batches)))

    async def one(ids):
        request = Generation(ids, None, 12, logprobs=0)
        return [each.token async for piece in engine.generate(request) for each in piece.logprobs]

    async def run():
        tasks = []
        for number, ids in enumerate(prompts):
            tasks.append(asyncio.ensure_future(one(ids)))
            while len(steps) < 3 * (number + 1):
                await asyncio.sleep(0.001)
        return await asyncio.gather(*tasks)

    try:
        assert asyncio.run(run()) == wanted
    finally:
        engine.close()
    assert max(steps) > 1


def test_a_batch_that_fails_tells_its_own_rows_and_others_go_on(engine, made):
    async def run():
        await engine.load("one", made["one"][1])
        plain = await write(engine, "one", "a", max_tokens=30)
        broken = []

        def fail(*_):
            if not broken:
                broken.append(1)
                raise RuntimeError("out of memory")

        handle = engine._base.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            await write(engine, "one", "a")
        handle.remove()
        again = await write(engine, "one", "a", max_tokens=30)
        await engine.unload("one")
        return plain, again

    plain, again = asyncio.run(run())
    assert plain == again and engine.figures().running == 0


def test_scores_that_are_no_numbers_end_their_row_and_no_other(engine, made, monkeypatch):
    step = DecodingBatch.step

    def overflowing(batch):
        scores = step(batch)
        for row, asked in enumerate(batch.rows):
            if asked.adapter is not None and len(asked.written) > 2:
                scores[row, 5] = float("nan")
        return scores

    async def run():
        await engine.load("one", made["one"][1])
        alone = await write(engine, None, "a", max_tokens=30)
        monkeypatch.setattr(DecodingBatch, "step", overflowing)
        broken, beside = await asyncio.gather(
            write(engine, "one", "a", max_tokens=30),
            write(engine, None, "a", max_tokens=30),
            return_exceptions=True,
        )
        await engine.unload("one")
        return broken, beside, alone

    broken, beside, alone = asyncio.run(run())
    assert isinstance(broken, ScoresNotFinite)
    assert beside == alone and engine.figures().running == 0
